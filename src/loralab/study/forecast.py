"""What a run like none that is finished would take: a step on tensors without data (train/planner.py), and how fast
this machine multiplies.

Seconds are rough: a step is not products alone, and starts, plans and loading are left out.
"""

from dataclasses import dataclass
from functools import cache

from loralab import data, models
from loralab.data.batches import encode, epoch_batches, width
from loralab.errors import UserError
from loralab.fast.machine import rate
from loralab.run import Settings
from loralab.run.estimate import EstimateSettings, estimate
from loralab.run.settings import SOURCE
from loralab.run.setup import splits, task_of
from loralab.study.address import is_here

SAMPLE = 1000  # training rows whose lengths stand for all
REACHED = 0.5  # of the rate of a large product, by a step; docs/benchmarks.md has 0.43 to 0.76
EVALUATION = 0.5  # of the products of a step on the same rows, by evaluating them
OF_ROWS = (*SOURCE, "model", "selection", "max_length", "batch_size", "train_rows", "validation_rows")


@dataclass(frozen=True)
class Forecast:
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Rows:
    """What training and evaluation of an epoch go through."""

    train: int
    evaluated: int
    labels: int  # outputs of the head
    mean: float  # tokens that batches are padded to
    widest: int


def forecast(s: Settings) -> Forecast | None:
    """Of a run alone; None where the model or the rows are still on the hub, and where the planner says no."""
    if not is_here(s):
        return None
    rows = _rows(s.only(OF_ROWS))
    batch = -(-s.batch_size // s.accumulate)
    how = "off" if s.speed == "compile" else s.speed
    step = EstimateSettings(
        model=s.model, targets=s.targets, batch_size=batch, max_length=rows.widest, labels=rows.labels,
        dtype=s.dtype, speed=how,
    )  # fmt: skip
    try:
        found = estimate(step, s.recipe())
    except UserError:
        return None
    a_row = found.products / batch * rows.mean / rows.widest  # products are nearly linear in the length
    operations = s.epochs * a_row * (rows.train + EVALUATION * rows.evaluated)
    return Forecast(operations / (REACHED * _rate(s.precision)), found.peak)


_rate = cache(rate)


@cache
def _rows(s: Settings) -> Rows:
    task = task_of(s)
    found, _ = splits(task, s)
    train = some = found["train"]
    if len(train) > SAMPLE:
        some = train.take(data.sample(train, task.sha256, task.labels is not None, SAMPLE))
    tokens = encode(some, models.tokenizer(s.model), s.max_length, task.labels is None)
    widths = [width(tokens, chosen) for chosen in epoch_batches(tokens.lengths, s.batch_size, 0, 0)]
    evaluated = sum(len(split) for name, split in found.items() if name != "train")
    return Rows(len(train), evaluated, task.num_outputs, sum(widths) / len(widths), max(widths))
