"""What a study will be able to find: for each family of tests the smallest difference found with 80 % power.

The spread of a paired difference over seeds is that of finished runs if there are enough, else the one that the file
expects ([compare] sd), else that of few runs, else 1, so that differences are in units of it. What runs show is taken
at its upper confidence bound: a spread of few differences is as often too small as too large, and a study that counts
on too small a one promises what it cannot find. Runs of tuning never count. Variances that are moderated over a family
have more degrees of freedom than counted here, and the luck of the rows, which is not counted, makes an interval wider.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from loralab.study.definition import Definition
from loralab.study.record import Key, Run
from loralab.study.statistics.contrasts import smallest_difference
from loralab.study.statistics.planned import BY_TASK, MEAN

EVERY_PAIR = "every two methods, by task"
POWER = 0.8
CONFIDENCE = 0.8  # one-sided, of the spread that finished runs show
ENOUGH = 5  # degrees of freedom, as six differences of one method have: with fewer the file knows better
Source = Literal["finished runs", "the file", "unknown"]


@dataclass(frozen=True)
class Power:
    """Of one family of tests on one model, at Holm's first step."""

    family: str
    model: str
    tests: int
    seeds: int
    sd: float  # of a paired difference on one task, over seeds; 1 where it is not known
    source: Source
    differences: int  # paired ones of finished runs that `sd` is from; 0 for another source
    smallest: float  # true difference that is found; in units of `sd` where that is not known
    margin: float  # the narrowest margin within which two equal methods are shown equal


def power(definition: Definition, finished: Iterable[Run]) -> list[Power]:
    """Of every family that the study plans; none with one seed."""
    d, seeds, runs = definition, len(definition.seeds), list(finished)
    if seeds < 2 or len(d.methods) < 2:
        return []
    return [
        _of(family, model, tests, tasks, d, _spread(d, [run for run in runs if run.scheduled.model == model]))
        for model in d.models
        for family, tests, tasks in _families(d)
    ]


def _families(d: Definition) -> list[tuple[str, int, int]]:
    """(family, tests in it, tasks that are averaged in each)."""
    others, tasks = len(d.methods) - 1, len(d.tasks)
    if d.compare.reference is None:
        pairs = others if d.compare.against is not None else math.comb(len(d.methods), 2)
        return [(EVERY_PAIR if d.compare.against is None else BY_TASK, pairs * tasks * len(d.models), 1)]
    by_task = (BY_TASK, others * tasks, 1)
    return [by_task] if d.compare.family == BY_TASK else [(MEAN, others, tasks), by_task]


@dataclass(frozen=True)
class Spread:
    """The standard deviation of a paired difference on a task, and where it is from."""

    sd: float
    source: Source
    differences: int = 0


def _of(family: str, model: str, tests: int, tasks: int, d: Definition, spread: Spread) -> Power:
    seeds, alpha = len(d.seeds), d.compare.alpha / tests
    error, df = spread.sd / math.sqrt(seeds * tasks), seeds - 1  # tasks have luck of their own
    smallest = smallest_difference(error, df, alpha, POWER)
    margin = error * float(stats.t.isf(alpha, df) + stats.t.ppf((1 + POWER) / 2, df))
    return Power(family, model, tests, seeds, spread.sd, spread.source, spread.differences, smallest, margin)


def _spread(d: Definition, runs: Sequence[Run]) -> Spread:
    """What the spread is expected to be."""
    reference = d.compare.reference or d.compare.against or d.methods[0].label
    count, squares, freedom = _seen(reference, runs)
    if squares > 0 and (freedom >= ENOUGH or d.compare.sd is None):
        return Spread(upper(squares, freedom), "finished runs", count)
    return Spread(1.0, "unknown") if d.compare.sd is None else Spread(d.compare.sd, "the file")


def upper(squares: float, freedom: int) -> float:
    """Return the upper confidence bound of a standard deviation with that sum of squares and degrees of freedom."""
    return math.sqrt(squares / float(stats.chi2.ppf(1 - CONFIDENCE, freedom)))


def _seen(reference: str, runs: Sequence[Run]) -> tuple[int, float, int]:
    """(differences to a reference that runs have, sum of squares about each cell's mean, degrees of freedom)."""
    scores: dict[Key, dict[int, float]] = {}
    for run in runs:
        if run.scheduled.role == "final":
            scores.setdefault(run.scheduled.key, {})[run.seed] = run.selected
    count, squares, freedom = 0, 0.0, 0
    for (task, model, method), own in scores.items():
        base = scores.get((task, model, reference), {})
        shared = own.keys() & base.keys()
        if method != reference and len(shared) > 1:
            differences = np.array([own[s] - base[s] for s in sorted(shared)])
            squares += float(((differences - differences.mean()) ** 2).sum())
            count, freedom = count + len(shared), freedom + len(shared) - 1
    return count, squares, freedom
