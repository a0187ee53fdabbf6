"""All that a run needs before its first step: the task, the model with its adapter, and tokenized rows."""

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn

import loralab
from loralab import data, models
from loralab.adapters import Adapters, attach
from loralab.data import Task
from loralab.data.batches import Rows, collate, encode, epoch_batches, longest
from loralab.errors import UserError
from loralab.fast.machine import hardware
from loralab.recipe import to_json
from loralab.run.policies import Work, planned
from loralab.run.settings import SOURCE, Settings

SEEN = 1024  # training rows are plenty for the directions of a few thousand inputs, and one look takes seconds


@dataclass(frozen=True)
class Run:
    """The parts of a run; nothing here changes while it trains but the tensors inside `model`."""

    name: str  # of its adapter in `model`, which other runs may share
    settings: Settings
    task: Task
    model: nn.Module
    tokenizer: Any
    adapters: Adapters
    train: Rows
    held_out: Rows | None
    validation: dict[str, Rows]
    notes: tuple[str, ...]
    plan: dict[str, Any] | None = None  # what made the rank map before the run, and what that cost

    @property
    def regression(self) -> bool:
        return self.task.labels is None

    @property
    def adapter_name(self) -> str:
        """What the saved adapter is called."""
        return "".join(char if char.isalnum() or char in "-_" else "-" for char in self.task.name)


def prepare(settings: Settings) -> Run:
    """Loads everything and attaches the adapter; raises UserError before anything is written."""
    return prepare_together([settings])[0]


def prepare_together(many: Sequence[Settings]) -> list[Run]:
    """Runs over one model: an adapter each, and the head that it would have alone (see together.py for which may)."""
    runs: list[Run] = []
    known: dict[Any, Any] = {}  # runs share what they read
    for place, settings in enumerate(many):
        runs.append(_prepare(settings, f"run-{place}", runs[0].adapters if runs else None, known))
    return runs


def _prepare(settings: Settings, name: str, shared: Adapters | None, known: dict[Any, Any]) -> Run:
    """A run on a model of its own, or on the one that has the adapters `shared`."""
    recipe = settings.recipe()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = _task(settings, known)
    model, tokenizer = _model(settings, task)
    _check_same_base(model, settings, known)
    rows, notes = _rows(settings, task, model, tokenizer, known)
    labels, train = task.labels or ("score",), rows["train"]

    def seen() -> Iterator[dict[str, Tensor]]:
        return _seen(train, settings, tokenizer)

    data = (train, task.sha256, labels)
    recipe, plan = planned(Work(settings, recipe, *data, tokenizer, lambda: _model(settings, task)[0], seen))
    recipe = recipe.for_steps(settings.steps(len(train)))
    given: dict[str, Any] = {"targets": settings.targets, "labels": labels, "seed": settings.seed, "batches": seen()}
    if shared is None:
        shared = attach(model, recipe, name=name, head=True, **given)
    else:
        shared.add(name, recipe, head=True, heads_of=model, **given)
    notes += [] if plan is None else [f"policy {recipe.policy} gave {recipe.ranks}"]
    validation = {key: rows[key] for key in task.validation}
    parts = (settings, task, shared.model, tokenizer, shared, train, rows.get("held-out"), validation)
    return Run(name, *parts, tuple(notes), plan)


def _check_same_base(model: Any, settings: Settings, known: dict[Any, Any]) -> None:
    """A checkpoint may lack a pooler, which is then drawn with the head, from the seed."""
    prefix = f"{model.base_model_prefix}.pooler."
    pooler = {key: t.detach().clone() for key, t in model.named_parameters() if key.startswith(prefix)}
    first = known.setdefault("pooler", pooler)
    if new := [key for key, t in pooler.items() if not torch.equal(first[key], t)]:
        raise UserError(f"{settings.model} has no {new[0]} of its own, so runs of other seeds have other bases")


def _task(settings: Settings, known: dict[Any, Any]) -> Task:
    key = settings.only(SOURCE)
    if key not in known:
        known[key] = task_of(settings)
    return known[key]  # type: ignore[no-any-return]


def task_of(s: Settings) -> Task:
    """The task that a run's settings name."""
    regression = None if s.problem_type == "auto" else s.problem_type == "regression"
    return data.load(s.task, s.data, text=s.text, label=s.label, validation=s.validation, regression=regression)


