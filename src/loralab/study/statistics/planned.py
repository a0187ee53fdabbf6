"""Planned contrasts of a study: each method against its reference, on the mean of tasks first, by task after it.

A run that collapsed (the same prediction for every row) is counted and not averaged in, and its seed leaves the
contrast. The variance of a contrast over seeds is moderated over the family (contrasts.py); the rows' part, where
predictions are known, adds to it: of a mean of T tasks, whose rows are different ones, the sum of the tasks' parts over
T squared. A method that has not every task of the mean has no mean: it would be one of other tasks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loralab.study.record import Cell, Study, collapses
from loralab.study.statistics.contrasts import Contrast, paired, signs_agree, with_signs
from loralab.study.statistics.endpoint import SELECTED, metric_of, value
from loralab.study.statistics.estimates import evened, shared_variance
from loralab.study.statistics.resample import RANGES, UNBOUNDED
from loralab.study.statistics.table import Resamples, margin_of, places

MEAN, BY_TASK = "mean of tasks", "by task"


@dataclass(frozen=True)
class PlannedFamily:
    """The contrasts of one question, corrected together by Holm."""

    name: str  # mean of tasks, or by task
    model: str
    endpoint: str
    contrasts: tuple[Contrast, ...]  # by task their method is "METHOD on TASK"
    seeds: tuple[int, ...]  # of each contrast
    errors_of_seeds: tuple[float, ...]  # of each contrast: its standard error without the luck of the rows
    collapsed: tuple[int, ...]  # of each contrast: runs of method and reference that learned nothing
    margins: tuple[float, ...]  # of each contrast
    places: tuple[tuple[str, str | None], ...]  # of each contrast: method, and its task, None for the mean
    rows: tuple[bool, ...]  # of each contrast: whether the luck of the rows is counted, on all its tasks
    tasks: tuple[str, ...]  # those with the endpoint, of which a mean is one


@dataclass
class _Pairs:
    """One method against the reference on one task: what enters a contrast."""

    differences: dict[int, float] = field(default_factory=dict)  # seed -> method - reference
    largest: float = 0.0  # of the scores that they are of
    range: tuple[float, float] = UNBOUNDED  # the values that a difference can have
    rows: float = 0.0  # variance that the rows bring to every seed alike
    known: bool = False  # whether that is known, from predictions
    collapsed: int = 0
    same: bool = False  # whether both are the same runs under two names


def planned(study: Study) -> list[PlannedFamily]:
    """The families that the study's [compare] plans; none without a reference."""
    compare = study.compare
    reference: str | None = compare.get("reference")
    if reference is None:
        return []
    by_model: dict[str, dict[str, list[Cell]]] = {}
    for cells, _ in places(study):
        task, model, _ = cells[0].key
        by_model.setdefault(model, {})[task] = cells
    found = []
    for model, tasks in by_model.items():
        for endpoint in compare.get("endpoints", (SELECTED,)):
            pairs = {task: own for task, cells in tasks.items() if (own := _of_task(cells, reference, endpoint))}
            metrics = {task: metric_of(tasks[task][0].runs[0], endpoint) for task in pairs}
            if compare.get("family", MEAN) == MEAN and pairs:
                found.append(_on_the_mean(pairs, metrics, model, endpoint, compare))
            if pairs:
                found.append(_by_task(pairs, metrics, model, endpoint, compare))
    return found


def remarks(families: Sequence[PlannedFamily], alpha: float) -> list[str]:
    """What a reader of them must know: the tasks of each mean, what does not count the luck of the rows, a check."""
    means: dict[tuple[str, ...], list[str]] = {}
    for f in families:
        if f.name == MEAN:
            means.setdefault(f.tasks, []).append(f"{Path(f.model).name}, {f.endpoint}")
    several = len(means) > 1
    lines = [f"{MEAN}{' of ' * several}{'; '.join(of) * several}: {', '.join(tasks)}" for tasks, of in means.items()]
    tested = [known for f in families for c, known in zip(f.contrasts, f.rows, strict=True) if not math.isnan(c.p)]
    if without := tested.count(False):
        few = f"{without} of {len(tested)}" if without < len(tested) else "all"
        lines.append(
            f"{few} contrasts are over seeds alone, on a task at least: runs kept no predictions of their rows"
        )
    named = [(f"{c.method} ({f.name}, {f.endpoint})", c) for f in families for c in f.contrasts]
    signs = signs_agree(named, alpha)
    return lines if signs is None else [*lines, signs]


