"""The settings of one run: every flag of `loralab train`, with its default and the reason beside it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from loralab.errors import UserError
from loralab.ranks import RankMap
from loralab.recipe import Recipe, recipe
from loralab.speed import Speed
from loralab.speed.machine import precision

Selection = Literal["held-out", "last", "validation"]

NOT_RESULT = {"out", "resume", "track", "threads", "checkpoint_every"}  # settings that decide no result
SOURCE = ("task", "data", "text", "label", "problem_type", "validation")  # settings that name the rows
LEAST = {
    "epochs": 1, "batch_size": 1, "accumulate": 1, "rounds": 1, "max_length": 4, "seed": 0,
    "patience": 0, "checkpoint_every": 0, "weight_decay": 0, "clip": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    task: str
    """A GLUE name, minimal-pairs (embedded), or a CSV, JSONL or parquet file with columns --text and --label."""
    model: str = "minilm"
    """A local folder, a hub name, or an alias: minilm, mpnet, smollm2."""
    method: str = "lora"
    """A row of `loralab methods`."""
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
    rank: int | None = None
    """Rank r; the method's own by default."""
    alpha: float | None = None
    """Scaling numerator; the method's own by default."""
    targets: str = "all-linear"
    """A preset (all-linear, attention, attention-qv, mlp, ...) or a regular expression over layer paths. All linear
    layers learn where q and v alone do not."""
    lr: float | None = None
    """Peak learning rate; the method's own by default."""
    lr_ratio: float | None = None
    """Learning rate of B over that of A (LoRA+)."""
    head_lr: float | None = None
    """Learning rate of the head; that of the adapter by default."""
    epochs: int = 3
    """Passes over the training data."""
    batch_size: int = 32
    """Rows of one optimizer step, over all processes."""
    accumulate: int = 1
    """Parts a batch is cut into, to save memory; the gradient is the same."""
    max_length: int = 128
    """Tokens of a row; longer rows are cut, counted and reported."""
    dropout: float | None = None
    """Dropout on the adapter's input; 0 by default, as it is slow on CPU and gains little here."""
    ranks: Path | None = None
    """A rank map (JSON): rank, share and gates of every layer; one rank for all by default."""
    plan: str | None = None
    """Makes the rank map before the run: drop (LoRA-drop), alora, error-spectrum or groups; its time counts."""
    keep: float = 0.9
    """Of plan drop: the part of the importance whose layers keep their own factors."""
    rounds: int = 1
    """Of plan alora: how often ranks move. The paper's most is 8, but a round costs two forward passes of 32 rows for
    every rank: 592 for minilm's 37 layers at rank 8, the work of six epochs of MRPC."""
    span: int | None = None
    """Of plan groups: the most layers that one group spans; all of one kind and shape by default."""
    store: str | None = None
    """How frozen weights are kept: float32, bfloat16, int8, nf4, nf4-dq or int2; as loaded by default."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products run in; auto: bfloat16 where the machine multiplies it fast. What learns stays float32."""
    speed: Speed = "auto"
    """auto: the fast path, as far as machine and model take it; off: the plain one; compile: the plain one through
    torch.compile, for GPUs."""
    attention: str | None = None
    """Attention as transformers names it (eager, sdpa, flash_attention_2, ...); its own choice by default."""
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

    def __post_init__(self) -> None:
        wrong = [
            f"{key}={self.of(key)}: expected {least} or more" for key, least in LEAST.items() if self.of(key) < least
        ]
        given = [
            key for key in ("lr", "head_lr", "threads", "train_rows", "validation_rows") if self.of(key) is not None
        ]
        wrong += [f"{key}={self.of(key)}: expected above 0" for key in given if not self.of(key) > 0]
        if self.accumulate > self.batch_size:
            wrong.append(f"accumulate={self.accumulate} cuts batch_size={self.batch_size} into empty parts")
        if not 0 <= self.keep <= 1:
            wrong.append(f"keep={self.keep}: expected a part of the importance, 0 to 1")
        if self.span is not None and (self.plan != "groups" or self.span < 2):
            wrong.append(f"span={self.span} with plan={self.plan!r}: plan='groups' takes a span of 2 or more layers")
        if not 0 <= self.warmup < 1:
            wrong.append(f"warmup={self.warmup}: expected a part of all steps, 0 <= warmup < 1")
        if wrong:
            raise UserError("; ".join(wrong))

    def of(self, key: str) -> Any:
        return getattr(self, key)

    def only(self, keys: Sequence[str]) -> "Settings":
        """With every other setting at its default: what a thing that rests on these alone is known by."""
        return Settings(**{"task": self.task, **{key: self.of(key) for key in keys}})

    def steps(self, rows: int) -> int:
        """Optimizer steps of the whole run on that many training rows."""
        return self.epochs * -(-rows // self.batch_size)

    def recipe(self) -> Recipe:
        keys = ("rank", "alpha", "lr", "lr_ratio", "dropout", "store", "plan")
        given = {key: value for key in keys if (value := getattr(self, key)) is not None}
        return recipe(self.method, **given, **({"ranks": RankMap.load(self.ranks)} if self.ranks else {}))

    @property
    def precision(self) -> torch.dtype:
        """What products run in on this machine."""
        return precision(self.dtype)

    @property
    def folder(self) -> Path:
        stem = "-".join([Path(self.task).stem, Path(self.model).name, self.method, str(self.seed)])
        return self.out or Path("runs") / stem

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the result; where it is written and whether it is resumed do not."""
        free = {"out", "resume", "track"}
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items() if k not in free}