def _rows(
    settings: Settings, task: Task, model: Any, tokenizer: Any, known: dict[Any, Any]
) -> tuple[dict[str, Rows], list[str]]:
    """(rows of each split as tokens, notes)."""
    most = longest(model)
    if most is not None and settings.max_length > most:
        raise UserError(f"--max-length {settings.max_length}: {settings.model} takes {most} tokens at most")
    key = (id(task), settings.selection, settings.max_length, settings.train_rows, settings.validation_rows)
    if key not in known:
        found, sizes = splits(task, settings)
        regression = task.labels is None
        rows = {name: encode(split, tokenizer, settings.max_length, regression) for name, split in found.items()}
        over = f"rows are longer than {settings.max_length} tokens and were cut"
        cut = [f"{r.truncated} of {len(r)} {name} {over}" for name, r in rows.items() if r.truncated]
        known[key] = rows, [*task.notes, *sizes, *cut]
    rows, notes = known[key]
    return rows, list(notes)


def _model(settings: Settings, task: Task) -> tuple[Any, Any]:
    """(model, tokenizer), the model as a run begins with it."""
    regression = task.labels is None
    wanted = (task.num_outputs, regression, torch.float32, settings.seed, settings.attention)
    model, tokenizer = models.classifier(settings.model, *wanted)
    if regression:
        _center(model, sum(task.train.labels) / len(task.train))
    return model, tokenizer


def splits(task: Task, settings: Settings) -> tuple[dict[str, data.Split], list[str]]:
    """(train, held-out where that selects, and each validation split; notes)."""
    notes: list[str] = []

    def some(name: str, split: data.Split, rows: int | None) -> data.Split:
        if rows is None or rows >= len(split):
            return split
        notes.append(f"{name}: {rows} of {len(split)} rows, drawn by the data's hash")
        return split.take(data.sample(split, task.sha256, task.labels is not None, rows))

    held: dict[str, data.Split] = {}
    train = task.train
    if settings.selection == "held-out":
        kept, out = data.held_out(train, task.sha256, task.labels is not None)
        train, held = train.take(kept), {"held-out": train.take(out)}
    elif settings.selection == "validation":
        notes.append("validation: chosen on the reported split, so results are optimistic")
    reported = {name: some(name, split, settings.validation_rows) for name, split in task.validation.items()}
    return {"train": some("train", train, settings.train_rows), **held, **reported}, notes


def _seen(rows: Rows, settings: Settings, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """What a start that looks at data sees: batches of the first epoch, of SEEN training rows in all."""
    batches = epoch_batches(rows.lengths, settings.batch_size, settings.seed, 0)
    for chosen in batches[: math.ceil(SEEN / settings.batch_size)]:
        yield collate(rows, chosen, tokenizer, torch.device("cpu"))


def _center(model: Any, mean: float) -> None:
    """Starts a regression head at the mean label; from 0 the first steps push the mean through the whole network,
    which at LoRA's learning rates ruins it (docs/decisions.md)."""
    outputs = [
        m for child in model.children() for m in child.modules() if isinstance(m, nn.Linear) and m.out_features == 1
    ]
    if outputs and outputs[-1].bias is not None:
        nn.init.constant_(outputs[-1].bias, mean)


def facts(run: Run) -> dict[str, Any]:
    """What run.json holds: everything needed to repeat the run and to tell on what it ran."""
    entry = run.adapters.spec(run.name)
    return {
        "settings": run.settings.to_json(),
        "recipe": to_json(entry.recipe),
        "plan": run.plan,
        "seed": run.settings.seed,
        "versions": {
            "loralab": loralab.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "hardware": hardware(),
        "precision": str(run.settings.precision).removeprefix("torch."),
        "data": {"sha256": run.task.sha256, "train": len(run.train), "held_out": len(run.held_out or ()),
                 **{key: len(rows) for key, rows in run.validation.items()}},
        "base_sha256": run.adapters.base_sha256,
        "counts": run.adapters.counts(run.name),
        "coverage": {key: len(paths) for key, paths in entry.coverage.matched.items()} if entry.coverage else {},
        "notes": list(run.notes),
    }  # fmt: skip
