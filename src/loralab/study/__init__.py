"""Studies: many runs that answer one question, with the statistics that say how far the answer holds."""

from loralab.study.record import Cell, Planned, Predictions, Run, Study, load

__all__ = ["Cell", "Planned", "Predictions", "Run", "Study", "load"]