def _of_task(cells: Sequence[Cell], reference: str, endpoint: str) -> dict[str, _Pairs]:
    """Method -> its pairs with the reference; empty where the reference or the endpoint is not there."""
    base = next((cell for cell in cells if cell.key[2] == reference), None)
    if base is None or all(value(run, endpoint) is None for run in base.runs):
        return {}
    resamples = Resamples([run for cell in cells for run in cell.runs], endpoint)
    return {cell.key[2]: _paired(cell, base, resamples, endpoint) for cell in cells if cell is not base}


def _paired(cell: Cell, base: Cell, resamples: Resamples, endpoint: str) -> _Pairs:
    good, good_base = ({run.seed: run for run in c.runs if not collapses(run)} for c in (cell, base))
    seeds = sorted(good.keys() & good_base.keys())
    scores = {s: (value(good[s], endpoint), value(good_base[s], endpoint)) for s in seeds}
    seeds = [s for s in seeds if None not in scores[s]]
    low, high = RANGES.get(metric_of(base.runs[0], endpoint), UNBOUNDED)
    largest = max((abs(x) for s in seeds for x in scores[s]), default=0.0)  # type: ignore[arg-type]
    differences = {s: scores[s][0] - scores[s][1] for s in seeds}  # type: ignore[operator]
    pairs = _Pairs(differences, largest, (low - high, high - low))
    pairs.collapsed = len(cell.runs) - len(good) + len(base.runs) - len(good_base)
    pairs.same = [good[s].folder for s in seeds] == [good_base[s].folder for s in seeds]
    if len(seeds) > 1:
        replicates = resamples.of([runs[s] for runs in (good, good_base) for s in seeds])  # (times, 2 seeds)
        if replicates is not None:
            pairs.rows = shared_variance(replicates[:, : len(seeds)] - replicates[:, len(seeds) :])
            pairs.known = True
    return pairs


def _on_the_mean(
    pairs: Mapping[str, Mapping[str, _Pairs]],
    metrics: Mapping[str, str],
    model: str,
    endpoint: str,
    compare: Mapping[str, Any],
) -> PlannedFamily:
    """The margin is that of the metric where all tasks have one, of a mean of several metrics the default."""
    methods = list(dict.fromkeys(method for own in pairs.values() for method in own))
    found = {(method, None): _mean([own.get(method, _Pairs()) for own in pairs.values()]) for method in methods}
    several = set(metrics.values())
    margins = [margin_of(compare["margin"], several.pop() if len(several) == 1 else "default")] * len(methods)
    return _family(MEAN, model, endpoint, found, margins, tuple(pairs), compare["alpha"])


def _mean(own: Sequence[_Pairs]) -> _Pairs:
    """The mean over tasks, of the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(p.differences) for p in own)))
    low, high = (float(np.mean([p.range[end] for p in own])) for end in (0, 1))
    return _Pairs(
        {s: float(np.mean([p.differences[s] for p in own])) for s in seeds},
        max(p.largest for p in own),
        (low, high),
        sum(p.rows for p in own) / len(own) ** 2,
        all(p.known for p in own),
        sum(p.collapsed for p in own),
        all(p.same for p in own),
    )


def _by_task(
    pairs: Mapping[str, Mapping[str, _Pairs]],
    metrics: Mapping[str, str],
    model: str,
    endpoint: str,
    compare: Mapping[str, Any],
) -> PlannedFamily:
    found = {(method, task): p for task, own in pairs.items() for method, p in own.items()}
    margins = [margin_of(compare["margin"], metrics[task]) for _, task in found]
    return _family(BY_TASK, model, endpoint, found, margins, tuple(pairs), compare["alpha"])


def _family(
    name: str, model: str, endpoint: str, found: Mapping[tuple[str, Any], _Pairs], margins: Sequence[float],
    tasks: tuple[str, ...], alpha: float,
) -> PlannedFamily:  # fmt: skip
    names = [method if task is None else f"{method} on {task}" for method, task in found]
    own = list(found.values())
    differences = [evened(np.array(list(p.differences.values())), p.largest) for p in own]
    rows, ranges = [p.rows for p in own], [p.range for p in own]
    tested = [d[:1] if p.same else d for d, p in zip(differences, own, strict=True)]  # of one seed nothing is tested
    made = with_signs(paired(names, tested, margins, alpha, rows=rows, ranges=ranges), tested, alpha)
    of_seeds = tuple(math.sqrt(max(c.error**2 - part, 0.0)) for c, part in zip(made, rows, strict=True))
    return PlannedFamily(
        name, model, endpoint, tuple(made), tuple(map(len, differences)), of_seeds, tuple(p.collapsed for p in own),
        tuple(margins), tuple(found), tuple(p.known for p in own), tasks,
    )  # fmt: skip
