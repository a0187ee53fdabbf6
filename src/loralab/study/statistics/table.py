"""What a study found: a summary of every cell, and a verdict on every two methods, corrected over the whole table."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from loralab.study.record import Array, Cell, Run, Study
from loralab.study.statistics.estimates import Estimate, estimate, holm, mcnemar, seeds_needed
from loralab.study.statistics.resample import COUNTS, resampled

TIMES = 1000  # resamples: the standard error of a variance of rows is then 5 % of it
Verdict = Literal["better", "worse", "equivalent", "indistinguishable", "one seed", "same runs"]


@dataclass(frozen=True)
class Summary:
    """A cell in numbers; `rows` is 0 where predictions are unknown, and the interval is then about these rows only."""

    task: str
    model: str
    method: str
    metric: str
    seeds: int
    mean: float
    sd: float
    seeds_low: float  # interval of Student's t over seeds
    seeds_high: float
    low: float  # interval over seeds and rows; that over seeds where predictions are unknown
    high: float
    rows: int
    last: float  # mean over seeds, as the next one
    best_on_validation: float
    inflation: float  # mean of best_on_validation - selected
    pending: int
    failed: int
    tuning: int  # runs spent on tuning
    unlearnt: int  # runs that predict one class for every row


@dataclass(frozen=True)
class Comparison:
    """Method `a` against `b` on the same seeds and, where predictions are known, the same rows."""

    task: str
    model: str
    a: str
    b: str
    metric: str
    seeds: int
    rows: int  # 0: a test over seeds only
    difference: float  # a - b
    sd: float  # of the difference, over seeds
    low: float
    high: float
    p: float
    p_holm: float  # corrected over the table
    margin: float
    p_equivalent: float
    p_equivalent_holm: float
    verdict: Verdict
    within_margin: bool  # equivalent in practice, whatever the verdict
    seeds_needed: int | None  # for 80 % power at the difference seen; None: more than 1,024
    mcnemar: tuple[float, ...]  # p for each pair of runs of a seed; classes only


def summaries(study: Study, level: float = 0.95) -> list[Summary]:
    """Of every cell that has a finished run."""
    return [_summary(cell, level) for cell in study.cells().values() if cell.runs]


def comparisons(study: Study, level: float = 0.95) -> list[Comparison]:
    """Of every two methods of a task and model that share a seed; with `against`, of each with that one."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.cells().values():
        if cell.runs:
            groups.setdefault(cell.key[:2], []).append(cell)
    compare = study.compare
    found = [
        _compared(a, b, compare["alpha"], margin_of(compare["margin"], str(a.metric)), level)
        for cells in groups.values()
        for a, b in _pairs(cells, compare["against"])
        if {run.seed for run in a.runs} & {run.seed for run in b.runs}
    ]
    return corrected(found, compare["alpha"])


def margin_of(margins: dict[str, float], metric: str) -> float:
    return margins.get(metric, margins["default"])


def corrected(found: Sequence[Comparison], alpha: float) -> list[Comparison]:
    """Holm over the table, for the tests of a difference and for those of equivalence, and the verdicts that remain."""
    p = holm([c.p for c in found])
    same = holm([c.p_equivalent for c in found])
    tested = [replace(c, p_holm=p[i], p_equivalent_holm=same[i]) for i, c in enumerate(found)]
    return [
        c if math.isnan(c.p) else replace(c, verdict=verdict(c.difference, c.p_holm, c.p_equivalent_holm, alpha))
        for c in tested
    ]


def verdict(difference: float, p: float, p_equivalent: float, alpha: float) -> Verdict:
    if p < alpha:
        return "better" if difference > 0 else "worse"
    return "equivalent" if p_equivalent < alpha else "indistinguishable"


def _pairs(cells: list[Cell], against: str | None) -> Iterable[tuple[Cell, Cell]]:
    if against is None:
        return combinations(cells, 2)
    return [(a, b) for b in cells if b.key[2] == against for a in cells if a is not b]


def _summary(cell: Cell, level: float) -> Summary:
    metric, runs = str(cell.metric), list(cell.runs)
    scores = _replicates(metric, runs)
    over_seeds = estimate(cell.scores)
    over_both = over_seeds if scores is None else estimate(cell.scores, scores, _rows(runs[0]))
    mean = {key: float(np.mean([run.result["metric"][key] for run in runs])) for key in ("last", "best_on_validation")}
    task, model, method = cell.key
    return Summary(
        task, model, method, metric, len(runs), over_seeds.mean, over_seeds.sd,
        *over_seeds.interval(level), *over_both.interval(level), over_both.rows,
        last=mean["last"], best_on_validation=mean["best_on_validation"], inflation=float(cell.inflation.mean()),
        pending=cell.pending, failed=len(cell.failed), tuning=cell.trials,
        unlearnt=sum(bool(run.result["warnings"]) for run in runs),
    )  # fmt: skip


def _compared(a: Cell, b: Cell, alpha: float, margin: float, level: float) -> Comparison:
    """Without the correction, which needs the whole table."""
    metric = str(a.metric)
    of_a, of_b = ({run.seed: run for run in cell.runs} for cell in (a, b))
    seeds = sorted(of_a.keys() & of_b.keys())
    runs_a, runs_b = [of_a[seed] for seed in seeds], [of_b[seed] for seed in seeds]
    found, tests = paired(metric, runs_a, runs_b)
    p, same = found.p(), found.p_equivalent(margin)
    untested: Verdict = "one seed"
    if [run.folder for run in runs_a] == [run.folder for run in runs_b]:  # two names of one method
        p, same, untested = math.nan, math.nan, "same runs"
    return Comparison(
        *a.key, b.key[2], metric, len(seeds), found.rows, found.mean, found.sd, *found.interval(level),
        p=p, p_holm=p, margin=margin, p_equivalent=same, p_equivalent_holm=same,
        verdict=untested, within_margin=bool(same < alpha),
        seeds_needed=seeds_needed(found, alpha), mcnemar=tests,
    )  # fmt: skip


def paired(metric: str, a: list[Run], b: list[Run]) -> tuple[Estimate, tuple[float, ...]]:
    """The difference of runs of the same seeds, and McNemar's p of each seed."""
    difference = np.array([x.selected - y.selected for x, y in zip(a, b, strict=True)])
    scores = _replicates(metric, [*a, *b])
    if scores is None:
        return estimate(difference), ()
    both = estimate(difference, scores[:, : len(a)] - scores[:, len(a) :], _rows(a[0]))
    if metric not in COUNTS:
        return both, ()
    return both, tuple(mcnemar(_right(x), _right(y)) for x, y in zip(a, b, strict=True))


def _replicates(metric: str, runs: list[Run]) -> Array | None:
    """(times, runs): scores on the same resampled rows; None unless all runs kept predictions of the same rows."""
    kept = [run.predictions for run in runs]
    first = [next(iter(p.values())) for p in kept if p]
    if len(first) < len(runs) or any(not np.array_equal(p.labels, first[0].labels) for p in first):
        return None
    seed = zlib.crc32(metric.encode())  # one answer for one study, however often it is asked
    return resampled(metric, [p.logits for p in first], first[0].labels, TIMES, np.random.default_rng(seed))


def _rows(run: Run) -> int:
    return len(next(iter((run.predictions or {}).values())).labels)


def _right(run: Run) -> Array:
    split = next(iter((run.predictions or {}).values()))
    return np.asarray(split.logits.argmax(1) == split.labels)
