"""Metrics of classes from counts (times, label, prediction): of many tables at once, for resamples and thresholds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _accuracy(counts: Array) -> Array:
    return divide(np.trace(counts, axis1=1, axis2=2), counts.sum((1, 2)))


def _f1_by_class(counts: Array) -> Array:
    """(times, classes), nan for a class that nobody has or predicts."""
    both = np.diagonal(counts, axis1=1, axis2=2)
    total = counts.sum(1) + counts.sum(2)
    return np.where(total > 0, divide(2 * both, total), np.nan)


def _f1(counts: Array) -> Array:
    return np.nan_to_num(_f1_by_class(counts))[:, 1]


def _f1_macro(counts: Array) -> Array:
    by_class = _f1_by_class(counts)
    return divide(np.nansum(by_class, axis=1), (~np.isnan(by_class)).sum(1))


def _matthews(counts: Array) -> Array:
    """Of any number of classes (Gorodkin, 2004); 0 where labels or predictions are constant."""
    total, right = counts.sum((1, 2)), np.trace(counts, axis1=1, axis2=2)
    true, said = counts.sum(2), counts.sum(1)  # (times, classes)
    both = right * total - (true * said).sum(1)
    return divide(both, np.sqrt((total**2 - (true**2).sum(1)) * (total**2 - (said**2).sum(1))))


def divide(over: Array, under: Array) -> Array:
    out: Array = np.zeros(np.broadcast(over, under).shape)
    return np.divide(over, under, out=out, where=under > 0)


COUNTS: dict[str, Callable[[Array], Array]] = {  # from counts (times, label, prediction)
    "accuracy": _accuracy,
    "matthews_correlation": _matthews,
    "f1": _f1,
    "f1_macro": _f1_macro,
}
