"""What is left of a study in time and memory: from finished runs of the same model and task, else an estimate.

An estimate takes a step on tensors without data (run/estimate.py), and how fast this machine multiplies. Its seconds
are rough: a step is not products alone, and starts, rank policies and loading are left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from loralab import data, models, objectives
from loralab.data.batches import epoch_batches, width
from loralab.errors import UserError
from loralab.fast.machine import hardware, rate
from loralab.objectives import Encoding
from loralab.run import Settings
from loralab.run.estimate import EstimateSettings
from loralab.run.estimate import estimate as estimate_step
from loralab.run.settings import SOURCE
from loralab.run.setup import splits, task_of
from loralab.study.address import is_here
from loralab.study.record import Key, Run

SAMPLE = 1000  # training rows whose lengths stand for all
REACHED = 0.5  # of the rate of a large product, by a step; docs/benchmarks.md has 0.43 to 0.76
EVALUATION = 0.5  # of the products of a step on the same rows, by evaluating them
SPEED = ("machine", "cpu", "amx", "gpu")  # of the hardware: where these differ, so do times and memory
OF_ROWS = (*SOURCE, "model", "selection", "held_out", "max_length", "batch_size", "train_rows", "validation_rows")


@dataclass(frozen=True)
class StudyEstimate:
    seconds: float  # of training, of all runs but the unknown ones
    peak_bytes: int  # of the largest run
    guessed: int  # runs, by finished ones like them
    planned: int  # runs, by an estimate of a step
    unknown: int  # runs whose model or rows are not on this machine


@dataclass(frozen=True)
class RunEstimate:
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class EpochRows:
    """What training and evaluation of an epoch go through."""

    objective: str
    train: int
    evaluated: int  # after each epoch
    once: int  # at the end alone
    labels: int  # outputs of the head
    mean: float  # tokens that batches are padded to
    widest: int
    sequences: int  # of a row


def estimate(left: Sequence[tuple[Key, Settings]], finished: Iterable[Run]) -> StudyEstimate:
    """Of runs: seconds an epoch of the same method, else of any, on the same task and model, else an estimate.

    Finished runs of another kind of machine, as of another GPU, say nothing of time and memory here.
    """
    pace: dict[tuple[str, ...], list[float]] = {}
    peak: dict[tuple[str, ...], int] = {}
    for run in finished:
        for key in _like(run.scheduled.key, run.facts["hardware"]):
            pace.setdefault(key, []).append(run.result["time"]["train_s"] / max(len(run.history), 1))
            peak[key] = max(peak.get(key, 0), run.result["memory"]["peak_bytes"])
    nearest = [next((x for x in _like(key, hardware(s.gpu)) if x in pace), None) for key, s in left]
    alike = [(near, s.epochs) for near, (_, s) in zip(nearest, left, strict=True) if near]
    others = [(key, s) for near, (key, s) in zip(nearest, left, strict=True) if not near]
    by_cell = {key: estimate_run(s) for key, s in dict(others).items()}  # one for all seeds of a cell
    estimated = [made for key, _ in others if (made := by_cell[key])]
    return StudyEstimate(
        seconds=sum(median(pace[key]) * epochs for key, epochs in alike) + sum(e.seconds for e in estimated),
        peak_bytes=max([*(peak[key] for key, _ in alike), *(e.peak_bytes for e in estimated)], default=0),
        guessed=len(alike),
        planned=len(estimated),
        unknown=len(left) - len(alike) - len(estimated),
    )


def _like(key: Key, machine: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """What a run of this cell is like, the nearest first."""
    speed = tuple(str(machine.get(part)) for part in SPEED)
    return (*key, *speed), (*key[:2], *speed)


def estimate_run(s: Settings) -> RunEstimate | None:
    """Of a run alone; None where the model or the rows are still on the hub, and where a step cannot be estimated."""
    if not is_here(s):
        return None
    rows = _rows(s.only(OF_ROWS))
    batch = -(-s.batch_size // s.accumulate) * rows.sequences
    step = EstimateSettings.of_run(s, rows.labels, rows.objective, batch, rows.widest)
    try:
        found = estimate_step(step, s.recipe())
    except UserError:
        return None
    of_row = rows.sequences * found.products / batch * rows.mean / rows.widest  # nearly linear in the length
    operations = of_row * (s.epochs * (rows.train + EVALUATION * rows.evaluated) + EVALUATION * rows.once)
    return RunEstimate(operations / (REACHED * _rate(s.precision)), found.peak)


_rate = cache(rate)


@cache
def _rows(s: Settings) -> EpochRows:
    task = task_of(s)
    found, _ = splits(task, s)
    train = some = found["train"]
    if len(train) > SAMPLE:
        some = train.take(data.sample(train, task.sha256, task.labels is not None, SAMPLE))
    tokens = objectives.of(task).encode(task, some, models.tokenizer(s.model), Encoding(s.max_length, train=True))
    widths = [width(tokens, chosen) for chosen in epoch_batches(tokens.lengths, s.batch_size, 0, 0)]
    held_out = len(found.get("held-out", ()))
    reported = sum(len(found[name]) for name in task.validation)
    evaluated, once = (held_out, reported) if s.reads_validation_once else (held_out + reported, 0)
    return EpochRows(
        objective=task.objective,
        train=len(train),
        evaluated=evaluated,
        once=once,
        labels=objectives.of(task).outputs(task) or 1,
        mean=sum(widths) / len(widths),
        widest=max(widths),
        sequences=tokens.sequences,
    )
