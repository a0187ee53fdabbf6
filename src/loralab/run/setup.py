"""All that a run needs before its first step: the task, the model with its adapter, and tokenized rows."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loralab import data, models, objectives
from loralab.adapters import Adapters, attach
from loralab.data import Task, checks
from loralab.data.batches import Rows, check_vocabulary, collate, epoch_batches, longest
from loralab.data.labels import read_map
from loralab.data.reading import Reading
from loralab.errors import OtherKind, UserError, hint
from loralab.fast.code import ATTENTIONS
from loralab.fast.layers import layers_of
from loralab.methods.starts import looks_at
from loralab.objectives import Encoding, Objective, causal, classification
from loralab.objectives.templates import template_of
from loralab.run import policies, written
from loralab.run.settings import REPORTED_ROWS, SOURCE, Settings, StepSettings
from loralab.run.start import begin_from
from loralab.run.step import forward_loss
from loralab.run.written import Question
from loralab.targets import ReachNote

START_ROWS = 1024  # training rows for a start that is computed from data: plenty for a few thousand inputs, in seconds
ROW_LABELS = "labels of rows"  # their key in a batch for a start that looks at gradients


@dataclass(frozen=True)
class PreparedRun:
    """The parts of a run. While it trains, only the tensors inside `model` change."""

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
    asked: tuple[Question, ...] = ()  # what is to be answered at the end, for --generate-metric

    weighted: Objective | None = None  # the objective with the classes weighed, for --class-weights

    @property
    def objective(self) -> Objective:
        return self.weighted or objectives.of(self.task)

    @property
    def adapter_name(self) -> str:
        """What the saved adapter is called."""
        return "".join(char if char.isalnum() or char in "-_" else "-" for char in self.task.name)


def prepare(settings: Settings) -> PreparedRun:
    """Load everything and attach the adapter. Raises UserError; nothing is written."""
    return prepare_together([settings])[0]


def prepare_together(many: Sequence[Settings]) -> list[PreparedRun]:
    """Prepare runs over one model: each with its adapter, and with the head that it would have alone.

    sharing.py says which runs may share a model. Raises UserError; nothing is written.
    """
    runs: list[PreparedRun] = []
    cache: dict[Any, Any] = {}  # tasks and rows that several runs read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReachNote)  # the result has it among its warnings
        for i, settings in enumerate(many):
            runs.append(_prepare(settings, f"run-{i}", runs[0].adapters if runs else None, cache))
    return runs


def _prepare(settings: Settings, name: str, shared: Adapters | None, cache: dict[Any, Any]) -> PreparedRun:
    """Prepare a run on a model of its own, or on the one that has the adapters `shared`."""
    recipe = settings.recipe()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = _task(settings, cache)
    model, tokenizer = _model(settings, task)
    _check_same_base(model, settings, cache)
    rows, notes = _rows(settings, task, model, tokenizer, cache)
    notes += settings.idle().values()
    if settings.attention in ATTENTIONS and settings.speed == "auto" and layers_of(model):
        what = f"attention={settings.attention!r} with speed='auto'"
        notes.append(f"{what}: the fast path computes attention itself, so it changes nothing; see --speed off")
    metric = (settings.generate_metric, settings.generate_rows)
    asked = written.questions(task, reported(task, settings), *metric, model, tokenizer, settings.max_length)
    train = rows["train"]
    weighted = _weighted(settings, task, train)
    objective = weighted or objectives.of(task)
    labels = objective.names(task)

    def start_data() -> dict[str, Any]:
        return _start_data(alone, settings, tokenizer, objective)

    _check_whole(objective, task, settings)
    if not objective.new_head and recipe.factors is None and recipe.learn_base is None:
        raise UserError(
            f"--method {settings.method}: it learns a new head alone, and objective {task.objective} has none"
        )
    steps = settings.steps(len(train))
    recipe = recipe.for_steps(steps)
    notes += recipe.notes(steps)
    if settings.batch_size > len(train):
        notes.append(
            f"batch_size={settings.batch_size} is more than the {len(train)} rows to train on: an epoch is one step of "
            f"all of them, so the run has {steps} step{'s' * (steps > 1)}; a smaller batch takes more"
        )
    alone = replace(train, packed=False)  # policies and starts run the model itself, which takes no packed rows
    data = (objective, alone, task.sha256, labels, tokenizer)
    work = policies.PolicyInput(settings, recipe, *data, lambda: _model(settings, task)[0], start_data)
    recipe, plan = policies.with_ranks(work)
    options: dict[str, Any] = {**settings.chosen_layers, "labels": labels, "seed": settings.seed}
    options["head"] = objective.new_head
    if shared is None:
        shared = attach(model, recipe, name=name, **start_data(), **options)
    else:
        shared.add(name, recipe, plain=model, **start_data(), **options)
    if settings.from_adapter is not None:
        notes.append(begin_from(shared, name, settings.from_adapter))
    notes += [] if plan is None else [policies.note(recipe)]
    validation = {key: rows[key] for key in task.validation}
    parts = (settings, task, shared.model, tokenizer, shared, train, rows.get("held-out"), validation)
    return PreparedRun(name, *parts, tuple(notes), plan, tuple(asked), weighted)


def _weighted(settings: Settings, task: Task, train: Rows) -> Objective | None:
    """Return the objective of a task with its classes weighed, if that is asked for. Raises UserError."""
    if settings.class_weights == "none":
        return None
    objective = objectives.of(task)
    if objective is not classification.OBJECTIVE or task.labels is None:
        kind = "a regression" if task.labels is None and objective is classification.OBJECTIVE else objective.name
        raise UserError(
            f"class_weights={settings.class_weights!r} with {kind}: it has no classes to weigh, leave it out"
        )
    weights = classification.class_weights(task.labels, train.labels)
    return replace(objective, loss=partial(classification.weighted_loss, weights))


def _check_whole(objective: Objective, task: Task, settings: Settings) -> None:
    """Refuse to divide a step whose rows are compared with each other."""
    if objective.whole(task) and (settings.accumulate > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError(
            f"{task.name}: the rows of a step are each other's negatives, so it cannot be divided: leave --accumulate "
            "out and train in one process, or give negatives of your own in a column"
        )


def training_rows(settings: Settings) -> tuple[Rows, Any, list[str]]:
    """Return the rows that a run would train on, the tokenizer, and notes; the weights of the model are not read."""
    task, tokenizer = task_of(settings), models.tokenizer(settings.model)
    texts, sizes = splits(task, settings)
    rows = objectives.of(task).encode(task, texts["train"], tokenizer, Encoding(settings.max_length, train=True))
    return rows, tokenizer, [*task.notes, *sizes, *rows.notes, *rows.cut("train")]


def _check_same_base(model: Any, settings: Settings, cache: dict[Any, Any]) -> None:
    """Refuse a checkpoint without a pooler: it is drawn from the seed with the head, so each run would have its own."""
    prefix = f"{model.base_model_prefix}.pooler."
    pooler = {key: t.detach().clone() for key, t in model.named_parameters() if key.startswith(prefix)}
    first = cache.setdefault("pooler", pooler)
    if new := [key for key, t in pooler.items() if not torch.equal(first[key], t)]:
        raise UserError(f"{settings.model} has no {new[0]} of its own, so runs of other seeds have other bases")


def _task(settings: Settings, cache: dict[Any, Any]) -> Task:
    key = settings.only((*SOURCE, "select_by"))
    if key not in cache:
        cache[key] = task_of(settings)
    return cache[key]  # type: ignore[no-any-return]


def task_of(s: Settings) -> Task:
    """Read the task that a run's settings name. Raises UserError."""
    regression = None if s.problem_type == "auto" else s.problem_type == "regression"
    options = {} if s.loss_on == "auto" else {"loss_on": str(s.loss_on)}
    if s.label_map is not None:
        options["label_map"] = json.dumps(read_map(s.label_map), ensure_ascii=False)
    if s.template is not None:
        options["template"] = template_of(s.template)
    columns: dict[str, Any] = {"text": s.text, "label": s.label, "validation": s.validation, "regression": regression}
    read = {"objective": s.objective, "options": options, "reading": reading_of(s), **columns}
    return selected_by(objectives.load(s.task, s.data, **read), s.select_by)


