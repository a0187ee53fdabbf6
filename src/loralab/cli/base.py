"""Loading a base with an adapter on it, for the commands that need both."""

from pathlib import Path

import torch

from loralab import files, models
from loralab.attach import Adapters


def load(model: str, folder: Path) -> tuple[Adapters, object]:
    """(adapters, tokenizer) of a base that wears the adapter of `folder`."""
    file = files.read(folder)
    outputs = len(file.labels) or 2
    base, tokenizer = models.classifier(model, outputs, outputs == 1, torch.float32, seed=0)
    base.config.id2label = dict(enumerate(file.labels)) or base.config.id2label
    return files.load(base, folder), tokenizer
