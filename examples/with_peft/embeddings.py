"""Sentence embeddings with sentence-transformers and a contrastive loss.

python examples/with_peft/embeddings.py BASE OUT
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss


def main(base: str, out: str) -> SentenceTransformerTrainer:
    """Train 20 steps on `base` and save the adapter in `out`."""
    model = SentenceTransformer(base)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    settings = SentenceTransformerTrainingArguments(
        out, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=10, report_to="none"
    )
    pairs = [{"anchor": f"What is {i} plus {i + 1}?", "positive": f"It is {2 * i + 1}."} for i in range(80)]
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, settings, train_dataset=Dataset.from_list(pairs), loss=loss)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
