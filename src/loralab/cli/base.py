"""A base that wears the adapter of a folder, for the commands that need both."""

import sys
from pathlib import Path
from typing import Any

import torch

from loralab import adapters, models
from loralab.adapters import Adapters
from loralab.errors import UserError
from loralab.files import AdapterFile


def load(model: str, folder: Path) -> tuple[Adapters, Any]:
    """(adapters, tokenizer)."""
    base, tokenizer = plain(model, folder)
    return adapters.load(base, folder), tokenizer


def plain(model: str, folder: Path) -> tuple[Any, Any]:
    """(base, tokenizer), with the head that the adapter of `folder` needs."""
    file = adapters.read(folder)
    outputs = _outputs(file)
    base, tokenizer = models.classifier(model, outputs, outputs == 1, torch.float32, seed=0)
    if file.labels:
        base.config.id2label = dict(enumerate(file.labels))
        base.config.label2id = {label: i for i, label in enumerate(file.labels)}
    if not file.heads:
        print(f"note: {folder} has no head, so that of the model is random", file=sys.stderr)
    return base, tokenizer


def absent(out: Path) -> Path:
    """The folder to write, which must not be there: nothing is overwritten."""
    if out.exists():
        raise UserError(f"--out {out} exists: choose a new folder")
    return out


def _outputs(file: AdapterFile) -> int:
    """Outputs of the head: one a label, or where a folder names no labels the narrowest matrix of its head."""
    head = [t for key, t in file.tensors.items() if key.startswith(tuple(f"{path}." for path in file.heads))]
    return len(file.labels) or min((len(t) for t in head if t.ndim == 2), default=2)
