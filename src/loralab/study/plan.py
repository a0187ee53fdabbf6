"""From a definition to runs: which there are, what tuning chose so far, and what is left to do.

Everything is read off the store again each time, so a study needs no memory of its own: what is there is done.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.run import Settings
from loralab.study import search
from loralab.study.address import address
from loralab.study.definition import Definition, Row, trials
from loralab.study.record import Key, Planned, Role, failure, read_run


@dataclass(frozen=True)
class Point:
    """One cell of a study, and how to make a run of it."""

    definition: Definition
    task: Row
    model: str
    method: Row

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
        """Tuning needs held-out rows, also where the reported runs train on all of them."""
        found = self.definition.settings(self.task, self.model, self.method, seed, tried)
        if role == "tune" and found.selection == "last":
            found = replace(found, selection="held-out")
        return replace(found, out=self.store / address(found))

    def planned(self, role: Role, seed: int, tried: Mapping[str, Any] | None) -> Planned:
        known = None if tried is None else self.settings(role, seed, tried)
        flags = None if known is None else known.to_json()
        place = None if known is None else known.folder.name
        return Planned(*self.key, seed, role, flags, place, dict(tried or {}))


@dataclass(frozen=True)
class Tuning:
    """How far the tuning of a cell is."""

    tried: list[Mapping[str, Any] | None]  # None: the search has not come to this trial
    chosen: Mapping[str, Any] | None  # None: not known yet, or nothing worked
    stuck: bool = False  # every trial failed


def points(definition: Definition) -> Iterator[Point]:
    for model in definition.models:
        for task in definition.tasks:
            for method in definition.methods:
                yield Point(definition, task, model, method)


def tuning(point: Point) -> Tuning:
    """What the store says about the tuning of a cell."""
    d = point.definition
    if not point.grid:
        return Tuning([], {})
    if d.tune.search == "optuna":
        state = search.replay(point)
        left = d.tune.trials - len(state.tried)
        return Tuning([*state.tried, *[None] * left], state.chosen, state.stuck)
    tried = trials(point.grid)
    scores: list[float | None] = []
    for at in tried:
        plan = point.planned("tune", d.tune.seed, at)
        run = read_run(point.store, plan)
        scores.append(
            search.WORST
            if failure(point.store, plan)
            else None
            if run is None
            else search.score(run.history, run.result)
        )
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return Tuning([*tried], None)
    stuck = max(known) == search.WORST
    return Tuning([*tried], None if stuck else tried[known.index(max(known))], stuck)


def plan(definition: Definition) -> list[Planned]:
    """Every run, in the order of running: a task's tuning, then its runs seed by seed, so that pairs come early."""
    planned: list[Planned] = []
    for block in blocks(definition):
        states = [(point, tuning(point)) for point in block]
        for point, state in states:
            planned += [point.planned("tune", definition.tune.seed, tried) for tried in state.tried]
        for seed in definition.seeds:
            planned += [point.planned("final", seed, state.chosen) for point, state in states]
    return planned


def blocks(definition: Definition) -> list[list[Point]]:
    """The cells of each model and task."""
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points(definition):
        found.setdefault((point.model, point.task.label), []).append(point)
    return list(found.values())


def notes(definition: Definition) -> list[str]:
    """What a reader of the results must know about how they were made."""
    told = []
    budgets = {method.label: definition.budget(method) for method in definition.methods}
    if len(set(budgets.values())) > 1:
        each = ", ".join(f"{label} {count}" for label, count in budgets.items())
        told.append(f"tuning budgets differ, in runs for each task and model: {each}")
    selection = definition.protocol.get("selection", "held-out")
    if selection == "validation":
        told.append("optimistic: epochs are chosen on the split that is reported")
    for method in definition.methods:
        if own := sorted(set(method.settings) & set(definition.protocol)):
            told.append(f"{method.label} has its own {', '.join(own)}")
    if any(budgets.values()):
        told.append(f"tuned on seed {definition.tune.seed}, chosen on held-out rows")
    return told
