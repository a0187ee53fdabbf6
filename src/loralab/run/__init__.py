"""Runs: one adapter (or the whole model, or the head alone) trained on one task."""

from loralab.run.loop import Outcome, train, train_together
from loralab.run.settings import Settings

__all__ = ["Outcome", "Settings", "train", "train_together"]
