"""A study as it lies on disk: study.json names every scheduled run, and the runs lie in a store by their address.

STUDY/study.json            name, definition, scheduled runs (under the key "planned")
STUDY/predictions.safetensors.gz   of its reported runs, if it packs them
STORE/ADDRESS/              a run folder; STORE is runs/store unless the study says otherwise
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loralab.disk import read_header, read_tensors
from loralab.errors import UserError
from loralab.run.folder import FAILED
from loralab.run.records import collapsed, predictions_of, read_facts, read_history, read_result
from loralab.schema import MOST, part_problems, problems
from loralab.study.packed import PREDICTIONS, Packed

Array = NDArray[Any]
Key = tuple[str, str, str]  # task, model, label of the method
Role = Literal["tune", "final"]


@dataclass(frozen=True)
class ScheduledRun:
    """A run that a study wants."""

    task: str
    model: str
    method: str  # its label
    seed: int
    role: Role  # tune runs choose, final runs are reported
    settings: Mapping[str, Any] | None  # flags of `loralab train`; None while tuning has not chosen them
    address: str | None  # None as long as the settings are
    tried: Mapping[str, Any]  # what tuning varies, and its value in this run
    rung: str | None = None  # of halving: 1, 2, or extension

    @property
    def key(self) -> Key:
        return self.task, self.model, self.method


STUDY = {  # fields of study.json
    "name": str, "about": str, "store": str, "definition": dict[str, Any], "notes": list[str], "question": str | None,
    "dtype": str | None,
    "compare": {"alpha": float, "margin": {"default": float}, "against": str | None},
    "planned": list[Any],
}  # fmt: skip
SCHEDULED = {  # fields of a run in it
    "task": str, "model": str, "method": str, "seed": int, "role": Role, "settings": dict[str, Any] | None,
    "address": str | None, "tried": dict[str, Any],
}  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """Outputs of a run for every row of a split, at its selected epoch."""

    logits: Array  # (rows, outputs) float32
    labels: Array  # (rows,)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    scheduled: ScheduledRun
    folder: Path
    result: dict[str, Any]  # result.json
    history: list[dict[str, Any]]  # metrics.jsonl, a row an epoch
    facts: dict[str, Any]  # run.json
    packed: Packed | None = None  # where a study keeps the predictions of its runs in one file

    @property
    def seed(self) -> int:
        return self.scheduled.seed

    @property
    def selected(self) -> float:
        return float(self.result["metric"]["selected"])

    @property
    def inflation(self) -> float:
        """What choosing the epoch on the reported split would have added; nan where it was read once."""
        return number(self.result["metric"]["best_on_validation"]) - self.selected

    @cached_property
    def predictions(self) -> dict[str, Predictions] | None:
        """By validation split, the reported one first; None where a run did not keep them."""
        file = self.folder / PREDICTIONS
        if file.is_file():
            tensors = read_tensors(file)
        elif self.packed is not None:
            tensors = self.packed.of(str(self.scheduled.address))
        else:
            return None
        if not (found := predictions_of(tensors, file)):
            return None
        first = next(iter(found)) if len(found) == 1 else "validation_matched"  # MNLI alone has two
        order = sorted(found, key=lambda split: (split != first, split))
        return {split: Predictions(*(t.numpy() for t in found[split])) for split in order}

    @property
    def reported(self) -> Predictions | None:
        """The predictions of the split that is reported."""
        return next(iter(self.predictions.values())) if self.predictions else None


@dataclass(frozen=True)
class Cell:
    """One method on one task and model."""

    key: Key
    runs: tuple[Run, ...]  # finished final runs, by seed
    tuning: tuple[Run, ...]  # finished tuning runs
    trials: int  # tuning runs begun: finished, failed or pruned
    tuning_collapsed: int  # of the finished ones: those that predict the same for every row
    pending: int  # final runs that are planned, not finished and not failed
    failed: tuple[str, ...]  # why the failed ones did

    @property
    def metric(self) -> str | None:
        return str(self.runs[0].result["metric"]["name"]) if self.runs else None

    @property
    def scores(self) -> Array:
        """(seeds,): the selected score of every finished run."""
        return np.array([run.selected for run in self.runs])

    @property
    def inflation(self) -> Array:
        """(seeds,): best on validation minus selected."""
        return np.array([run.inflation for run in self.runs])


@dataclass(frozen=True)
class Study:
    """What study.json holds, and the runs of the store that belong to it."""

    folder: Path
    name: str
    about: str
    store: Path
    definition: dict[str, Any]  # the study as it was asked for, flags included
    compare: dict[str, Any]  # alpha, margin by metric, against: a label or None for all pairs
    schedule: tuple[ScheduledRun, ...]
    notes: tuple[str, ...]  # what a reader should know: unequal budgets, optimistic selection, pruned trials
    question: str | None = None  # hash of what a registered study asks
    dtype: str | None = None  # of products, in runs that leave it to the machine

    def run(self, scheduled: ScheduledRun) -> Run | None:
        """The finished run, or None."""
        run = read_run(self.store, scheduled)
        return None if run is None else replace(run, packed=self.packed)

    @cached_property
    def packed(self) -> Packed | None:
        """The predictions that the study keeps in one file, if it does."""
        return Packed.read(self.folder)

    def cells(self) -> dict[Key, Cell]:
        """By (task, model, label), in the order of the study."""
        found: dict[Key, list[ScheduledRun]] = {}
        for scheduled in self.schedule:
            found.setdefault(scheduled.key, []).append(scheduled)
        return {key: self._cell(key, own) for key, own in found.items()}

    def _cell(self, key: Key, own: list[ScheduledRun]) -> Cell:
        final = [s for s in own if s.role == "final"]
        runs = [run for s in final if (run := self.run(s))]
        failed = [why for s in final if (why := failure(self.store, s))]
        tuning = [run for s in own if s.role == "tune" and (run := self.run(s))]
        trials = sum(s.address is not None and (self.store / s.address).is_dir() for s in own if s.role == "tune")
        pending = len(final) - len(runs) - len(failed)
        lost = sum(map(collapses, tuning))
        by_seed = tuple(sorted(runs, key=lambda run: run.seed))
        return Cell(key, by_seed, tuple(tuning), trials, lost, pending, tuple(failed))


def number(value: float | None) -> float:
    """A number of a result; nan for one that is not known."""
    return math.nan if value is None else float(value)


def collapses(run: Run) -> bool:
    """Whether a run predicts the same for every row: of the held-out ones if it tunes, else of the reported ones."""
    return collapsed(run.result, held_out=run.scheduled.role == "tune")


def read_run(store: Path, scheduled: ScheduledRun) -> Run | None:
    """The finished run of the store, or None."""
    if scheduled.address is None or not (store / scheduled.address / "result.json").is_file():
        return None
    folder = store / scheduled.address
    return Run(scheduled, folder, read_result(folder), read_history(folder), read_facts(folder))


def failure(store: Path, scheduled: ScheduledRun) -> str | None:
    """Why a run cannot finish, if it was found that it cannot."""
    if scheduled.address is None:
        return None
    file = store / scheduled.address / FAILED
    finished = (store / scheduled.address / "result.json").is_file()
    return str(read_header(file).get("error", "unknown")) if file.is_file() and not finished else None


def done(store: Path, scheduled: ScheduledRun) -> bool:
    """Whether there is nothing left to do for a run."""
    if scheduled.address is None:
        return False
    return (store / scheduled.address / "result.json").is_file() or bool(failure(store, scheduled))


def load(folder: Path | str) -> Study:
    """The study of a folder that `loralab study` wrote. Raises UserError for a folder without one, or a damaged one."""
    folder = Path(folder)
    if not (folder / "study.json").is_file():
        raise UserError(f"{folder} holds no study.json: expected the --out of a `loralab study`")
    data = read_study(folder)
    try:
        schedule = tuple(ScheduledRun(**entry) for entry in data.pop("planned"))
        notes = tuple(data.pop("notes"))
        return Study(folder=folder, schedule=schedule, notes=notes, store=_store(folder, data.pop("store")), **data)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'study.json'}: {error}; it may come from another version: run the study again"
        ) from error


def read_study(folder: Path) -> dict[str, Any]:
    """What study.json holds, checked; {} where there is none. Raises UserError for one that is damaged."""
    file = folder / "study.json"
    if not file.is_file():
        return {}
    data = read_header(file)
    wrong = part_problems(data, STUDY, optional=("question", "dtype")) or problems(
        data["compare"]["margin"], dict[str, float], "compare.margin"
    )
    for place, entry in enumerate(data["planned"] if not wrong else ()):
        wrong += part_problems(entry, SCHEDULED, f"planned[{place}]")
    if wrong:
        raise UserError(
            f"{file} is damaged or of another version: {'; '.join(wrong[:MOST])}: put it back as it was, or remove it, "
            "and the same `loralab study` goes on with the runs of its store"
        )
    return data


def _store(folder: Path, named: str) -> Path:
    """A store that is named relative to the study moves with it."""
    return Path(named) if Path(named).is_absolute() else (folder / named).resolve()
