"""Medians, with quartiles for what lies between turns."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    median: float
    low: float  # first quartile
    high: float  # third quartile
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, between two values in proportion."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times ours is theirs, turn by turn: neighbours in time share what else the machine does."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])
