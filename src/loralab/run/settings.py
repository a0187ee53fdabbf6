"""The settings of a run: every flag of `loralab train`, with its default and the reason beside it.

`StepSettings` are those that decide one training step; what a step needs (estimate.py) and how fast it is (bench/) are
asked with them too, so a setting has one name, one default and one check everywhere.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from loralab import options
from loralab.errors import UserError
from loralab.fast import Speed
from loralab.fast.machine import precision
from loralab.rankmap import RankMap
from loralab.recipe import Recipe, recipe

Selection = Literal["held-out", "last", "validation"]

NOT_RESULT = {"out", "resume", "track", "threads", "checkpoint_every"}  # settings that decide no result
SOURCE = ("task", "data", "text", "label", "problem_type", "validation")  # settings that name the rows
LEAST = {
    "epochs": 1, "batch_size": 1, "accumulate": 1, "rounds": 1, "max_length": 4, "seed": 0,
    "patience": 0, "checkpoint_every": 0, "weight_decay": 0, "clip": 0, "labels": 1, "layers": 1,
}  # fmt: skip
POSITIVE = ("lr", "head_lr", "threads", "train_rows", "validation_rows")  # None or above 0
OF_RECIPE = ("rank", "alpha", "lr", "lr_ratio", "dropout", "store", "policy")  # flags that are settings of the method


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What decides a training step."""

    model: str = "minilm"
    """A local folder, a hub name, or an alias: minilm, mpnet, smollm2."""
    method: str = "lora"
    """A row of `loralab methods`."""
    rank: int | None = None
    """Rank r; the method's own by default."""
    alpha: float | None = None
    """Scaling numerator; the method's own by default."""
    targets: str = "all-linear"
    """A preset (all-linear, attention, attention-qv, mlp, ...) or a regular expression over layer paths. All linear
    layers learn where q and v alone do not."""
    lr_ratio: float | None = None
    """Learning rate of B over that of A (LoRA+)."""
    dropout: float | None = None
    """Dropout on the adapter's input; 0 by default, as it is slow on CPU and gains little here."""
    set: tuple[str, ...] = ()
    """Any other setting of the method, as name=value: --set wait=20 follow=1.5. `loralab methods NAME` lists them."""
    ranks: Path | None = None
    """A rank map (JSON): rank, share and gates of every layer; one rank for all by default."""
    policy: str | None = None
    """Makes the rank map before the run: drop (LoRA-drop), alora, error-spectrum or groups; its time counts."""
    store: str | None = None
    """How frozen weights are kept: float32, bfloat16, int8, nf4, nf4-dq or int2; as loaded by default."""
    lr: float | None = None
    """Peak learning rate; the method's own by default."""
    batch_size: int = 32
    """Rows of one optimizer step, over all processes."""
    max_length: int = 128
    """Tokens of a row; longer rows are cut, counted and reported."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products run in; auto: bfloat16 where the machine multiplies it fast. What learns stays float32."""
    speed: Speed = "auto"
    """auto: the fast path, as far as machine and model take it; off: the plain one; compile: the plain one through
    torch.compile, for GPUs."""
    attention: str | None = None
    """Attention as transformers names it (eager, sdpa, flash_attention_2, ...); its own choice by default."""

    def __post_init__(self) -> None:
        if wrong := self.problems():
            raise UserError("; ".join(wrong))

    def problems(self) -> list[str]:
        """What is wrong with the settings, one phrase each; a subclass adds its own."""
        names = {f.name for f in dataclasses.fields(self)}
        wrong = [
            f"{key}={self.of(key)}: expected {least} or more"
            for key, least in LEAST.items()
            if key in names and self.of(key) is not None and self.of(key) < least
        ]
        given = [key for key in POSITIVE if key in names and self.of(key) is not None]
        return wrong + [f"{key}={self.of(key)}: expected above 0" for key in given if not self.of(key) > 0]

    def of(self, key: str) -> Any:
        """The value of a setting."""
        return getattr(self, key)

    def recipe(self) -> Recipe:
        """The recipe that method, flags and --set make. Raises UserError for a setting the method does not have."""
        given = {key: value for key in OF_RECIPE if (value := getattr(self, key)) is not None}
        more = options.parse(self.method, self.set) if self.set else {}
        if twice := sorted(given.keys() & more.keys()):
            raise UserError(f"{', '.join(twice)} is given as a flag and by --set: leave one out")
        mapped = {"ranks": RankMap.load(self.ranks)} if self.ranks else {}
        return recipe(self.method, **given, **more, **mapped)

    @property
    def precision(self) -> torch.dtype:
        """What products run in on this machine."""
        return precision(self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Every setting as JSON has it."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Settings(StepSettings):
    task: str
    """A GLUE name, minimal-pairs (embedded), or a CSV, JSONL or parquet file with columns --text and --label."""
    data: Path | None = None
    """Folder with the GLUE tasks (parquet or the classic TSV); without it the hub's nyu-mll/glue."""
    text: tuple[str, ...] = ()
    """Text columns of an own file, one or two."""
    label: str | None = None
    """Label column of an own file; float values mean regression."""
    problem_type: Literal["auto", "classification", "regression"] = "auto"
    """What the labels of an own file are; auto: classes, unless they are numbers with a fraction."""
    validation: Path | None = None
    """Validation file of an own task; without it a fifth of the file is held back."""
    train_rows: int | None = None
    """Train on so many rows, drawn once by the data's hash and stratified by label; all by default."""
    validation_rows: int | None = None
    """Report on so many rows of each validation split, drawn likewise; all by default."""
    seed: int = 0
    """Decides the head's and the adapter's start, data order and dropout."""
    out: Path | None = None
    """Run folder; runs/TASK-MODEL-METHOD-SEED by default."""
    head_lr: float | None = None
    """Learning rate of the head; that of the adapter by default."""
    epochs: int = 3
    """Passes over the training data."""
    accumulate: int = 1
    """Parts a batch is cut into, to save memory; the gradient is the same."""
    keep: float = 0.9
    """Of policy drop: the part of the importance whose layers keep their own factors."""
    rounds: int = 1
    """Of policy alora: how often ranks move. The paper's most is 8, but a round costs two forward passes of 32 rows for
    every rank: 592 for minilm's 37 layers at rank 8, the work of six epochs of MRPC."""
    span: int | None = None
    """Of policy groups: the most layers that one group spans; all of one kind and shape by default."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up."""
    warmup: float = 0.06
    """Part of all steps over which the learning rate rises; 0.06 is what the GLUE scripts of LoRA use."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    selection: Selection = "held-out"
    """What chooses the epoch: a held-out tenth of train, the last epoch, or (optimistic) the validation split."""
    patience: int = 0
    """Epochs without a better score after which the run stops; 0 runs all epochs."""
    threads: int | None = None
    """Threads of torch; its own choice by default."""
    checkpoint_every: int = 0
    """Optimizer steps between checkpoints; 0 keeps one per epoch."""
    track: str | None = None
    """A tracker of Accelerate: tensorboard, wandb, mlflow."""
    resume: bool = False
    """Go on with the unfinished run in --out."""

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.accumulate > self.batch_size:
            wrong.append(f"accumulate={self.accumulate} cuts batch_size={self.batch_size} into empty parts")
        if not 0 <= self.keep <= 1:
            wrong.append(f"keep={self.keep}: expected a part of the importance, 0 to 1")
        if self.span is not None and (self.policy != "groups" or self.span < 2):
            wrong.append(
                f"span={self.span} with policy={self.policy!r}: policy='groups' takes a span of 2 or more layers"
            )
        if not 0 <= self.warmup < 1:
            wrong.append(f"warmup={self.warmup}: expected a part of all steps, 0 <= warmup < 1")
        return wrong

    def only(self, keys: Sequence[str]) -> "Settings":
        """With every other setting at its default: what a thing that rests on these alone is known by."""
        return Settings(**{"task": self.task, **{key: self.of(key) for key in keys}})

    def steps(self, rows: int) -> int:
        """Optimizer steps of the whole run on that many training rows."""
        return self.epochs * -(-rows // self.batch_size)

    @property
    def folder(self) -> Path:
        """The run folder."""
        stem = "-".join([Path(self.task).stem, Path(self.model).name, self.method, str(self.seed)])
        return self.out or Path("runs") / stem

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the result; where it is written and whether it is resumed do not."""
        free = {"out", "resume", "track"}
        return {k: v for k, v in super().to_json().items() if k not in free}
