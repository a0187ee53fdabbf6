"""Runs: one adapter (or the whole model, or the head alone) trained on one task."""

from loralab.train.loop import train
from loralab.train.settings import Settings

__all__ = ["Settings", "train"]
