"""All that a run needs before its first step: the task, the model with its adapter, and tokenized rows."""

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn

import loralab
from loralab import models, tasks
from loralab.attach import Adapters, attach
from loralab.errors import UserError
from loralab.recipe import to_json
from loralab.tasks import Task
from loralab.train.batches import Rows, collate, encode, epoch_batches, longest
from loralab.train.plan import Work, planned
from loralab.train.settings import Settings

SEEN = 1024  # training rows are plenty for the directions of a few thousand inputs, and one look takes seconds


@dataclass(frozen=True)
class Run:
    """The parts of a run; nothing here changes while it trains but the tensors inside `model`."""

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


def prepare(settings: Settings) -> Run:
    """Loads everything and attaches the adapter; raises UserError before anything is written."""
    recipe = settings.recipe()
    given = None if settings.problem_type == "auto" else settings.problem_type == "regression"
    own: dict[str, Any] = {"text": settings.text, "label": settings.label, "validation": settings.validation}
    task = tasks.load(settings.task, settings.data, **own, regression=given)
    regression = task.labels is None
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, tokenizer = _model(settings, task)
    most = longest(model)
    if most is not None and settings.max_length > most:
        raise UserError(f"--max-length {settings.max_length}: {settings.model} takes {most} tokens at most")
    train, held_out, sizes = _splits(task, settings)
    splits = {"train": train, **({"held-out": held_out} if held_out else {}), **task.validation}
    rows = {key: encode(split, tokenizer, settings.max_length, regression) for key, split in splits.items()}
    labels = task.labels or ("score",)

    def seen() -> Iterator[dict[str, Tensor]]:
        return _seen(rows["train"], settings, tokenizer)

    data = (rows["train"], task.sha256, labels)
    recipe, plan = planned(Work(settings, recipe, *data, tokenizer, lambda: _model(settings, task)[0], seen))
    adapters = attach(
        model,
        recipe.planned(settings.steps(len(train))),
        name=_adapter_name(task.name),
        targets=settings.targets,
        head=True,
        labels=labels,
        seed=settings.seed,
        batches=seen(),
    )
    cut = {key: r for key, r in rows.items() if r.truncated}
    over = f"rows are longer than {settings.max_length} tokens and were cut"
    planning = [] if plan is None else [f"plan {recipe.plan} gave {recipe.ranks}"]
    notes = [*task.notes, *sizes, *planning, *(f"{r.truncated} of {len(r)} {key} {over}" for key, r in cut.items())]
    validation = {key: rows[key] for key in task.validation}
    return Run(
        settings, task, model, tokenizer, adapters, rows["train"], rows.get("held-out"), validation, tuple(notes), plan
    )


def _model(settings: Settings, task: Task) -> tuple[Any, Any]:
    """(model, tokenizer), the model as a run begins with it."""
    regression = task.labels is None
    model, tokenizer = models.classifier(settings.model, task.num_outputs, regression, torch.float32, settings.seed)
    if regression:
        _center(model, sum(task.train.labels) / len(task.train))
    return model, tokenizer


def _splits(task: Task, settings: Settings) -> tuple[tasks.Split, tasks.Split | None, list[str]]:
    """(train, held out or None, notes)."""
    if settings.selection != "held-out":
        note = "validation: chosen on the reported split, so results are optimistic"
        return task.train, None, [note] if settings.selection == "validation" else []
    kept, held = tasks.held_out(task.train, task.sha256, task.labels is not None)
    return task.train.take(kept), task.train.take(held), []


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


def _adapter_name(task: str) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in task)


def facts(run: Run) -> dict[str, Any]:
    """What run.json holds: everything needed to repeat the run and to tell on what it ran."""
    coverage = run.adapters.entry(None).coverage
    return {
        "settings": run.settings.to_json(),
        "recipe": to_json(run.adapters.entry(None).recipe),
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
        "counts": run.adapters.counts(),
        "coverage": {} if coverage is None else {key: len(paths) for key, paths in coverage.matched.items()},
        "notes": list(run.notes),
    }  # fmt: skip


def hardware() -> dict[str, Any]:
    cpu = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return {"machine": platform.machine(), "cpu": cpu, "amx": amx, "threads": torch.get_num_threads(), "gpu": gpu}
