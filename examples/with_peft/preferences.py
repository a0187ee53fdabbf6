"""Preferences with TRL's DPOTrainer. The reference is the policy as it is before the first step, over the same base.

python examples/with_peft/preferences.py BASE OUT
"""

import sys

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def preference(i):
    """A question with a better and a worse answer."""
    return {"prompt": f"What is {i} plus {i + 1}?", "chosen": f" It is {2 * i + 1}.", "rejected": " Who knows."}


def main(base: str, out: str) -> DPOTrainer:
    """Train 20 steps on `base` and save the adapter in `out`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    settings = DPOConfig(
        out,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=10,
        bf16=False,
        report_to="none",
    )
    rows = Dataset.from_list([preference(i) for i in range(80)])
    trainer = DPOTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
