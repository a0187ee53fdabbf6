"""What the runs of a study say, and how surely."""

from loralab.study.statistics.estimates import Estimate, estimate, holm, mcnemar, seeds_needed
from loralab.study.statistics.resample import resampled
from loralab.study.statistics.table import Comparison, Summary, Verdict, comparisons, summaries

__all__ = [
    "Comparison",
    "Estimate",
    "Summary",
    "Verdict",
    "comparisons",
    "estimate",
    "holm",
    "mcnemar",
    "resampled",
    "seeds_needed",
    "summaries",
]
