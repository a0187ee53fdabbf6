"""Named entities with Trainer: a label for every token.

python examples/with_peft/tagging.py BASE OUT
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

TEXTS = [("Ada lives in Paris", "B-PER O O B-LOC"), ("Paris met Ada Byron", "B-LOC O B-PER I-PER")]
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]


def encoded(tokenizer, text, tags):
    """A row: its tokens, and the tag of its word at each of them; -100 beside words."""
    row = tokenizer(text)
    numbers = [TAGS.index(tag) for tag in tags.split()]
    return {**row, "labels": [-100 if word is None else numbers[word] for word in row.word_ids()]}


def main(base: str, out: str) -> Trainer:
    """Train 20 steps on `base` and save the adapter in `out`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=len(TAGS))
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="TOKEN_CLS")
    )
    rows = [encoded(tokenizer, *TEXTS[i % 2]) for i in range(80)]
    settings = TrainingArguments(
        out, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=10, report_to="none"
    )
    collator = DataCollatorForTokenClassification(tokenizer)
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
