"""Metrics of classes from counts by class, of many tables at once, for resamples and thresholds.

Of each class: `right`, the rows that have it and are given it, `true`, those that have it, and `said`, those that are
given it; all (times, classes).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _accuracy(right: Array, true: Array, said: Array) -> Array:
    return divide(right.sum(1), true.sum(1))


def _f1_by_class(right: Array, true: Array, said: Array) -> Array:
    """(times, classes), nan for a class that nobody has or predicts."""
    total = true + said
    return np.where(total > 0, divide(2 * right, total), np.nan)


def _f1(right: Array, true: Array, said: Array) -> Array:
    return np.nan_to_num(_f1_by_class(right, true, said))[:, 1]


def _f1_macro(right: Array, true: Array, said: Array) -> Array:
    by_class = _f1_by_class(right, true, said)
    return divide(np.nansum(by_class, axis=1), (~np.isnan(by_class)).sum(1))


def _matthews(right: Array, true: Array, said: Array) -> Array:
    """Of any number of classes (Gorodkin, 2004); 0 where labels or predictions are constant."""
    total = true.sum(1)
    both = right.sum(1) * total - (true * said).sum(1)
    return divide(both, np.sqrt((total**2 - (true**2).sum(1)) * (total**2 - (said**2).sum(1))))


def divide(over: Array, under: Array) -> Array:
    out: Array = np.zeros(np.broadcast(over, under).shape)
    return np.divide(over, under, out=out, where=under > 0)


COUNTS: dict[str, Callable[[Array, Array, Array], Array]] = {  # from right, true and said (times, classes)
    "accuracy": _accuracy,
    "matthews_correlation": _matthews,
    "f1": _f1,
    "f1_macro": _f1_macro,
}
