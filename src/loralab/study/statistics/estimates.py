"""A mean over seeds with all that is uncertain about it: its interval and its tests.

A score of seed s on a validation split of n rows is  mu + a_s + b + c_s:  a_s is luck of the seed, b of the rows that
every seed is scored on, c_s of both. The spread of S seeds sees a and c, so  s^2 / S  is their part; b is the
covariance that resampled rows give the scores of different seeds (`resample.py`). The variance is the sum of both,
with the degrees of freedom of Satterthwaite (1946):  (V1 + V2)^2 / (V1^2 / df1 + V2^2 / df2).
An interval is never narrower, a p never smaller, than those of seeds alone: the covariance is an estimate too, and with
few seeds its noise would lend degrees of freedom that are not there.
Without predictions b is unknown: what is left is Student's t over seeds, and speaks of these rows only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ROUNDING = 1e-12  # of scores and their differences, in relation to the larger of 1 and the scores

Array = NDArray[Any]


@dataclass(frozen=True)
class MeanEstimate:
    """A mean, or with `mean_estimate(a - b)` a paired difference of means."""

    mean: float
    sd: float  # over seeds
    seeds: int
    of_rows: float = 0.0  # variance that the rows bring to every seed alike
    rows: int = 0  # validation rows, 0 where predictions are unknown

    @property
    def of_seeds(self) -> float:
        return self.sd**2 / self.seeds

    @property
    def parts(self) -> tuple[tuple[float, float], ...]:
        """(standard error, degrees of freedom) of seeds alone, and of seeds and rows; the less sure one counts."""
        both = math.sqrt(self.of_seeds + self.of_rows), freedom(self.of_seeds, self.seeds, self.of_rows, self.rows)
        return (math.sqrt(self.of_seeds), self.seeds - 1), both

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Where the mean lies; (nan, nan) where that is unknown: with one seed or two, and where no seed varies.

        Two seeds have one degree of freedom: their interval reaches 13 standard errors to each side.
        """
        if self.seeds < 3 or self.exact:
            return math.nan, math.nan
        half = max(stats.t.ppf((1 + level) / 2, df) * error for error, df in self.parts)
        return self.mean - half, self.mean + half

    def p(self) -> float:
        """Two-sided p of no difference; nan with one seed."""
        return math.nan if self.seeds < 2 else min(1.0, 2 * self._tail(abs(self.mean)))

    def p_equivalent(self, margin: float) -> float:
        """TOST (Schuirmann, 1987): the larger p of 'not below -margin' and 'not above margin'."""
        return math.nan if self.seeds < 2 else self._tail(margin - abs(self.mean))

    @property
    def exact(self) -> bool:
        """Every seed has the same difference: t over seeds is x/0, and flipping signs is their test."""
        return self.of_seeds == 0

    def _tail(self, distance: float) -> float:
        """Chance of a mean so far above its true value, at least; by signs where seeds do not vary."""
        signs = 2.0**-self.seeds if distance > 0 else 1.0
        return float(max(stats.t.sf(distance / error, df) if error else signs for error, df in self.parts))


def freedom(of_seeds: float, seeds: int, of_rows: float, rows: int) -> float:
    """Satterthwaite's degrees of freedom of a variance of two parts."""
    if of_rows == 0:
        return seeds - 1
    return (of_seeds + of_rows) ** 2 / (of_seeds**2 / (seeds - 1) + of_rows**2 / (rows - 1))


def mean_estimate(scores: Sequence[float] | Array, replicates: Array | None = None, rows: int = 0) -> MeanEstimate:
    """The mean of (seeds,) scores; `replicates` (times, seeds) are the same scores on resampled rows."""
    values = np.asarray(scores, dtype=float)
    sd = math.sqrt(variance(values)) if len(values) > 1 else math.nan
    of_rows = 0.0 if replicates is None or len(values) < 2 else shared_variance(replicates)
    return MeanEstimate(float(values.mean()), sd, len(values), of_rows, 0 if replicates is None else rows)


def variance(values: Array) -> float:
    """Sample variance of two or more values over seeds; 0 where they are equal but for rounding.

    Scores that say the same come from sums in another order, and a variance of 1e-33 would make t large and, as a
    logarithm, spoil a prior.
    """
    return 0.0 if _equal(values) else float(values.var(ddof=1))


def evened(differences: Array, largest: float) -> Array:
    """Differences (seeds,) of scores up to `largest`; those that differ by the rounding of the scores alone are one."""
    if len(differences) and np.ptp(differences) <= ROUNDING * largest:
        return np.full(len(differences), differences.mean())
    return differences


def shared_variance(replicates: Array) -> float:
    """Mean covariance of different columns of (times, seeds), not below 0: what the rows do to all seeds alike."""
    if all(_equal(column) for column in replicates.T):
        return 0.0
    covariance = np.cov(replicates, rowvar=False)
    n = len(covariance)
    return max(0.0, float((covariance.sum() - np.trace(covariance)) / (n * (n - 1))))


def _equal(values: Array) -> bool:
    """Whether values of one quantity differ by rounding alone."""
    return bool(np.ptp(values) <= ROUNDING * max(1.0, float(np.abs(values).max())))


def within(interval: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """The part of an interval in which a value can lie; nan stays nan."""
    return max(interval[0], low), min(interval[1], high)


def holm(p: Sequence[float]) -> list[float]:
    """p-values that hold for the whole family (Holm, 1979): max over j <= i of (m - j) p_(j); nan is no test."""
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    adjusted, highest = [math.nan] * len(p), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p[i]))
        adjusted[i] = highest
    return adjusted


def mcnemar(right_a: Array, right_b: Array) -> float:
    """Exact p that two classifiers are right equally often, from the rows where only one is right (McNemar, 1947)."""
    a, b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(stats.binomtest(a, a + b).pvalue) if a + b else 1.0