def selected_by(task: Task, metric: str | None) -> Task:
    """Return a task with this metric first, by which epochs are selected; None leaves it. Raises UserError."""
    if metric is None:
        return task
    able = [*task.metrics, *(objectives.of(task).metrics(task))]
    if metric not in able:
        there = ", ".join(dict.fromkeys(able))
        raise UserError(f"select_by={metric!r}: {task.name} has no such metric{hint(metric, able)}: it has {there}")
    return replace(task, metrics=tuple(dict.fromkeys([metric, *task.metrics])))


def reading_of(s: Settings) -> Reading:
    """Return how a run's files are read."""
    return Reading(s.separator, s.encoding, s.skip_bad_rows)


def objective_of(s: Settings) -> Objective:
    """Return the objective of a run's task; of a file, only the names of its columns are read. Raises UserError."""
    return checks.without_bad_rows(reading_of(s), lambda: objectives.find(s.task, s.objective, s.text, s.label))


def _rows(
    settings: Settings, task: Task, model: Any, tokenizer: Any, cache: dict[Any, Any]
) -> tuple[dict[str, Rows], list[str]]:
    """Return (tokenized rows of each split, notes)."""
    check_length(model, settings)
    if settings.pack and "pack" not in objectives.of(task).takes:
        raise UserError(f"--pack with objective {task.objective}: only a causal model takes packed rows, leave it out")
    key = (
        id(task),
        settings.pack,
        settings.selection,
        settings.held_out,
        settings.max_length,
        settings.train_rows,
        settings.validation_rows,
    )
    if key not in cache:
        texts, sizes = splits(task, settings)
        encode = objectives.of(task).encode
        rows, problems = {}, []
        for name, split in texts.items():
            how = Encoding(settings.max_length, name == "train", settings.pack)
            try:
                rows[name] = encode(task, split, tokenizer, how)
                check_vocabulary(task.name, rows[name], split.rows, model)
            except checks.BadRows as bad:
                problems.append(f"{name} of {bad}")
        if problems:
            raise UserError("; ".join(problems))
        if settings.pack:
            causal.check_pack(settings.model, model, rows["train"], tokenizer)
        told = dict.fromkeys(note for r in rows.values() for note in r.notes)
        cut = [note for name, r in rows.items() for note in r.cut(name)]
        cache[key] = rows, [*task.notes, *sizes, *told, *cut]
    rows, notes = cache[key]
    return rows, list(notes)


