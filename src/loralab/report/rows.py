"""The numbers of a report, a row a cell and a row a comparison, before anyone formats them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from loralab.study import Cell, Comparison, Run, Study, Summary, comparisons, summaries

K = TypeVar("K")
FLIPPED = {"better": "worse", "worse": "better"}
SPREAD = ("time", "train_s"), ("time", "examples_per_s"), ("memory", "peak_bytes")
REFERENCES = ("full", "lora")  # what others are set against where a study does not say


@dataclass(frozen=True)
class Cost:
    """What a cell costs; a spread is the standard deviation over seeds, nan with one.

    Of runs that shared passes, seconds are an equal part of the passes and the peak is that of all: only `step_bytes`,
    the tensors of one run's step by the ledger, is the same alone and in company.
    """

    adapter: int
    head: int
    base: int
    together: int  # the most runs that shared passes with one of these, itself among them
    train_s: float
    train_s_sd: float
    examples_per_s: float
    examples_per_s_sd: float
    peak_bytes: float
    peak_bytes_sd: float
    step_bytes: float
    step_bytes_sd: float

    @property
    def trainable(self) -> int:
        return self.adapter + self.head


@dataclass(frozen=True)
class Result:
    """A cell with all that a reader must know of it."""

    cell: Cell
    summary: Summary
    cost: Cost
    seeds: tuple[int, ...]
    validation_rows: int
    selection: str
    start: str
    against: str | None  # the reference of its task and model, None for the reference itself or where there is none
    comparison: Comparison | None  # with the reference, this method first

    @property
    def place(self) -> tuple[str, str]:
        return self.cell.key[:2]

    @property
    def label(self) -> str:
        return self.cell.key[2]

    @property
    def optimistic(self) -> bool:
        return self.selection == "validation"


@dataclass(frozen=True)
class Findings:
    study: Study
    results: list[Result]
    comparisons: list[Comparison]
    waiting: list[Cell]  # without a finished run
    methods: list[str]  # labels, in the order of the study: the order of colours

    def places(self) -> dict[tuple[str, str], list[Result]]:
        """(task, model) -> its results."""
        return grouped(self.results, lambda r: r.place)

    def models(self) -> dict[str, list[Result]]:
        """Model -> its results, those of a task together."""
        by_model = grouped(self.results, lambda r: r.place[1])
        tasks = list(dict.fromkeys(r.place[0] for r in self.results))
        return {model: sorted(own, key=lambda r: tasks.index(r.place[0])) for model, own in by_model.items()}


def grouped(results: Sequence[Result], key: Callable[[Result], K]) -> dict[K, list[Result]]:
    out: dict[K, list[Result]] = {}
    for result in results:
        out.setdefault(key(result), []).append(result)
    return out


def findings(study: Study) -> Findings:
    cells = study.cells()
    compared = comparisons(study)
    reference = study.compare["against"] or next((r for r in REFERENCES if any(k[2] == r for k in cells)), None)
    results = [_result(cells[s.task, s.model, s.method], s, compared, reference) for s in summaries(study)]
    waiting = [cell for cell in cells.values() if not cell.runs]
    return Findings(study, results, compared, waiting, list(dict.fromkeys(key[2] for key in cells)))


def _result(cell: Cell, summary: Summary, compared: Sequence[Comparison], reference: str | None) -> Result:
    label, runs = cell.key[2], cell.runs
    pairs = [c for c in compared if (c.task, c.model) == cell.key[:2] and {c.a, c.b} == {label, reference}]
    comparison = toward(pairs[0], label) if pairs else None
    rows = summary.rows or int(runs[0].facts.get("data", {}).get("validation", 0))
    selection, start = (", ".join(dict.fromkeys(_protocol(run, key) for run in runs)) for key in ("selection", "start"))
    seeds = tuple(run.seed for run in runs)
    return Result(cell, summary, cost_of(runs), seeds, rows, selection, start, reference if pairs else None, comparison)


def _protocol(run: Run, key: str) -> str:
    return str(run.result.get("protocol", {}).get(key, "unknown"))


def toward(c: Comparison, label: str) -> Comparison:
    """The comparison with `label` first."""
    if c.a == label:
        return c
    verdict: Any = FLIPPED.get(c.verdict, c.verdict)
    return replace(c, a=c.b, b=c.a, difference=-c.difference, low=-c.high, high=-c.low, verdict=verdict)


def cost_of(runs: Sequence[Run]) -> Cost:
    counts = runs[0].result["counts"]
    found = [run.result for run in runs]
    values = [[r[group][key] for r in found] for group, key in SPREAD]
    values.append([sum(r["memory"]["ledger"].values()) for r in found])
    spreads = [number for one in values for number in _mean(one)]
    together = max(r["time"].get("together", 1) for r in found)
    return Cost(counts["adapter"], counts["head"], counts["base"], together, *spreads)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, score): whether no other costs no more and scores no less, one of the two strictly."""
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]


# ---- what a study varied ---------------------------------------------------------------------------------------------

Point = tuple[int, str, str]  # rank, targets, method


def points(results: Sequence[Result]) -> dict[Point, Result]:
    """Where the cells lie whose method has a rank, by the settings of their runs."""
    return {point: r for r in results if (point := _point(r))}


def _point(r: Result) -> Point | None:
    facts = r.cell.runs[0].facts
    factors = (facts.get("recipe") or {}).get("factors") or {}
    settings = facts.get("settings", {})
    if "rank" not in factors:
        return None
    return int(factors["rank"]), str(settings.get("targets", "")), str(settings.get("method", r.label))


def swept(results: Sequence[Result]) -> list[Result]:
    """Cells that only vary the rank or targets of a method that is there under its own name."""
    own = {(r.place, r.label) for r in results}
    return [
        r for place in grouped(results, lambda r: r.place).values() for (_, _, method), r in points(place).items()
        if r.label != method and (r.place, method) in own
    ]  # fmt: skip
