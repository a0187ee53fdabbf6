"""Run a study from its definition to its last run: tune, choose, run, and write down what there is after every stage.

A stage is a task of a model, or everything for a runner that wants all it can get. Nothing is kept in memory between
stages: the store says what is done, so an interrupted study goes on with the same command.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from loralab.disk import check_output_folder, write_json
from loralab.errors import UserError
from loralab.run import Settings
from loralab.run.folder import FAILED, RunFolder
from loralab.study.address import data
from loralab.study.bar import StudyBar
from loralab.study.definition import Definition
from loralab.study.machine_dtype import check_dtype, machine_dtype
from loralab.study.packed import pack
from loralab.study.record import Role, ScheduledRun, Study, done, failure, load, read_study
from loralab.study.runners import Runner
from loralab.study.schedule import CellSettings, blocks, cells, notes, schedule, tuning
from loralab.study.search import Pruned
from loralab.study.stored import run_stored


def run_study(definition: Definition, folder: Path, runner: Runner, bar: StudyBar, retry: bool = False) -> Study:
    """Run what is not done yet; the study as it lies in `folder` then.

    Raises UserError for a folder of something else, for another question than that of a registered study, and where
    finished runs computed in a dtype that this machine would not take.
    """
    check_study_folder(folder)
    check_question(definition, folder)
    check_dtype(definition, folder)
    scheduled = schedule(definition)
    if retry:
        _forget_failures(definition, scheduled)
    write(definition, folder, scheduled)
    left = [s for s in scheduled if not done(definition.store, s)]
    for s in scheduled:
        if s.address is not None:
            RunFolder(definition.store / s.address).clear()
    rows = _rows(definition)
    bar.open(definition.name, len(scheduled), len(scheduled) - len(left), sum(rows[s.key] for s in left))
    try:
        for stage in [list(cells(definition))] if runner.wide else blocks(definition):
            for role in ("tune", "final"):
                _run_stage(definition, stage, role, runner, bar, rows)
                scheduled = schedule(definition)
                write(definition, folder, scheduled)
                if definition.packed:
                    _pack(definition, folder, scheduled)
    finally:
        bar.close()
    return load(folder)


def _run_stage(
    definition: Definition, stage: list[CellSettings], role: Role, runner: Runner, bar: StudyBar, rows: dict[Any, float]
) -> None:
    if role == "tune" and definition.tune.search == "optuna":
        for cell in stage:
            _search(cell, bar, rows[cell.key])
        return
    by_key = {cell.key: cell for cell in stage}
    tried: set[str] = set()
    while True:  # a rung of halving makes the next one; other roles have one round
        scheduled = schedule(definition)
        left: dict[str, ScheduledRun] = {}
        for s in scheduled:
            if s.role == role and s.key in by_key and s.address and not done(definition.store, s):
                left.setdefault(s.address, s)  # two cells may want one run
        left = {address: s for address, s in left.items() if address not in tried}
        if not left:
            return
        tried |= left.keys()
        bar.runs = len(scheduled)
        bar.labels |= {address: label(s) for address, s in left.items()}
        runs = [by_key[s.key].settings(role, s.seed, s.tried) for s in left.values()]
        for settings, outcome in runner.run(runs, bar, definition.adapters):
            bar.finished(settings, outcome, rows[left[settings.folder.name].key])


def _pack(definition: Definition, folder: Path, scheduled: list[ScheduledRun]) -> None:
    """Predictions of finished reported runs go into the study's file, those of tuning runs go."""
    reported, tuned = (
        {s.address for s in scheduled if s.role == role and s.address and done(definition.store, s)}
        for role in ("final", "tune")
    )
    pack(folder, definition.store, sorted(reported), sorted(tuned - reported))


def _search(cell: CellSettings, bar: StudyBar, rows: float) -> None:
    def run(settings: Settings, trial: Any, scheduled: ScheduledRun) -> None:
        bar.labels[settings.folder.name] = label(scheduled)
        bar.begin(settings, trial)
        try:
            bar.finished(settings, run_stored(settings, bar, cell.definition.adapters), rows)
        except Pruned as pruned:
            bar.finished(settings, pruned, rows)
            raise

    tuning(cell, run)


def label(s: ScheduledRun) -> str:
    """What a reader calls a run."""
    task, model, method = s.key
    tried = "".join(f" {key}={value}" for key, value in s.tried.items()) if s.role == "tune" else ""
    return f"{task} {Path(model).name} {method} seed {s.seed}{tried}" + " (tuning)" * (s.role == "tune")


def _rows(definition: Definition) -> dict[Any, float]:
    """Training rows times epochs of a run of each cell."""
    found = {}
    for cell in cells(definition):
        settings = definition.settings(cell.task, cell.model, cell.method, definition.seeds[0], {})
        found[cell.key] = float(settings.epochs * (settings.train_rows or data(settings).train or 1))
    return found


def _forget_failures(definition: Definition, scheduled: list[ScheduledRun]) -> None:
    for s in scheduled:
        if failure(definition.store, s):
            (definition.store / str(s.address) / FAILED).unlink(missing_ok=True)  # two cells may want one run


# ---- study.json ------------------------------------------------------------------------------------------------------

# of a definition: no part of the question
NOT_ASKED = ("about", "data", "store", "adapters", "packed", "registered", "dtype")


def check_study_folder(folder: Path) -> None:
    """Raise UserError unless a folder is new, empty or a study's; what a killed start left counts as empty."""
    leftovers = {"study.json.tmp"}
    check_output_folder(
        folder, belongs=lambda f: (f / "study.json").is_file() or {entry.name for entry in f.iterdir()} <= leftovers
    )


def question_of(definition: Definition) -> str:
    """The hash of what a study asks: tasks, models, methods, seeds, protocol, tuning and comparison."""
    question = {key: value for key, value in json_of(definition).items() if key not in NOT_ASKED}
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def check_question(definition: Definition, folder: Path) -> None:
    """Raise UserError if a registered study lies in `folder` and asks something else."""
    stored = read_study(folder)
    if stored.get("question") not in (None, question_of(definition)):
        before, now = stored["definition"], json.loads(json.dumps(json_of(definition)))
        changes = [key for key in now if key not in NOT_ASKED and before.get(key) != now[key]]
        raise UserError(
            f"{folder} is a registered study, and its question has changed ({', '.join(changes)}): "
            "put the file back as it was, or ask the new question in another --out"
        )


def write(definition: Definition, folder: Path, scheduled: list[ScheduledRun]) -> None:
    """Write study.json."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = json_of(definition)
    content = {
        "name": definition.name,
        "about": definition.about,
        "store": os.path.relpath(definition.store.absolute(), folder.absolute()),
        "definition": stored,
        "compare": stored["compare"],
        "notes": notes(definition),
        "dtype": machine_dtype(definition),
        **({"question": question_of(definition)} if definition.registered else {}),
        "planned": [{**dataclasses.asdict(s), "settings": s.settings} for s in scheduled],
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
