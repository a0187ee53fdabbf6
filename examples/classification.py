"""Classification with Trainer: gradient checkpointing, resume, and the best checkpoint at the end.

python examples/classification.py BASE OUT [CHECKPOINT]
"""

import sys

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import loralab

TEXTS = [("a fine film", 1), ("never again", 0), ("I would see it twice", 1), ("a waste of an evening", 0)]


def main(base: str, out: str, resume: str | None = None) -> Trainer:
    """Train 20 steps on `base` and save the adapter in `out`; go on from the checkpoint `resume`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    loralab.attach(model, "lora", rank=4, alpha=8, targets=["query", "value"], head=True)
    rows = [{**tokenizer(f"{text} {i}"), "labels": label} for i in range(20) for text, label in TEXTS]
    settings = TrainingArguments(
        out, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, gradient_checkpointing=True,
        eval_strategy="steps", eval_steps=5, save_steps=5, load_best_model_at_end=True, report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:8], processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
