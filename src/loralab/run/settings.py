"""The settings of a run: every flag of `loralab train`, with its default and the reason for it.

`StepSettings` decide one training step. The memory estimate (estimate.py) and the benchmarks (bench/) take them too, so
a setting has one name, one default and one check everywhere.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from loralab import options
from loralab.data import glue
from loralab.data.reading import Separator
from loralab.errors import UserError
from loralab.fast import Speed
from loralab.fast.machine import precision
from loralab.rankmap import RankMap
from loralab.recipe import NAMED, Recipe, recipe

Selection = Literal["held-out", "last", "validation"]
GenerateMetric = Literal["exact", "json", "rouge"]
LossOn = Literal["auto", "completion", "assistant", "all"]
HeldOut = Literal["tenth", "unused"]
REPORTED_ROWS = 5000  # of a validation split that is read once: more narrow an interval by little

NOT_RESULT = {"out", "resume", "track", "threads", "checkpoint_every", "device", "licence"}  # they change no result
LEARNED = ("objective", "template", "loss_on")  # they say what a run learns of its rows
SOURCE = (
    "task", "data", "text", "label", "problem_type", "validation",
    "separator", "encoding", "skip_bad_rows", "label_map", *LEARNED,
)  # fmt: skip  # which rows a run reads
LEAST = {
    "epochs": 1, "batch_size": 1, "accumulate": 1, "rounds": 1, "max_length": 4, "seed": 0,
    "patience": 0, "checkpoint_every": 0, "eval_every": 0, "max_steps": 1, "weight_decay": 0, "clip": 0, "labels": 1,
    "layers": 1, "generate_rows": 1,
}  # fmt: skip
MOST = {"seed": 2**32 - 1, "threads": 4096}  # numpy takes no larger seed
POSITIVE = ("lr", "head_lr", "threads", "train_rows", "validation_rows")  # None or above 0
NOTED = ("targets", "exclude", "data")  # a study shares them among methods and tasks: a note says if they do nothing
OF_RECIPE = ("rank", "alpha", "lr", "lr_ratio", "dropout", "store", "policy")  # flags that are settings of the method


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings that decide a training step. Raises UserError for a value that cannot be."""

    model: str = "minilm"
    """A local folder, a hub name, or an alias: minilm, mpnet, smollm2."""
    method: str = "lora"
    """A method of `loralab methods`."""
    rank: int | None = None
    """Rank r; the method's own by default."""
    alpha: float | None = None
    """Scaling numerator; the method's own by default."""
    targets: str = "all-linear"
    """A preset (all-linear, attention, attention-qv, mlp, ...) or a regular expression over layer paths. Some tasks are
    learned with all linear layers and not with q and v alone."""
    exclude: tuple[str, ...] = ()
    """Layers that get no adapter, or modules whose layers get none, by the end of their path; * is one component."""
    lr_ratio: float | None = None
    """Learning rate of B over that of A (LoRA+)."""
    dropout: float | None = None
    """Dropout on the adapter's input; 0 by default, because it is slow on CPU and gains little here."""
    set: tuple[str, ...] = ()
    """Any other setting of the method, as name=value: --set wait=20 follow=1.5. `loralab methods NAME` lists them."""
    ranks: Path | None = None
    """A rank map (JSON): rank, share and gates of every layer; by default all layers have one rank."""
    policy: str | None = None
    """Makes the rank map before the run: drop (LoRA-drop), alora, error-spectrum or groups. Its time counts."""
    store: str | None = None
    """How frozen weights are stored: float32, bfloat16, int8, nf4, nf4-dq or int2; as loaded by default."""
    lr: float | None = None
    """Peak learning rate; the method's own by default."""
    batch_size: int = 32
    """Rows of one optimizer step, all processes together."""
    max_length: int = 128
    """Most tokens of a row; longer rows are cut, and a note says how many."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto: bfloat16 where the machine multiplies it fast. Trained values stay float32."""
    speed: Speed = "auto"
    """auto: the fast path, as far as machine and model allow it; off: plain transformers; compile: plain transformers
    through torch.compile, for GPUs."""
    checkpointing: bool = False
    """Recompute the activations within a layer in backward: less memory, more time, on the plain path only."""
    attention: str | None = None
    """Attention as transformers names it (eager, sdpa, flash_attention_2, ...); its own choice by default."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise UserError("; ".join(problems))

    def problems(self) -> list[str]:
        """List what is wrong with the values, one phrase each; a subclass adds its own."""
        problems = []
        for key, value in ((f.name, self.of(f.name)) for f in dataclasses.fields(self)):
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{key}={value}: expected a finite number")
            elif key in LEAST and value < LEAST[key]:
                problems.append(f"{key}={value}: expected {LEAST[key]} or more")
            elif key in MOST and value > MOST[key]:
                problems.append(f"{key}={value}: expected {MOST[key]} or less")
            elif key in POSITIVE and value <= 0:
                problems.append(f"{key}={value}: expected above 0")
        return problems

    def of(self, key: str) -> Any:
        """Return the value of a setting by its name."""
        return getattr(self, key)

    @property
    def path(self) -> Speed:
        """The speed that is used: the fast path recomputes nothing."""
        return "off" if self.checkpointing else self.speed

    def recipe(self) -> Recipe:
        """Make the recipe of the method with the flags and --set.

        Raises UserError for a setting the method does not have, and for one that is given both ways.
        """
        flags = {key: value for key in OF_RECIPE if (value := getattr(self, key)) is not None}
        known = options.options(self.method)
        if idle := [key for key in flags if key not in known]:
            there = f"it has {', '.join(known)} (loralab methods {self.method})"
            raise UserError(f"method {self.method!r} has no setting {', '.join(map(repr, idle))}: {there}")
        settings = options.parse(self.method, self.set) if self.set else {}
        if twice := sorted(flags.keys() & settings.keys()):
            raise UserError(f"{', '.join(twice)}: given as a flag and by --set, leave one out")
        rank_map = {"ranks": RankMap.load(self.ranks)} if self.ranks else {}
        return recipe(self.method, **flags, **settings, **rank_map)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of matrix products on this machine."""
        return precision(self.dtype, self.gpu)

    @property
    def gpu(self) -> bool:
        """Whether a GPU is used: one that is there."""
        return torch.cuda.is_available()

    @property
    def chosen_layers(self) -> dict[str, Any]:
        """What says which layers are adapted, as `attach` takes it; nothing for a method that adapts none."""
        adapts = self.method not in NAMED or NAMED[self.method][0].factors is not None
        return {"targets": self.targets, "exclude": self.exclude} if adapts else {}

    def to_json(self) -> dict[str, Any]:
        """Return every setting as a value of JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Settings(StepSettings):
    """Everything that decides a run. Raises UserError for a value that cannot be."""

    task: str
    """A GLUE name, an embedded task (minimal-pairs, records), or a file: CSV, TSV, JSON, JSONL, parquet or CoNLL.
    Its columns say what kind of task it is, or --text and --label name them."""
    data: Path | None = None
    """Folder with the GLUE tasks (parquet or the classic TSV); the hub's nyu-mll/glue by default."""
    objective: str | None = None
    """Kind of task: classification (regression too), causal, ...; by default what the columns of the file say."""
    text: tuple[str, ...] = ()
    """Text columns of an own file, one or two."""
    label: str | None = None
    """Label column of an own file; float values mean regression."""
    problem_type: Literal["auto", "classification", "regression"] = "auto"
    """What the labels of an own file are; auto: classes, unless they are numbers with a fraction."""
    validation: Path | None = None
    """Validation file of an own task; by default a fifth of the file is set apart."""
    separator: Separator = "auto"
    """What divides the cells of a CSV or TSV: , or ; or tab or |; by default found by looking at the file."""
    encoding: str = "auto"
    """Encoding of an own file, as cp1252 or utf-16; by default UTF-8, or what its byte order mark says, and a guess
    only for a file that is neither."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, count them in a note and list them in skipped.csv; by default they are
    refused."""
    label_map: Path | None = None
    """JSON file that merges labels of an own file: {"Pos": "pos", "positive": "pos"}; of tags their types too."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: rows of a rare class weigh more in the loss, so that every class has the same part of it."""
    template: Path | None = None
    """Chat template (a Jinja file) for objective causal; the tokenizer's own by default."""
    loss_on: LossOn = "auto"
    """Tokens that a causal model learns: the completion, every assistant turn of a chat, or all; auto: the first that
    the rows have."""
    pack: bool = False
    """Put several rows of a causal model's step into one sequence, where they do not see each other: less padding."""
    train_rows: int | None = None
    """Train on this many rows, drawn by the data's hash and stratified by label; all by default."""
    validation_rows: int | None = None
    """Report on this many rows of each validation split, drawn in the same way; all by default."""
    from_adapter: Path | None = None
    """Start from the adapter of this folder; its head is used where the labels are the same."""
    generate_metric: GenerateMetric | None = None
    """At the end let the selected adapter write answers, and score them: exact (the same text), json (the first JSON in
    the answer says the same) or rouge (ROUGE-L, needs loralab[rouge])."""
    generate_rows: int = 100
    """Most rows of the reported split that are answered for --generate-metric."""
    seed: int = 0
    """Decides the start of head and adapter, the order of the data, and dropout."""
    out: Path | None = None
    """Run folder; runs/TASK-MODEL-METHOD-SEED by default."""
    head_lr: float | None = None
    """Learning rate of the head; the adapter's by default."""
    epochs: int = 3
    """Passes over the training data."""
    max_steps: int | None = None
    """Most optimizer steps of the run; the learning rate goes down to the last of them."""
    max_time: str | None = None
    """Most training time, as 90s, 15m or 2h; the run is then evaluated and ends."""
    eval_every: int = 0
    """Evaluate after every so many optimizer steps, and select among these points, besides the ends of epochs; 0: at
    the ends of epochs only."""
    accumulate: int = 1
    """Number of parts a batch is cut into, to save memory; the gradient is the same."""
    keep: float = 0.9
    """For policy drop: the most important layers, up to this share of all importance, keep factors of their own."""
    rounds: int = 1
    """For policy alora: how often ranks move. The paper goes up to 8, but a round costs two forward passes of 32 rows
    for every rank: 592 for minilm's 37 layers at rank 8, the work of six epochs of MRPC."""
    span: int | None = None
    """For policy groups: the most layers in one group; by default all layers of one kind and shape."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after warm-up; constant has none."""
    warmup: float = 0.06
    """Share of all steps in which the learning rate rises; the GLUE scripts of LoRA use 0.06."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    selection: Selection = "held-out"
    """How the epoch is chosen: by a held-out tenth of train, the last one, or (optimistic) by the validation split."""
    select_by: str | None = None
    """Metric that chooses the epoch and is reported first, as f1_macro; by default the task's own first one."""
    held_out: HeldOut = "tenth"
    """Which rows are held out: a tenth of train, at most 1,000; or unused: up to 2,000 that --train-rows leaves out,
    and the validation split is read once, at the selected epoch, on at most 5,000 rows."""
    patience: int = 0
    """Stop after this many evaluations without a better score, those of --eval-every too; 0 runs all epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one, found without being asked for, else the CPU; cpu: the CPU even so. Of several GPUs
    the environment variable CUDA_VISIBLE_DEVICES chooses."""
    threads: int | None = None
    """Threads of torch; torch chooses by default."""
    checkpoint_every: int = 0
    """Write a checkpoint every so many optimizer steps, besides the one after each epoch; 0: after each epoch only."""
    track: str | None = None
    """A tracker of Accelerate: tensorboard, wandb, mlflow."""
    licence: str | None = None
    """Licence of the adapter, as apache-2.0: it is written into its model card."""
    resume: bool = False
    """Go on with the unfinished run in --out; without one the run starts there."""

    def problems(self) -> list[str]:
        """List what is wrong with the values, one phrase each."""
        wrong = super().problems()
        if self.accumulate > self.batch_size >= 1:
            wrong.append(f"accumulate={self.accumulate} cuts batch_size={self.batch_size} into empty parts")
        if not 0 <= self.keep <= 1:
            wrong.append(f"keep={self.keep}: expected a share of the importance, 0 to 1")
        if self.span is not None and self.span < 2:
            wrong.append(f"span={self.span} with policy={self.policy!r}: expected 2 or more layers")
        if self.max_time is not None and seconds(self.max_time) is None:
            wrong.append(f"max_time={self.max_time}: expected a time above 0 as 90s, 15m or 2h")
        if self.held_out == "unused" and self.selection != "held-out":
            wrong.append(
                f"held_out='unused' with selection={self.selection!r}: only selection='held-out' holds rows out"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            wrong.append("device='cuda': torch finds no GPU on this machine, leave it out and the CPU is used")
        if not 0 <= self.warmup < 1:
            wrong.append(f"warmup={self.warmup}: expected a share of all steps, 0 <= warmup < 1")
        return wrong + [text for key, text in self.idle().items() if key not in NOTED]

    def idle(self) -> dict[str, str]:
        """Setting -> why it would do nothing, of those that are given and belong to what is not chosen."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        given = {key: value for key in BELONGS if (value := self.of(key)) != defaults[key]}
        found = {key: reason for key in given if (reason := BELONGS[key](self)) is not None}
        return {key: f"{key}={given[key]} with {reason}" for key, reason in found.items()}

    @property
    def gpu(self) -> bool:
        """Whether the run is on a GPU: one that is there, unless the CPU is asked for."""
        return self.device != "cpu" and super().gpu

    @property
    def makes_map(self) -> str | None:
        """The policy that makes the rank map of this run: one that is given, or that of the method."""
        if self.ranks is not None:
            return None
        texts = dict(text.partition("=")[::2] for text in self.set)
        row = NAMED.get(self.method)
        return self.policy or texts.get("policy") or (None if row is None else row[0].policy)

    def only(self, keys: Sequence[str]) -> "Settings":
        """Return these settings with every other one at its default: a key for what depends on these alone."""
        return Settings(**{"task": self.task, **{key: self.of(key) for key in keys}})

    def steps(self, rows: int) -> int:
        """Return the optimizer steps of the whole run on that many training rows."""
        whole = self.epochs * -(-rows // self.batch_size)
        return whole if self.max_steps is None else min(whole, self.max_steps)

    @property
    def reads_validation_once(self) -> bool:
        """Whether the validation split is read at the selected epoch only."""
        return self.held_out == "unused"

    @property
    def folder(self) -> Path:
        """The run folder."""
        stem = "-".join([Path(self.task).stem, Path(self.model).name, self.method, str(self.seed)])
        return self.out or Path("runs") / stem

    def to_json(self) -> dict[str, Any]:
        """Return every setting as a value of JSON, but for where the run is written, resumed and tracked."""
        left_out = {"out", "resume", "track"}
        return {k: v for k, v in super().to_json().items() if k not in left_out}


UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float | None:
    """Return the seconds of a time as 90s, 15m or 2h; None for what is none."""
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS or re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", number) is None:
        return None
    return float(number) * UNITS[unit] or None


# ---- settings that belong to others ----------------------------------------------------------------------------------


def _of_policy(name: str) -> Callable[[Settings], str | None]:
    """Why a setting of one rank policy does nothing."""

    def reason(s: Settings) -> str | None:
        if s.makes_map == name:
            return None
        other = "a rank map that is given" if s.ranks else f"policy={s.makes_map!r}"
        return f"{other}: it is policy={name!r} that takes it, so leave it out"

    return reason


def _of_layers(s: Settings) -> str | None:
    return None if s.chosen_layers else f"method={s.method!r}: it adapts no layer, so there is none to choose"


def _of_glue(s: Settings) -> str | None:
    return None if glue.canonical(s.task) else f"task={s.task!r}: that is the folder of GLUE, and it is not read here"


# setting -> why it would do nothing beside the others, None where it does something; columns of a file: data.load
BELONGS: dict[str, Callable[[Settings], str | None]] = {
    "keep": _of_policy("drop"),
    "rounds": _of_policy("alora"),
    "span": _of_policy("groups"),
    "policy": lambda s: "a rank map that is given: no policy makes one, so leave one out" if s.ranks else None,
    "warmup": lambda s: (
        "schedule='constant': the rate is constant from the first step on, so leave one out"
        if s.schedule == "constant" and s.warmup
        else None
    ),
    "patience": lambda s: (
        "selection='last': no epoch is better than the last, so none is waited for" if s.selection == "last" else None
    ),
    "generate_rows": lambda s: (
        "no generate_metric: no row is answered, so leave it out" if s.generate_metric is None else None
    ),
    "targets": _of_layers,
    "exclude": _of_layers,
    "data": _of_glue,
}
