"""Studies: many runs that answer one question, with the statistics that say how far the answer holds."""

from loralab.study.record import Cell, Predictions, Run, ScheduledRun, Study, load
from loralab.study.statistics import Comparison, Summary, comparisons, summaries

__all__ = [
    "Cell",
    "Comparison",
    "Predictions",
    "Run",
    "ScheduledRun",
    "Study",
    "Summary",
    "comparisons",
    "load",
    "summaries",
]
