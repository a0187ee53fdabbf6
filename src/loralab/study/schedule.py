"""The schedule of a study: every run that it wants, and what tuning chose so far.

Everything is read off the store again each time, so a study needs no memory of its own: what is there is done.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.errors import UserError
from loralab.run import Settings
from loralab.run.records import read_history
from loralab.study import search
from loralab.study.address import address
from loralab.study.definition import Definition, StudyMethod, StudyTask, grid_points
from loralab.study.halving import halving
from loralab.study.record import Key, Role, ScheduledRun, collapses, failure, read_run
from loralab.study.search import Pruned, TuningState

RunTrial = Callable[[Settings, Any, ScheduledRun], None]  # takes an Optuna trial; raises Pruned


@dataclass(frozen=True)
class CellSettings:
    """One cell of a study, and the settings of its runs."""

    definition: Definition
    task: StudyTask
    model: str
    method: StudyMethod

    @property
    def key(self) -> Key:
        return self.task.label, self.model, self.method.label

    @property
    def grid(self) -> Mapping[str, Any]:
        return self.definition.grid(self.method)

    @property
    def store(self) -> Path:
        return self.definition.store

    def settings(self, role: Role, seed: int, tried: Mapping[str, Any]) -> Settings:
        """Of one run. Tuning needs held-out rows, also where the reported runs train on all of them."""
        found = self.definition.settings(self.task, self.model, self.method, seed, tried)
        if role == "tune" and found.selection == "last":
            found = replace(found, selection="held-out")
        return replace(found, out=self.store / address(found))

    def scheduled(
        self, role: Role, seed: int, tried: Mapping[str, Any] | None, rung: str | None = None
    ) -> ScheduledRun:
        """One run; `tried` is None while tuning has not chosen."""
        if tried is None:
            return ScheduledRun(*self.key, seed, role, None, None, {}, rung)
        settings = self.settings(role, seed, tried)
        return ScheduledRun(*self.key, seed, role, settings.to_json(), settings.folder.name, dict(tried), rung)


def cells(definition: Definition) -> Iterator[CellSettings]:
    """Every cell of the study."""
    for model in definition.models:
        for task in definition.tasks:
            for method in definition.methods:
                yield CellSettings(definition, task, model, method)


def blocks(definition: Definition) -> list[list[CellSettings]]:
    """The cells of each model and task."""
    found: dict[tuple[str, str], list[CellSettings]] = {}
    for cell in cells(definition):
        found.setdefault((cell.model, cell.task.label), []).append(cell)
    return list(found.values())


def schedule(definition: Definition) -> list[ScheduledRun]:
    """Every run, in the order of running: a task's tuning, then its runs seed by seed, so that pairs come early."""
    found: list[ScheduledRun] = []
    for block in blocks(definition):
        states = [(cell, tuning(cell)) for cell in block]
        for cell, state in states:
            found += [cell.scheduled("tune", trial.seed, trial.tried, trial.rung) for trial in state.trials]
        for seed in definition.seeds:
            found += [cell.scheduled("final", seed, state.chosen) for cell, state in states]
    return found


def tuning(cell: CellSettings, run: RunTrial | None = None) -> TuningState:
    """What the store says about the tuning of a cell; `run` runs the trials of a search that are not there yet."""
    tune = cell.definition.tune
    if not cell.grid:
        return TuningState([], {})
    if tune.search == "optuna":
        seed = zlib.crc32(" ".join(cell.key).encode())
        return search.search(
            cell.grid, tune.trials, tune.seed, seed, lambda trial, tried: _outcome(cell, trial, tried, run)
        )
    points = grid_points(cell.grid)
    if tune.search == "halving":
        return halving(
            points,
            tune.seeds,
            lambda point, seed: _score(cell, cell.scheduled("tune", seed, point), alive=True),
            lambda point: can_be(cell, point),
        )
    return search.best_of_grid(
        points, tune.seed, [_score(cell, cell.scheduled("tune", tune.seed, tried)) for tried in points]
    )


def can_be(cell: CellSettings, tried: Mapping[str, Any]) -> bool:
    """Whether a run can have these settings."""
    try:
        cell.settings("tune", cell.definition.tune.seed, tried)
    except UserError:
        return False
    return True


def _outcome(cell: CellSettings, trial: Any, tried: Mapping[str, Any], run: RunTrial | None) -> float | Pruned | None:
    """The outcome of an Optuna trial, from its epochs in the store or, with `run`, from running it."""
    seed = cell.definition.tune.seed
    scheduled, settings = cell.scheduled("tune", seed, tried), cell.settings("tune", seed, tried)
    try:
        for record in read_history(settings.folder):
            search.report(trial, record, settings.epochs, settings.select_by)
        if run is not None and _score(cell, scheduled) is None:
            run(settings, trial, scheduled)
    except Pruned as pruned:
        return pruned
    return _score(cell, scheduled)


def _score(cell: CellSettings, scheduled: ScheduledRun, alive: bool = False) -> float | None:
    """The held-out score of a tuning run, WORST if it failed, or with `alive` collapsed; None if it is not run yet."""
    if failure(cell.store, scheduled):
        return search.WORST
    run = read_run(cell.store, scheduled)
    if run is None:
        return None
    return search.WORST if alive and collapses(run) else search.score(run)


def notes(definition: Definition) -> list[str]:
    """What a reader of the results must know about how they were made."""
    found = []
    budgets = {method.label: definition.budget(method) for method in definition.methods}
    if len(set(budgets.values())) > 1:
        each = ", ".join(f"{label} {count}" for label, count in budgets.items())
        found.append(f"tuning budgets differ, in runs for each task and model: {each}")
    if definition.protocol.get("selection", "held-out") == "validation":
        found.append("optimistic: epochs are chosen on the split that is reported")
    for method in definition.methods:
        if own := sorted(set(method.settings) & set(definition.protocol)):
            found.append(f"{method.label} has its own {', '.join(own)}")
    if any(budgets.values()):
        seeds = definition.tune.seeds
        which = f"seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"
        found.append(f"tuned on {which}, chosen on held-out rows")
    return found