def _model(settings: Settings, task: Task) -> tuple[Any, Any]:
    """Return (model, tokenizer), the model as a run begins with it."""
    objective = objectives.of(task)
    head = (objective.task_type, objective.outputs(task), torch.float32, settings.seed, settings.attention)
    try:
        model, tokenizer = models.fresh(settings.model, *head)
    except OtherKind as error:
        raise UserError(f"{error}{_read_as(settings, task)}") from error
    if any(getattr(module, "summary_type", None) in ("last", "mean") for module in model.modules()):
        raise UserError(
            f"{settings.model}: its head reads the last token of a batch, or the mean of all, which in a short row is "
            "padding: choose another objective, or a model whose head reads the row alone"
        )
    objective.begin(model, task)
    objective.prepare(model)
    return model, tokenizer


def _read_as(s: Settings, task: Task) -> str:
    """Say why a file is of its kind, where only its columns say so."""
    if s.objective or s.text or s.label or task.reading is None:
        return ""
    columns = ", ".join(task.columns)
    return f" ({task.name} is read as {task.objective} by its columns {columns}: --text and --label say otherwise)"


def splits(task: Task, settings: Settings) -> tuple[dict[str, data.Split], list[str]]:
    """Return ({"train", "held-out" if that selects, and each validation split}, notes)."""
    notes: list[str] = []

    def sampled(name: str, split: data.Split, rows: int | None) -> data.Split:
        if rows is None or rows == len(split):
            return split
        if rows > len(split):
            notes.append(f"{name}: all {len(split)} rows that there are, fewer than the {rows} asked for")
            return split
        notes.append(f"{name}: {rows} of {len(split)} rows, drawn by the data's hash")
        return split.take(data.sample(split, task.sha256, task.labels is not None, rows))

    held: dict[str, data.Split] = {}
    train = task.train
    if settings.selection == "held-out":
        if settings.held_out == "unused":
            kept, out = data.held_out_unused(train, task.sha256, task.labels is not None, settings.train_rows)
        else:
            kept, out = data.held_out(train, task.sha256, task.labels is not None)
        train, held = train.take(kept), {"held-out": train.take(out)}
    elif settings.selection == "validation":
        notes.append("validation: chosen on the reported split, so results are optimistic")
    most = REPORTED_ROWS if settings.reads_validation_once else None
    reported = {
        name: sampled(name, split, settings.validation_rows or (most and min(most, len(split))))
        for name, split in task.validation.items()
    }
    return {"train": sampled("train", train, settings.train_rows), **held, **reported}, notes


def reported(task: Task, settings: Settings) -> data.Split:
    """Return the rows of the split that is reported."""
    return splits(task, settings)[0][next(iter(task.validation))]


def check_length(model: Any, settings: StepSettings) -> None:
    """Raise UserError if --max-length is more tokens than the model takes."""
    most = longest(model)
    if most is not None and settings.max_length > most:
        raise UserError(f"--max-length {settings.max_length}: {settings.model} takes {most} tokens at most")


def _start_data(rows: Rows, settings: Settings, tokenizer: Any, objective: Objective) -> dict[str, Any]:
    """Return what `attach` takes for a start that is computed from data: batches of the first epoch, of START_ROWS rows
    in all, and for one that looks at gradients the loss of a batch, whose row labels are in it."""
    batches = epoch_batches(rows.lengths, settings.batch_size, settings.seed, 0)
    batches = batches[: math.ceil(START_ROWS / settings.batch_size)]
    plain = ((chosen, collate(rows, chosen, tokenizer, torch.device("cpu"))) for chosen in batches)
    if looks_at(settings.recipe().start) != "gradients":
        return {"batches": (batch for _, batch in plain)}

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = dict(batch)
        return forward_loss(model, objective, inputs, inputs.pop(ROW_LABELS), 1)

    return {"batches": ({**batch, ROW_LABELS: rows.labels[chosen]} for chosen, batch in plain), "loss": loss}


def recompute(model: Any, name: str) -> None:
    """Let a model recompute the activations of its layers in backward. Raises UserError where it cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"checkpointing: {name} cannot recompute its activations")
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
