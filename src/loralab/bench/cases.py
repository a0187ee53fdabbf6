"""What is measured: a case is the settings of one step, one epoch or one batch; `grid` and `growth` make many cases."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

from loralab import models
from loralab.errors import UserError, hint
from loralab.run.settings import Settings, StepSettings

DTYPES = ("bfloat16", "float32")
RANKS = (1, 4, 16, 64, 256)  # of --cost, which varies rank, layers and length one at a time
LAYERS = (1, 2, 4, 6)  # of an encoder's layers, the first ones
LENGTHS = (16, 32, 64, 128, 256)
LEARNS = {"classes": "classification", "tags": "tagging", "text": "causal"}  # what a step learns -> its objective
FLAGS = {"max_length": "--lengths", "batch_size": "--batch-size", "rank": "--ranks", "layers": "--layers"}
METHODS_OWN = ("alpha", "lr_ratio", "dropout", "set", "ranks", "policy", "store")  # settings that a case may not change


@dataclass(frozen=True)
class PeftMethod:
    """How PEFT makes loralab's method of the same name."""

    config: str | None = "LoraConfig"
    """Its class in peft; None trains without PEFT."""
    options: dict[str, Any] = field(default_factory=dict)
    train_a: bool = True
    four_bit: bool = False
    """Put bitsandbytes' Linear4bit under the adapters: NF4 with double quantization."""


PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": PeftMethod(),
    "dora": PeftMethod(options={"use_dora": True}),
    "vera": PeftMethod("VeraConfig"),
    "lora-fa": PeftMethod(train_a=False),  # PEFT's own LoRA-FA is an optimizer with another update (lora-fa-precond)
    "qlora": PeftMethod(four_bit=True),
    "full": PeftMethod(None),
}


def _by_flag(problems: Iterable[str]) -> list[str]:
    """Problems of settings under the names of the flags of `loralab bench`: max_length=0 -> --lengths 0."""
    parts = [problem.partition("=") for problem in problems]
    return [f"{FLAGS[key]} {rest}" if key in FLAGS else key + equals + rest for key, equals, rest in parts]


def _unlike(case: StepSettings) -> list[str]:
    """What keeps PEFT from doing the same as loralab."""
    wrong = [unknown("--methods", case.method, PEFT_METHODS), unknown("--dtypes", case.dtype, DTYPES)]
    changed = [key for key in METHODS_OWN if case.of(key) not in (None, ())]
    wrong += [f"{key}={case.of(key)}: bench measures a method with its own {key}" for key in changed]
    return [problem for problem in wrong if problem]


@dataclass(frozen=True, kw_only=True)
class Case(StepSettings):
    """A training step that both backends take, on rows of exactly `max_length` tokens."""

    max_length: int = 64
    """Tokens of a row; a quarter of the rows are a quarter padding."""
    dtype: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    layers: int | None = None
    """Only the encoder's first layers; all by default."""
    learns: Literal["classes", "tags", "text"] = "classes"
    """What the step learns: the class of a row, the tag of each token, or the next token of a decoder."""
    allocator: Literal["equal", "own"] = "equal"
    """equal: PEFT's process keeps freed memory as loralab's does; own: it returns it, as the C library does."""

    def problems(self) -> list[str]:
        wrong = [unknown("--learns", self.learns, LEARNS)] if self.learns not in LEARNS else []
        return wrong + _unlike(self) + _by_flag(super().problems())


@dataclass(frozen=True, kw_only=True)
class EpochCase(Settings):
    """A whole epoch: the loop of `loralab train` against PEFT in Hugging Face's Trainer."""

    dtype: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    epochs: int = 1
    selection: Literal["held-out", "last", "validation"] = "last"
    together: int = 1
    """Runs of loralab that share passes; PEFT has one."""
    allocator: Literal["equal", "own"] = "equal"
    """As in Case."""

    def problems(self) -> list[str]:
        wrong = _unlike(self) + super().problems()
        if self.together < 1:
            wrong.append(f"--together {self.together}: expected how many runs share passes, 1 or more")
        return wrong


@dataclass(frozen=True, kw_only=True)
class MixedCase(StepSettings):
    """Inference on a batch whose `batch_size` rows have an adapter each, out of many that are loaded."""

    max_length: int = 32
    """Tokens of a row."""
    dtype: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    loaded: int = 1000
    """Adapters in the largest case."""

    def problems(self) -> list[str]:
        wrong = _by_flag(super().problems())
        return wrong + ([f"--loaded {self.loaded}: expected 1 or more"] if self.loaded < 1 else [])


C = TypeVar("C", bound=StepSettings)


def from_json(kind: type[C], data: Mapping[str, Any]) -> C:
    """Rebuild a case from its `to_json`."""
    paths = {"data", "ranks", "validation", "out"}
    values = {key: Path(value) if key in paths and value else value for key, value in data.items()}
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return kind(**given)


def unknown(flag: str, name: str, names: Iterable[str]) -> str:
    """What is wrong with a name that is not among `names`; empty where nothing is."""
    names = list(names)
    return "" if name in names else f"{flag} {name!r}{hint(name, names)}: bench knows {', '.join(names)}"


def grid(
    model_names: Sequence[str],
    methods: Sequence[str],
    targets: Sequence[str],
    lengths: Sequence[int],
    dtypes: Sequence[str],
    batch_size: int,
    **rest: Any,
) -> list[Case]:
    """Every combination; `rest` is what all cases have. Raises UserError at once for a model that cannot be found."""
    for name in model_names:
        models.resolve(name)
    points = product(model_names, methods, targets, lengths, dtypes)
    rest = {"batch_size": batch_size, **rest}
    return [
        Case(model=model, method=method, targets=target, max_length=length, dtype=dtype, **rest)  # type: ignore[arg-type]
        for model, method, target, length, dtype in points
    ]


def growth(base: Case, ranks: Sequence[int], layers: Sequence[int], lengths: Sequence[int]) -> dict[str, list[Case]]:
    """Axis -> cases in which it alone changes."""
    return {
        "rank": [replace(base, rank=rank) for rank in ranks],
        "layers": [replace(base, layers=count) for count in layers],
        "max_length": [replace(base, max_length=length) for length in lengths],
    }


def epochs(
    cases: Sequence[Case],
    tasks: Sequence[str],
    data: Path | None,
    rows: int | None,
    max_length: int,
    together: Sequence[int] = (1,),
) -> list[EpochCase]:
    """An epoch of each task for each case; the lengths are those of the task's rows."""
    if rows is not None and rows < 1:
        raise UserError(f"--rows {rows}: expected 1 or more")
    where = None if data is None else data.absolute()
    keys = ("model", "method", "targets", "dtype", "batch_size", "allocator")
    given: dict[str, Any] = {"data": where, "train_rows": rows, "max_length": max_length}
    return list(
        dict.fromkeys(
            EpochCase(task=task, together=count, **given, **{key: case.of(key) for key in keys})
            for case in cases
            for task in tasks
            for count in together
        )
    )


def mixed_case(case: Case, loaded: int) -> MixedCase:
    """A mixed batch with the settings of a case."""
    keys = ("model", "method", "targets", "max_length", "dtype", "batch_size")
    return MixedCase(loaded=loaded, **{key: case.of(key) for key in keys})
