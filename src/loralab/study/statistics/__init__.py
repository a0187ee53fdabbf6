"""Statistics of the runs of a study."""

from loralab.study.statistics.estimates import Estimate, estimate, holm, mcnemar
from loralab.study.statistics.planned import PlannedFamily, planned
from loralab.study.statistics.resample import resampled
from loralab.study.statistics.table import Comparison, Summary, Verdict, comparisons, smallest, summaries

__all__ = [
    "Comparison",
    "Estimate",
    "PlannedFamily",
    "Summary",
    "Verdict",
    "comparisons",
    "estimate",
    "holm",
    "mcnemar",
    "planned",
    "resampled",
    "smallest",
    "summaries",
]
