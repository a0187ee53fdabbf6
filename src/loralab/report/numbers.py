"""Numbers as text: three digits of a score, units, and – for what is not known, as with one seed."""

import math
from collections.abc import Iterable

from loralab.data.metrics import LOWER_IS_BETTER

NONE = "–"
NAMES = {
    "matthews_correlation": "Matthews",
    "f1": "F1",
    "f1_macro": "F1, macro",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "auc": "AUC",
    "auc-or-pearson": "AUC or Pearson",
    "selected": "own metric",
    "thresholded": "own metric, at threshold",
}


def metric(name: str) -> str:
    """A metric as people write it: matthews_correlation -> Matthews."""
    return NAMES.get(name, name.replace("_", " "))


def axis(name: str) -> str:
    """A metric as the name of an axis, which says where the better end is unless it is up: loss (lower is better)."""
    return metric(name) + " (lower is better)" * (name in LOWER_IS_BETTER)


def score(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:+.3f}".replace("-", "−")


def mean_sd(mean: float, sd: float) -> str:
    return score(mean) if math.isnan(sd) else f"{score(mean)} ± {score(sd)}"


def interval(low: float, high: float) -> str:
    return NONE if math.isnan(low) else f"{low:.3f} to {high:.3f}".replace("-", "−")


def chance(p: float) -> str:
    return NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float) -> str:
    """22713986 -> 22.7 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def seeds(values: Iterable[int]) -> str:
    """0 -> seed 0; 0, 1, 2 -> seeds 0–2."""
    known = sorted(values)
    return f"seed{'s' * (len(known) != 1)} {spans(known)}"


def spans(values: Iterable[int], dash: str = "–") -> str:
    """0, 1, 2, 5 -> 0–2, 5."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}{dash}{r[-1]}" for r in runs)
