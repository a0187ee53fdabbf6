"""Planned contrasts of a study: each method against its reference, on the mean of tasks first, by task after it.

A run that collapsed (the same prediction for every row) is counted and not averaged in, and its seed leaves the
contrast. The variance of a contrast over seeds is moderated over the family (contrasts.py); the rows' part, where
predictions are known, adds to it: of a mean of T tasks, whose rows are different ones, the sum of the tasks' parts over
T squared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loralab.study.record import Array, Cell, Study, collapses
from loralab.study.statistics.contrasts import Contrast, contrast, family, moderated
from loralab.study.statistics.endpoint import SELECTED, metric_of, value
from loralab.study.statistics.estimates import shared_variance, variance
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


@dataclass
class _Pairs:
    """One method against the reference on one task: what enters a contrast."""

    differences: dict[int, float] = field(default_factory=dict)  # seed -> method - reference
    rows: float = 0.0  # variance that the rows bring to every seed alike
    collapsed: int = 0


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
            if compare.get("family", MEAN) == MEAN and pairs:
                found.append(_on_the_mean(pairs, model, endpoint, compare))
            if pairs:
                metrics = {task: metric_of(cells[0].runs[0], endpoint) for task, cells in tasks.items()}
                found.append(_by_task(pairs, metrics, model, endpoint, compare))
    return found


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
    pairs = _Pairs({s: scores[s][0] - scores[s][1] for s in seeds})  # type: ignore[operator]
    pairs.collapsed = len(cell.runs) - len(good) + len(base.runs) - len(good_base)
    if len(seeds) > 1:
        replicates = resamples.of([runs[s] for runs in (good, good_base) for s in seeds])  # (times, 2 seeds)
        if replicates is not None:
            pairs.rows = shared_variance(replicates[:, : len(seeds)] - replicates[:, len(seeds) :])
    return pairs


def _on_the_mean(
    pairs: Mapping[str, Mapping[str, _Pairs]], model: str, endpoint: str, compare: Mapping[str, Any]
) -> PlannedFamily:
    methods = list(dict.fromkeys(method for own in pairs.values() for method in own))
    differences, rows, collapsed = [], [], []
    for method in methods:
        own = [by_method[method] for by_method in pairs.values() if method in by_method]
        seeds = sorted(set.intersection(*(set(p.differences) for p in own)))
        differences.append(np.array([np.mean([p.differences[s] for p in own]) for s in seeds]))
        rows.append(sum(p.rows for p in own) / len(own) ** 2)
        collapsed.append(sum(p.collapsed for p in own))
    margins = [margin_of(compare["margin"], endpoint)] * len(methods)
    places = [(method, None) for method in methods]
    return _family(MEAN, model, endpoint, places, differences, rows, margins, collapsed, compare["alpha"])


def _by_task(
    pairs: Mapping[str, Mapping[str, _Pairs]],
    metrics: Mapping[str, str],
    model: str,
    endpoint: str,
    compare: Mapping[str, Any],
) -> PlannedFamily:
    found = {(method, task): p for task, own in pairs.items() for method, p in own.items()}
    differences = [np.array(list(p.differences.values())) for p in found.values()]
    margins = [margin_of(compare["margin"], metrics[task]) for _, task in found]
    rows, collapsed = [p.rows for p in found.values()], [p.collapsed for p in found.values()]
    return _family(BY_TASK, model, endpoint, list(found), differences, rows, margins, collapsed, compare["alpha"])


def _family(
    name: str, model: str, endpoint: str, places: Sequence[tuple[str, str | None]], differences: Sequence[Array],
    rows: Sequence[float], margins: Sequence[float], collapsed: Sequence[int], alpha: float,
) -> PlannedFamily:  # fmt: skip
    names = [method if task is None else f"{method} on {task}" for method, task in places]
    made = contrasts_of(names, differences, rows, margins, alpha)
    of_seeds = tuple(math.sqrt(max(c.error**2 - own, 0.0)) for c, own in zip(made, rows, strict=True))
    seeds = tuple(map(len, differences))
    return PlannedFamily(
        name, model, endpoint, tuple(made), seeds, of_seeds, tuple(collapsed), tuple(margins), tuple(places)
    )


def contrasts_of(
    names: Sequence[str],
    differences: Sequence[Array],
    rows: Sequence[float],
    margins: Sequence[float],
    alpha: float,
) -> list[Contrast]:
    """The family of contrasts of (seeds,) differences, with the variance that the rows add to each mean.

    The degrees of freedom are those of the seeds, so that no contrast is surer than its seeds alone make it.
    """
    tested = [i for i, d in enumerate(differences) if len(d) > 1]
    variances, freedom = moderated(
        [variance(differences[i]) for i in tested], [len(differences[i]) - 1 for i in tested]
    )
    made = []
    for i, name in enumerate(names):
        mean = float(differences[i].mean()) if len(differences[i]) else math.nan
        error, df = math.nan, math.nan
        if i in tested:
            place = tested.index(i)
            error, df = math.sqrt(variances[place] / len(differences[i]) + rows[i]), float(freedom[place])
        made.append(contrast(name, mean, error, df, margins[i]))
    return family(made, alpha)
