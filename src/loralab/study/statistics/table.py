"""The results of a study: a summary of every cell, and a verdict on every two methods, corrected over the table."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from loralab.data.counts import COUNTS
from loralab.data.metrics import upward
from loralab.study.record import Array, Cell, Predictions, Run, Study, collapses, number
from loralab.study.statistics.contrasts import smallest_difference
from loralab.study.statistics.endpoint import SELECTED, metric_of, rows_of, sums_of
from loralab.study.statistics.estimates import MeanEstimate, evened, holm, mcnemar, mean_estimate, within
from loralab.study.statistics.resample import RANGES, UNBOUNDED, by_rows, resampled

TIMES = 10_000  # resamples: the standard error of a variance of rows is then 1.4 % of it
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
    unlearnt: int  # runs that predict the same for every row


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
    smallest: float  # true difference that would have been found with 80 % power at Holm's first step
    mcnemar: tuple[float, ...]  # p for each pair of runs of a seed; classes only


def summaries(study: Study, level: float = 0.95) -> list[Summary]:
    """Of every cell that has a finished run."""
    return [_summary(cell, resamples, level) for cells, resamples in places(study) for cell in cells]


def comparisons(study: Study, level: float = 0.95) -> list[Comparison]:
    """Of every two methods of a task and model that share a seed; with `against`, of each with that one."""
    compare = study.compare
    found = [
        _compared(a, b, resamples, margin_of(compare["margin"], str(a.metric)), level)
        for cells, resamples in places(study)
        for a, b in _pairs(cells, compare["against"])
        if {run.seed for run in a.runs} & {run.seed for run in b.runs}
    ]
    return corrected([c for c, _ in found], [e for _, e in found], compare["alpha"])


def places(study: Study) -> list[tuple[list[Cell], "Resamples"]]:
    """The cells with a finished run of each task and model, and their scores on resampled rows."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.cells().values():
        if cell.runs:
            groups.setdefault(cell.key[:2], []).append(cell)
    return [(cells, Resamples([run for cell in cells for run in cell.runs])) for cells in groups.values()]


class Resamples:
    """Scores of the runs of one task and model on resampled rows, the same for all runs of the same rows."""

    def __init__(self, runs: Sequence[Run], endpoint: str = SELECTED) -> None:
        self.endpoint = endpoint
        self.runs = {run.folder: run for run in runs}
        self.scores: dict[bytes, dict[Path, Array]] = {}  # labels -> folder of a run -> (times,)

    def of(self, runs: Sequence[Run]) -> Array | None:
        """(times, runs); None unless all runs kept predictions of the same rows."""
        splits = [rows_of(run, self.endpoint) for run in runs]
        labels = {None if split is None else _bytes(split) for split in splits}
        if len(labels) > 1 or None in labels:
            return None
        (key,) = labels
        assert key is not None
        if key not in self.scores:
            self.scores[key] = self._scores(key)
        return np.stack([self.scores[key][run.folder] for run in runs], axis=1)

    def _scores(self, key: bytes) -> dict[Path, Array]:
        rows = {path: rows_of(run, self.endpoint) for path, run in self.runs.items()}
        found = {path: s for path, s in rows.items() if s is not None and _bytes(s) == key}
        metric = metric_of(next(iter(self.runs.values())), self.endpoint)
        generator = np.random.default_rng(zlib.crc32(metric.encode()))  # one answer, however often it is asked
        labels = next(iter(found.values())).labels
        sums = [of for path, s in found.items() if (of := sums_of(self.runs[path], metric, s)) is not None]
        logits = [s.logits for s in found.values()]
        scores = resampled(metric, logits, labels, TIMES, generator, sums or None)
        return dict(zip(found, scores.T, strict=True))


def _bytes(split: Predictions) -> bytes:
    return bytes(split.labels.astype(np.float64).tobytes())


def margin_of(margins: dict[str, float], metric: str) -> float:
    return margins.get(metric, margins["default"])


def corrected(found: Sequence[Comparison], estimates: Sequence[MeanEstimate], alpha: float) -> list[Comparison]:
    """Holm over the table, for the tests of a difference and for those of equivalence, and what remains after it."""
    p = holm([c.p for c in found])
    same = holm([c.p_equivalent for c in found])
    tests = sum(not math.isnan(c.p) for c in found)
    out = []
    for i, (c, difference) in enumerate(zip(found, estimates, strict=True)):
        if not math.isnan(c.p):
            up = upward(c.metric, c.difference)
            c = replace(
                c, p_holm=p[i], p_equivalent_holm=same[i], smallest=smallest(difference, alpha / tests),
                within_margin=bool(c.p_equivalent < alpha), verdict=verdict(up, p[i], same[i], alpha),
            )  # fmt: skip
        out.append(c)
    return out


