"""Chats with TRL's SFTTrainer: the base needs a chat template.

python examples/chat.py BASE OUT
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import loralab


def chat(i):
    """A short conversation."""
    question, answer = f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main(base: str, out: str) -> SFTTrainer:
    """Train 20 steps on `base` and save the adapter in `out`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    loralab.attach(model, "lora", rank=4, alpha=8, targets=["q_proj", "v_proj"])
    settings = SFTConfig(
        out,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=10,
        bf16=False,
        report_to="none",
    )
    rows = Dataset.from_list([chat(i) for i in range(80)])
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
