"""A study from its definition to its last run: tune, choose, run, and write down what there is after every stage.

A stage is a task of a model, or everything for a runner that wants all it can get. Nothing is kept in memory between
stages: the store says what is done, so an interrupted study goes on with the same command.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import UserError
from loralab.run import Settings
from loralab.run.folder import write_json
from loralab.study import search
from loralab.study.address import data
from loralab.study.bar import StudyBar
from loralab.study.definition import Definition
from loralab.study.plan import Point, blocks, notes, plan, points
from loralab.study.record import FAILED, Planned, Role, Study, failure, load
from loralab.study.runners import Runner
from loralab.study.runners.one import run as run_one


def conduct(definition: Definition, folder: Path, runner: Runner, bar: StudyBar, retry: bool = False) -> Study:
    """Runs what is not done yet; the study as it lies in `folder` then."""
    check_folder(folder)
    planned = plan(definition)
    if retry:
        _forget_failures(definition, planned)
    write(definition, folder, planned)
    todo = [p for p in planned if not done(definition.store, p)]
    rows = _rows(definition)
    bar.open(definition.name, len(planned), len(planned) - len(todo), sum(rows[p.key] for p in todo))
    try:
        for stage in [list(points(definition))] if runner.wide else blocks(definition):
            for role in ("tune", "final"):
                _stage(definition, stage, role, runner, bar, rows)
                write(definition, folder, plan(definition))
    finally:
        bar.close()
    return load(folder)


def _stage(
    definition: Definition, stage: list[Point], role: Role, runner: Runner, bar: StudyBar, rows: dict[Any, float]
) -> None:
    if role == "tune" and definition.tune.search == "optuna":
        for point in stage:
            _search(point, bar, rows[point.key])
        return
    keys = {point.key: point for point in stage}
    todo: dict[str, Planned] = {}
    for p in plan(definition):
        if p.role == role and p.key in keys and p.address and not done(definition.store, p):
            todo.setdefault(p.address, p)  # two cells may want one run
    bar.labels |= {address: label(p) for address, p in todo.items()}
    runs = [keys[p.key].settings(role, p.seed, p.tried) for p in todo.values()]
    for settings, outcome in runner.run(runs, bar, definition.adapters):
        bar.finished(settings, outcome, rows[todo[settings.folder.name].key])


def _search(point: Point, bar: StudyBar, rows: float) -> None:
    def run(settings: Settings, trial: Any, tried: Mapping[str, Any]) -> None:
        bar.labels[settings.folder.name] = label(point.planned("tune", settings.seed, tried))
        bar.begin(settings, trial)
        try:
            bar.finished(settings, run_one(settings, bar, point.definition.adapters), rows)
        except search.Pruned as pruned:
            bar.finished(settings, pruned, rows)
            raise

    if point.grid:
        search.replay(point, run)


def label(p: Planned) -> str:
    task, model, method = p.key
    tried = "".join(f" {key}={value}" for key, value in p.tried.items()) if p.role == "tune" else ""
    return f"{task} {Path(model).name} {method} seed {p.seed}{tried}" + " (tuning)" * (p.role == "tune")


def done(store: Path, p: Planned) -> bool:
    """Whether there is nothing left to do for it."""
    return p.address is not None and ((store / p.address / "result.json").is_file() or bool(failure(store, p)))


def _rows(definition: Definition) -> dict[Any, float]:
    """Training rows times epochs of a run of each cell."""
    found = {}
    for point in points(definition):
        settings = definition.settings(point.task, point.model, point.method, definition.seeds[0], {})
        found[point.key] = float(settings.epochs * (settings.train_rows or data(settings).train or 1))
    return found


def _forget_failures(definition: Definition, planned: list[Planned]) -> None:
    for p in planned:
        if failure(definition.store, p):
            (definition.store / str(p.address) / FAILED).unlink()


def check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file, expected a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "study.json").is_file():
        raise UserError(f"--out {folder} holds other files: choose an empty or a new folder")


def write(definition: Definition, folder: Path, planned: list[Planned]) -> None:
    """study.json."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = json_of(definition)
    content = {
        "name": definition.name,
        "about": definition.about,
        "store": os.path.relpath(definition.store.absolute(), folder.absolute()),
        "definition": kept,
        "compare": kept["compare"],
        "notes": notes(definition),
        "planned": [{**dataclasses.asdict(p), "settings": p.settings} for p in planned],
    }
    write_json(folder / "study.json", content)


def json_of(value: Any) -> Any:
    """Dataclasses as tables, paths as texts."""
    if dataclasses.is_dataclass(value):
        return {f.name: json_of(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: json_of(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [json_of(x) for x in value]
    return str(value) if isinstance(value, Path) else value
