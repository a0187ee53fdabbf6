"""The numbers of a report before they are formatted: a result for each cell of a study, and the comparisons of cells.

`read` takes a study, or any folder in which runs lie, as a study of its own. Runs of a plain folder that differ in
nothing but the seed are one cell. What else differs is in the cell's label, so no two settings are mixed; runs on other
rows of a task, or over another base of that name, are not compared at all.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from loralab.disk import read_header
from loralab.errors import UserError
from loralab.run import Settings
from loralab.run.records import read_facts, read_result
from loralab.study import Cell, Comparison, Run, ScheduledRun, Study, Summary, comparisons, load, summaries
from loralab.study.definition import MARGIN, Compare
from loralab.study.statistics import PlannedFamily, planned
from loralab.study.statistics.contrasts import MIRRORED

K = TypeVar("K")
COMPARE = {"alpha": Compare.alpha, "margin": {"default": MARGIN}, "against": Compare.against}
DEFAULTS = {f.name: f.default for f in dataclasses.fields(Settings)}
# settings that are not in a label: the cell has them, or they do not change the result
UNLABELLED = (
    "task", "model", "method", "seed", "data", "validation", "threads", "track", "checkpoint_every", "device",
    "licence",
)  # fmt: skip
COSTS = ("time", "train_s"), ("time", "examples_per_s"), ("memory", "peak_bytes")  # of result.json
REFERENCES = ("full", "lora")  # what others are compared with where a study does not say

# ---- reading ---------------------------------------------------------------------------------------------------------

FoundRun = tuple[str, dict[str, Any], dict[str, Any]]  # address, result.json, run.json


def read(folder: Path | str) -> Study:
    """The study of a folder, or one made of the runs in it. Raises UserError where there is no finished run."""
    folder = Path(folder)
    if (folder / "study.json").is_file():
        return load(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected a study, or a folder with runs of `loralab train`")
    found = [run for file in sorted(folder.rglob("result.json")) if (run := _run(file, folder))]
    if not found:
        raise UserError(f"{folder} holds no finished run: expected a study, or a folder with runs of `loralab train`")
    schedule, repeats = _schedule(found)
    unfinished = sum(not (file.parent / "result.json").exists() for file in folder.rglob("run.json"))
    counts = {
        "{} with the settings and the seed of another run, which alone is counted": repeats,
        "{} not finished, and not counted": unfinished,
    }
    notes = tuple(note.format(f"{count} run" + "s" * (count > 1)) for note, count in counts.items() if count)
    about = "Runs of a folder. They were not planned as one study, so nothing shows that their tuning was equal."
    return Study(folder, folder.resolve().name, about, folder, {}, dict(COMPARE), tuple(schedule), notes)


def _run(file: Path, folder: Path) -> FoundRun | None:
    """The run of a result file, or None: other tools write files of that name too."""
    if not file.with_name("run.json").is_file():
        return None
    if not {"task", "model", "method", "seed", "metric"} <= read_header(file).keys():
        return None
    return str(file.parent.relative_to(folder)), read_result(file.parent), read_facts(file.parent)


def _schedule(found: Sequence[FoundRun]) -> tuple[list[ScheduledRun], int]:
    """The runs as a study would name them, and how many repeat another."""
    tasks = dict(_named("task", "data", found))
    models = dict(_named("model", "base", found))
    groups: dict[tuple[str, str, str], list[FoundRun]] = {}
    for run in found:
        groups.setdefault((tasks[run[0]], models[run[0]], run[1]["method"]), []).append(run)
    schedule: dict[tuple[str, str, str, int], ScheduledRun] = {}
    for (task, model, method), runs in groups.items():
        settings = [DEFAULTS | facts.get("settings", {}) for _, _, facts in runs]
        keys = differing(settings)
        for (address, result, _), own in zip(runs, settings, strict=True):
            label = " ".join(filter(None, [method, named_settings(own, keys)]))
            scheduled = ScheduledRun(task, model, label, result["seed"], "final", own, address, {})
            schedule.setdefault((*scheduled.key, scheduled.seed), scheduled)
    return list(schedule.values()), len(found) - len(schedule)


def _named(key: str, of: str, found: Sequence[FoundRun]) -> Iterator[tuple[str, str]]:
    """Address -> name, with the start of a hash where one name stands for several things."""
    hashes = {address: _hash(of, facts) for address, _, facts in found}
    several = {
        name for name in {result[key] for _, result, _ in found}
        if len({hashes[address] for address, result, _ in found if result[key] == name}) > 1
    }  # fmt: skip
    for address, result, _ in found:
        name = result[key]
        yield address, f"{name} ({of} {hashes[address][:6]})" if name in several else name


def _hash(of: str, facts: Mapping[str, Any]) -> str:
    data = facts.get("data", {})
    return str({"data": data.get("sha256"), "base": facts.get("base_sha256")}[of])


def differing(settings: Sequence[Mapping[str, Any]], leave: Sequence[str] = UNLABELLED) -> list[str]:
    """The settings that are not the same everywhere, without those of `leave`."""
    keys = [key for key in dict.fromkeys(k for s in settings for k in s) if key not in leave]
    return [key for key in keys if len({str(s.get(key)) for s in settings}) > 1]


def named_settings(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """lr=0.002 rank=default, of those keys."""
    return " ".join(f"{key}={'default' if settings.get(key) is None else settings[key]}" for key in keys)


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a cell costs; `_sd` is the standard deviation over seeds, nan with one.

    Of runs that shared passes, seconds are an equal part of the passes and the peak is that of all. Only `step_bytes`,
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
        """(task, model)."""
        return self.cell.key[:2]

    @property
    def label(self) -> str:
        return self.cell.key[2]

    @property
    def optimistic(self) -> bool:
        return self.selection == "validation"


@dataclass(frozen=True)
class Findings:
    """All that a report is made of."""

    study: Study
    results: list[Result]
    comparisons: list[Comparison]
    waiting: list[Cell]  # without a finished run
    methods: list[str]  # labels, in the order of the study: the order of colours
    planned: list[PlannedFamily]  # none where the study plans no contrasts

    def places(self) -> dict[tuple[str, str], list[Result]]:
        """(task, model) -> its results."""
        return grouped(self.results, lambda r: r.place)

    def models(self) -> dict[str, list[Result]]:
        """Model -> its results, those of a task together."""
        by_model = grouped(self.results, lambda r: r.place[1])
        tasks = list(dict.fromkeys(r.place[0] for r in self.results))
        return {model: sorted(own, key=lambda r: tasks.index(r.place[0])) for model, own in by_model.items()}


def grouped(results: Sequence[Result], key: Callable[[Result], K]) -> dict[K, list[Result]]:
    """Key -> the results that have it, in their order."""
    out: dict[K, list[Result]] = {}
    for result in results:
        out.setdefault(key(result), []).append(result)
    return out


def findings(study: Study) -> Findings:
    """The results and comparisons of a study."""
    cells = study.cells()
    compared = comparisons(study)
    usual = next((r for r in REFERENCES if any(k[2] == r for k in cells)), None)
    reference = study.compare["against"] or study.compare.get("reference") or usual
    results = [_result(cells[s.task, s.model, s.method], s, compared, reference) for s in summaries(study)]
    waiting = [cell for cell in cells.values() if not cell.runs]
    return Findings(study, results, compared, waiting, list(dict.fromkeys(key[2] for key in cells)), planned(study))


def _result(cell: Cell, summary: Summary, compared: Sequence[Comparison], reference: str | None) -> Result:
    label, runs = cell.key[2], cell.runs
    pairs = [c for c in compared if (c.task, c.model) == cell.key[:2] and {c.a, c.b} == {label, reference}]
    comparison = with_first(pairs[0], label) if pairs else None
    rows = summary.rows or int(runs[0].facts.get("data", {}).get("validation", 0))
    selection, start = (", ".join(dict.fromkeys(_protocol(run, key) for run in runs)) for key in ("selection", "start"))
    seeds = tuple(run.seed for run in runs)
    return Result(cell, summary, cost_of(runs), seeds, rows, selection, start, reference if pairs else None, comparison)


def _protocol(run: Run, key: str) -> str:
    return str(run.result.get("protocol", {}).get(key, "unknown"))


def with_first(c: Comparison, label: str) -> Comparison:
    """The comparison with `label` first: mirrored if that method is second."""
    if c.a == label:
        return c
    verdict: Any = MIRRORED.get(c.verdict, c.verdict)
    return replace(c, a=c.b, b=c.a, difference=-c.difference, low=-c.high, high=-c.low, verdict=verdict)


def cost_of(runs: Sequence[Run]) -> Cost:
    """The costs of a cell's runs, as means and standard deviations over seeds."""
    counts = runs[0].result["counts"]
    results = [run.result for run in runs]
    values = [[r[group][key] for r in results] for group, key in COSTS]
    values.append([sum(r["memory"]["ledger"].values()) for r in results])
    means_and_sds = [number for one in values for number in _mean_sd(one)]
    together = max(r["time"].get("together", 1) for r in results)
    return Cost(counts["adapter"], counts["head"], counts["base"], together, *means_and_sds)


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (cost, score): whether no other costs no more and scores no less, one of the two strictly."""
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]


# ---- what a study varied ---------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where a result lies among those of methods that have a rank."""

    rank: int
    targets: str
    method: str
    variant: (
        str  # the other settings that results of one rank and targets differ in, such as lr=0.002; empty if none do
    )