def smallest(difference: MeanEstimate, alpha: float, power: float = 0.8) -> float:
    """The true difference that a test at `alpha` finds with that power, the spread being as seen; nan if unknown."""
    if difference.seeds < 3 or difference.exact:
        return math.nan
    return max(smallest_difference(error, df, alpha, power) for error, df in difference.parts if error)


def verdict(difference: float, p: float, p_equivalent: float, alpha: float) -> Verdict:
    if p < alpha:
        return "better" if difference > 0 else "worse"
    return "equivalent" if p_equivalent < alpha else "indistinguishable"


def _pairs(cells: list[Cell], against: str | None) -> Iterable[tuple[Cell, Cell]]:
    if against is None:
        return combinations(cells, 2)
    return [(a, b) for b in cells if b.key[2] == against for a in cells if a is not b]


def _summary(cell: Cell, resamples: Resamples, level: float) -> Summary:
    metric, runs = str(cell.metric), list(cell.runs)
    scores = resamples.of(runs)
    over_seeds = mean_estimate(cell.scores)
    over_both = over_seeds if scores is None else mean_estimate(cell.scores, scores, _rows(runs[0]))
    mean = {
        key: float(np.mean([number(run.result["metric"][key]) for run in runs]))
        for key in ("last", "best_on_validation")
    }
    low, high = RANGES.get(metric, UNBOUNDED)
    task, model, method = cell.key
    return Summary(
        task, model, method, metric, len(runs), over_seeds.mean, over_seeds.sd,
        *within(over_seeds.interval(level), low, high), *within(over_both.interval(level), low, high), over_both.rows,
        last=mean["last"], best_on_validation=mean["best_on_validation"], inflation=float(cell.inflation.mean()),
        pending=cell.pending, failed=len(cell.failed), tuning=cell.trials,
        unlearnt=sum(map(collapses, runs)),
    )  # fmt: skip


def _compared(a: Cell, b: Cell, resamples: Resamples, margin: float, level: float) -> tuple[Comparison, MeanEstimate]:
    """Without the correction, which needs the whole table."""
    metric = str(a.metric)
    of_a, of_b = ({run.seed: run for run in cell.runs} for cell in (a, b))
    seeds = sorted(of_a.keys() & of_b.keys())
    runs_a, runs_b = [of_a[seed] for seed in seeds], [of_b[seed] for seed in seeds]
    found, tests = _paired(metric, runs_a, runs_b, resamples)
    p, same = found.p(), found.p_equivalent(margin)
    untested: Verdict = "one seed"
    if [run.folder for run in runs_a] == [run.folder for run in runs_b]:  # two names of one method
        p, same, untested = math.nan, math.nan, "same runs"
    low, high = RANGES.get(metric, UNBOUNDED)
    compared = Comparison(
        *a.key, b.key[2], metric, len(seeds), found.rows, found.mean, found.sd,
        *within(found.interval(level), low - high, high - low),
        p=p, p_holm=p, margin=margin, p_equivalent=same, p_equivalent_holm=same,
        verdict=untested, within_margin=False, smallest=math.nan, mcnemar=tests,
    )  # fmt: skip
    return compared, found


def _paired(metric: str, a: list[Run], b: list[Run], resamples: Resamples) -> tuple[MeanEstimate, tuple[float, ...]]:
    """The difference of runs of the same seeds, and McNemar's p of each seed."""
    of_a, of_b = (np.array([run.selected for run in runs]) for runs in (a, b))
    difference = evened(of_a - of_b, float(np.abs([of_a, of_b]).max()))
    scores = resamples.of([*a, *b])
    if scores is None:
        return mean_estimate(difference), ()
    both = mean_estimate(difference, scores[:, : len(a)] - scores[:, len(a) :], _rows(a[0]))
    split = a[0].reported
    if metric not in COUNTS or split is None or not by_rows(metric, split.labels):
        return both, ()
    return both, tuple(mcnemar(_right(x), _right(y)) for x, y in zip(a, b, strict=True))


def _rows(run: Run) -> int:
    split = run.reported
    return 0 if split is None else len(split.labels)


def _right(run: Run) -> Array:
    """(rows,): whether the run predicts the label."""
    split = run.reported
    assert split is not None
    return np.asarray(split.logits.argmax(1) == split.labels)
