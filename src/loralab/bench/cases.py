"""What is measured: a case is one point of method, model, length, dtype and so on; `grid` and `growth` make many."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from loralab import models
from loralab.bench.sides import METHODS
from loralab.errors import UserError, hint

DTYPES = ("bfloat16", "float32")
RANKS = (1, 4, 16, 64, 256)  # what a step's cost is drawn against, one of the three at a time
LAYERS = (1, 2, 4, 6)  # of an encoder's layers, the first ones
LENGTHS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    """A training step that both sides take."""

    model: str = "minilm"
    method: str = "lora"
    targets: str = "all-linear"
    length: int = 64
    """Tokens of a row; a quarter of the rows are a quarter padding."""
    dtype: str = "bfloat16"
    batch_size: int = 32
    rank: int | None = None
    """The method's own by default."""
    layers: int | None = None
    """The encoder's first layers; all by default."""

    def __post_init__(self) -> None:
        known("--methods", self.method, METHODS)
        known("--dtypes", self.dtype, DTYPES)
        sizes = {"--lengths": self.length, "--batch-size": self.batch_size}
        sizes |= {flag: n for flag, n in (("--ranks", self.rank), ("--layers", self.layers)) if n is not None}
        if wrong := [f"{flag} {n}" for flag, n in sizes.items() if n < 1]:
            raise UserError(f"{', '.join(wrong)}: expected 1 or more")


@dataclass(frozen=True)
class EpochCase:
    """A whole epoch end to end: loralab's own loop against PEFT in Hugging Face's Trainer."""

    task: str = "cola"
    data: str | None = None
    model: str = "minilm"
    method: str = "lora"
    targets: str = "all-linear"
    dtype: str = "bfloat16"
    batch_size: int = 32
    rows: int | None = None
    """Only so many training rows; all by default."""
    max_length: int = 128
    together: int = 1
    """Runs of loralab that share passes; PEFT has one."""

    def __post_init__(self) -> None:
        known("--methods", self.method, METHODS)
        known("--dtypes", self.dtype, DTYPES)


def known(flag: str, name: str, names: Iterable[str]) -> None:
    """Raises UserError for a name that is not there."""
    names = list(names)
    if name not in names:
        raise UserError(f"{flag} {name!r}{hint(name, names)}: bench knows {', '.join(names)}")


def grid(
    model_names: Sequence[str],
    methods: Sequence[str],
    targets: Sequence[str],
    lengths: Sequence[int],
    dtypes: Sequence[str],
    batch_size: int,
) -> list[Case]:
    """Every combination; the models are looked for at once, not after minutes."""
    for name in model_names:
        models.resolve(name)
    points = product(model_names, methods, targets, lengths, dtypes)
    return [Case(*point, batch_size) for point in points]


def growth(base: Case, ranks: Sequence[int], layers: Sequence[int], lengths: Sequence[int]) -> dict[str, list[Case]]:
    """axis -> cases in which it alone changes."""
    return {
        "rank": [replace(base, rank=rank) for rank in ranks],
        "layers": [replace(base, layers=count) for count in layers],
        "length": [replace(base, length=length) for length in lengths],
    }


def epochs(
    cases: Sequence[Case],
    tasks: Sequence[str],
    data: Path | None,
    rows: int | None,
    max_length: int,
    together: Sequence[int] = (1,),
) -> list[EpochCase]:
    """An epoch of each task for each case; their lengths are those of the data."""
    if wrong := [count for count in together if count < 1]:
        raise UserError(f"--together {wrong[0]}: expected how many runs share passes, 1 or more")
    where = None if data is None else str(data.absolute())
    return list(
        dict.fromkeys(
            EpochCase(task, where, c.model, c.method, c.targets, c.dtype, c.batch_size, rows, max_length, count)
            for c in cases
            for task in tasks
            for count in together
        )
    )
