"""Planned contrasts of a study: each method against its reference, on the mean of tasks first, by task after it.

A run that collapsed (one class for every row) is counted and not averaged in, and its seed leaves the contrast. The
variance of a contrast over seeds is moderated over the family (contrasts.py); the rows' part, where predictions are
known, adds to it: of a mean of T tasks, whose rows are different ones, the sum of the tasks' parts over T squared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loralab.study.record import Array, Cell, Run, Study
from loralab.study.statistics.contrasts import Contrast, contrast, family, moderated
from loralab.study.statistics.estimates import shared_variance
from loralab.study.statistics.table import Resamples, margin_of, places

MEAN = "mean of tasks"
SELECTED = "selected"  # the endpoint that is each task's own metric at the selected epoch


@dataclass(frozen=True)
class PlannedFamily:
    """The contrasts of one question, corrected together by Holm."""

    name: str  # mean of tasks, or by task
    model: str
    endpoint: str
    contrasts: tuple[Contrast, ...]  # by task their method is "METHOD on TASK"
    seeds: tuple[int, ...]  # of each contrast
    collapsed: tuple[int, ...]  # of each contrast: runs of method and reference that learned nothing


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
    by_model: dict[str, dict[str, tuple[list[Cell], Resamples]]] = {}
    for cells, resamples in places(study):
        task, model, _ = cells[0].key
        by_model.setdefault(model, {})[task] = cells, resamples
    found = []
    for model, tasks in by_model.items():
        for endpoint in compare.get("endpoints", (SELECTED,)):
            pairs = {task: own for task, place in tasks.items() if (own := _of_task(*place, reference, endpoint))}
            if compare.get("family", MEAN) == MEAN and pairs:
                found.append(_on_the_mean(pairs, model, endpoint, compare))
            if pairs:
                metrics = {task: str(cells[0].metric) for task, (cells, _) in tasks.items()}
                found.append(_by_task(pairs, metrics, model, endpoint, compare))
    return found


def _of_task(cells: Sequence[Cell], resamples: Resamples, reference: str, endpoint: str) -> dict[str, _Pairs]:
    """Method -> its pairs with the reference; empty where the reference or the endpoint is not there."""
    base = next((cell for cell in cells if cell.key[2] == reference), None)
    if base is None:
        return {}
    return {cell.key[2]: _paired(cell, base, resamples, endpoint) for cell in cells if cell is not base}


def _paired(cell: Cell, base: Cell, resamples: Resamples, endpoint: str) -> _Pairs:
    good, good_base = ({run.seed: run for run in c.runs if not run.result["warnings"]} for c in (cell, base))
    seeds = sorted(good.keys() & good_base.keys())
    scores = {s: (_score(good[s], endpoint), _score(good_base[s], endpoint)) for s in seeds}
    seeds = [s for s in seeds if None not in scores[s]]
    pairs = _Pairs({s: scores[s][0] - scores[s][1] for s in seeds})  # type: ignore[operator]
    pairs.collapsed = len(cell.runs) - len(good) + len(base.runs) - len(good_base)
    if endpoint == SELECTED and len(seeds) > 1:
        replicates = resamples.of([runs[s] for runs in (good, good_base) for s in seeds])  # (times, 2 seeds)
        if replicates is not None:
            pairs.rows = shared_variance(replicates[:, : len(seeds)] - replicates[:, len(seeds) :])
    return pairs


def _score(run: Run, endpoint: str) -> float | None:
    found = run.selected if endpoint == SELECTED else run.result["metrics"].get(endpoint)
    return None if found is None else float(found)


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
    margins = [float(compare["margin"]["default"])] * len(methods)
    made = contrasts_of(methods, differences, rows, margins, compare["alpha"])
    return PlannedFamily(MEAN, model, endpoint, tuple(made), tuple(map(len, differences)), tuple(collapsed))


def _by_task(
    pairs: Mapping[str, Mapping[str, _Pairs]],
    metrics: Mapping[str, str],
    model: str,
    endpoint: str,
    compare: Mapping[str, Any],
) -> PlannedFamily:
    places = [(task, method, p) for task, own in pairs.items() for method, p in own.items()]
    names = [f"{method} on {task}" for task, method, _ in places]
    differences = [np.array(list(p.differences.values())) for _, _, p in places]
    of_task = {task: metrics[task] if endpoint == SELECTED else endpoint for task in pairs}
    margins = [margin_of(compare["margin"], of_task[task]) for task, _, _ in places]
    made = contrasts_of(names, differences, [p.rows for _, _, p in places], margins, compare["alpha"])
    collapsed = tuple(p.collapsed for _, _, p in places)
    return PlannedFamily("by task", model, endpoint, tuple(made), tuple(map(len, differences)), collapsed)


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
        [differences[i].var(ddof=1) for i in tested], [len(differences[i]) - 1 for i in tested]
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
