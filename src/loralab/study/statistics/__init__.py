"""Statistics of the runs of a study."""

from loralab.study.statistics.estimates import MeanEstimate, holm, mcnemar, mean_estimate
from loralab.study.statistics.planned import PlannedFamily, planned, remarks
from loralab.study.statistics.resample import resampled
from loralab.study.statistics.table import Comparison, Summary, Verdict, comparisons, smallest, summaries

__all__ = [
    "Comparison",
    "MeanEstimate",
    "PlannedFamily",
    "Summary",
    "Verdict",
    "comparisons",
    "holm",
    "mcnemar",
    "mean_estimate",
    "planned",
    "remarks",
    "resampled",
    "smallest",
    "summaries",
]
