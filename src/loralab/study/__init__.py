"""Studies: many runs that answer one question, with the statistics that say how far the answer holds."""

from loralab.study.record import Cell, Planned, Predictions, Run, Study, load
from loralab.study.statistics import Comparison, Summary, comparisons, summaries

__all__ = [
    "Cell",
    "Comparison",
    "Planned",
    "Predictions",
    "Run",
    "Study",
    "Summary",
    "comparisons",
    "load",
    "summaries",
]
