"""Runs: one adapter (or the whole model, or the head alone) trained on one task."""

from loralab.run.folder import RunInterrupted
from loralab.run.loop import Outcome, train, train_together
from loralab.run.settings import Settings
from loralab.run.state import RunFailed

__all__ = ["Outcome", "RunFailed", "RunInterrupted", "Settings", "train", "train_together"]