def points(results: Sequence[Result]) -> dict[Point, Result]:
    """Every result whose method has a rank, at a point of its own."""
    ranked = [r for r in results if "rank" in _factors(r)]
    keys: dict[str, list[str]] = {}  # method -> the settings that tell results of one rank and targets apart
    for (_, _, method), same in grouped(ranked, _place).items():
        apart = differing([_settings(r) for r in same], (*UNLABELLED, "rank", "targets"))
        keys[method] = list(dict.fromkeys([*keys.get(method, []), *apart]))
    out: dict[Point, Result] = {}
    for r in ranked:
        rank, targets, method = _place(r)
        point = Point(rank, targets, method, named_settings(_settings(r), keys[method]))
        out[point if point not in out else point._replace(variant=r.label)] = r
    return out


def _place(r: Result) -> tuple[int, str, str]:
    """(rank, targets, method)."""
    settings = _settings(r)
    return int(_factors(r)["rank"]), str(settings["targets"]), str(settings["method"])


def _factors(r: Result) -> dict[str, Any]:
    recipe = r.cell.runs[0].facts.get("recipe") or {}
    return dict(recipe.get("factors") or {})


def _settings(r: Result) -> dict[str, Any]:
    given: dict[str, Any] = r.cell.runs[0].facts.get("settings", {})
    return {**DEFAULTS, "targets": "", "method": r.label, **given}


def swept(results: Sequence[Result]) -> list[Result]:
    """Results that vary settings of a method that is there under its own name too."""
    own = {(r.place, r.label) for r in results}
    return [
        r for place in grouped(results, lambda r: r.place).values() for point, r in points(place).items()
        if r.label != point.method and (r.place, point.method) in own
    ]  # fmt: skip
