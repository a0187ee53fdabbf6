"""Objective: what a kind of task is, as one row of functions. A file of this folder is a row.

The training loop knows no objective. It collates rows, calls `forward` on the batch, adds up the `loss` of the rows,
divides by what the step's rows weigh (Rows.weight), and keeps what `predict` gives for `score`. Weights are known
before the step, so a step is the same however its rows are divided among parts and processes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loralab.data import Split, Task, checks
from loralab.data.batches import Rows
from loralab.data.own_files import OwnFile
from loralab.inputs import IGNORED

WRITTEN = "answer"  # the column of an answer that the model writes
Batch = Mapping[str, Tensor]  # (sequences, t): what the model takes, and `labels` where tokens have labels
Array = NDArray[Any]


@dataclass(frozen=True)
class Encoding:
    """What decides how a split becomes tokens."""

    max_length: int  # tokens
    train: bool  # whether the rows are trained on, or evaluated
    pack: bool = False  # whether rows that are trained on share sequences


class Sums(NamedTuple):
    """A metric as a function of sums over rows, so that it is known of any rows: of all, or of a resample."""

    parts: Array  # (rows, k) what each row adds
    score: Callable[[Array], Array]  # sums (..., k) -> the metric (...)


def ask_texts(*cells: Any) -> tuple[tuple[Any, ...], Any]:
    """Return the texts of a row, with a label that stands for none."""
    return checks.texts(*cells), 0


def blank_labels(rows: int, outputs: int) -> Tensor:
    """Return a label a row (rows,), a class or a number."""
    return torch.zeros(rows, dtype=torch.long if outputs > 1 else torch.float32)


@dataclass(frozen=True)
class Objective:
    """A kind of task."""

    name: str
    task_type: str
    """PEFT's name of it, which decides the model class."""
    wants: tuple[tuple[str, ...], ...]
    """Columns by which it knows its files, any one of these."""
    read: Callable[[OwnFile], Task]
    """Rows of a file; raises UserError."""
    encode: Callable[[Task, Split, Any, Encoding], Rows]
    """Task, split and tokenizer to tokens."""
    forward: Callable[[nn.Module, Batch], Tensor]
    """Run the model on a batch; returns outputs (sequences, ...). Runs whose objectives share it share passes."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Outputs (rows, ...), labels of rows (rows, ...) or of tokens (rows, t) -> the loss of each row (rows,), a sum."""
    score: Callable[[Task, Array, Array], dict[str, float]]
    """Task, predictions (rows, ...), labels (rows, ...) -> its metrics by name."""
    outputs: Callable[[Task], int | None] = lambda task: task.num_outputs
    """Outputs of a new head; None where the model's own head is used, or none."""
    predict: Callable[[Tensor, Tensor], Tensor] = lambda outputs, labels: outputs
    """Outputs and labels, as for `loss` -> what is kept of each row (rows, ...)."""
    begin: Callable[[Any, Task], None] = lambda model, task: None
    """Set a head that is new."""
    prepare: Callable[[Any], None] = lambda model: None
    """Look at a plain model before adapters are attached."""
    names: Callable[[Task], tuple[str, ...]] = lambda task: task.labels or ()
    """Names of the head's outputs."""
    collapsed: Callable[[Array, Array], bool] = lambda predictions, labels: False
    """Predictions and labels (rows, ...) -> whether all rows are predicted the same, so that nothing was learned."""
    blank: Callable[[int, int], Tensor] = blank_labels
    """Sequences of a batch and outputs of the head -> labels of its rows, for a step whose values do not matter."""
    whole: Callable[[Task], bool] = lambda task: False
    """Whether the loss compares the rows of a step, so that a step cannot be divided."""
    threshold: Callable[[str, Array, Array], float | None] = lambda metric, predictions, labels: None
    """Metric, predictions and labels of held-out rows -> the best threshold of a decision, where there is one."""
    endpoints: Callable[[str, Array, Array, float | None], dict[str, float]] = lambda *rest: {}
    """Metric, predictions, labels and threshold -> what a comparison may look at beside the metrics."""
    ask: Callable[..., tuple[tuple[Any, ...], Any]] = ask_texts
    """The cells of a row to answer -> the row and a label that stands for none; raises ValueError."""
    answer: Callable[[Task, tuple[Any, ...], Array], dict[str, Any]] | None = None
    """Task, row and its prediction -> the columns of its answer; None where the model always writes it."""
    gives: Callable[[tuple[Any, ...]], tuple[str, ...]] = lambda cells: ("label", "probabilities")
    """The cells of a row -> the columns that its answer may have, where the model does not write it."""
    alone: bool = False
    """Whether one text of the two that it learned from is answered too, as with its embedding."""
    own_words: bool = False
    """Whether the model writes its answers, unless its task has labels to choose from."""
    parts: Callable[[Task, Array, Array], dict[str, dict[str, float]]] = lambda task, predictions, labels: {}
    """Task, predictions and labels, as for `score` -> the metrics of each class or type."""
    sums: Callable[[str, Array, Array, Sequence[str]], Sums | None] = lambda metric, predictions, labels, names: None
    """Metric, predictions, labels (rows, ...) and label names -> the metric as sums; None where a label is a class or a
    score of its row, which statistics of a study resample by themselves."""
    confusion: Callable[[Task, Array, Array], Array | None] = lambda task, predictions, labels: None
    """The same -> how often each label got each answer (labels, labels), None where a row has no single label."""
    sure: Callable[[Task, Array, Array], tuple[Array, Array] | None] = lambda task, predictions, labels: None
    """The same -> the probability of each answer and whether it is right (answers,), None where none is given."""
    wrong: Callable[[Task, Array, Array], Array | None] = lambda task, predictions, labels: None
    """The same -> how wrong each row is (rows,), 0 where it is right, None where that cannot be said."""
    told: Callable[[Task, tuple[Any, ...], Any, Array], tuple[str, str]] = lambda task, row, label, prediction: ("", "")
    """Task, row, its label in the split and its prediction -> what is right and what is answered, as texts."""
    metrics: Callable[[Task], tuple[str, ...]] = lambda task: ()
    """Metrics that it can compute besides those of the task."""
    takes: tuple[str, ...] = ()
    """Names of its options."""
    asked: Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], str]] | None = None
    """A row -> the prompt that the model answers, and the right answer; None where it writes none. Raises UserError."""
    of: Callable[[Task, Mapping[str, Any]], Task] | None = None
    """Make its task of a classification or regression by name (cola, stsb, ...), with options; None if it cannot."""

    @property
    def new_head(self) -> bool:
        """Whether a run draws a head anew."""
        return self.task_type in ("SEQ_CLS", "TOKEN_CLS")

    def lacking(self, cells: Sequence[Any], columns: Sequence[str]) -> str | None:
        """Say that a row, or the columns that are its cells, are not as many as the `columns` that it learned from."""
        if not columns or len(cells) == len(columns) or self.alone:
            return None
        return f"{len(cells)} given, and the adapter learned from {len(columns)}: {', '.join(columns)}"

    def writes(self, labels: Sequence[str] | None) -> bool:
        """Return whether an answer is a text that the model writes, given the labels of the task."""
        return self.own_words and labels is None


def head_outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a classifier (sequences, outputs), or of a tagger (sequences, t, outputs), in float32."""
    logits: Tensor = model(**{key: t for key, t in batch.items() if key != "labels"}).logits
    return logits.float()


def by_row(outputs: Tensor, rows: int, width: int | None = None) -> Tensor:
    """Return outputs (sequences, ...) by row: (rows, ...) or (rows, its sequences, ...); at most `width` of each."""
    own = outputs if width is None else outputs[..., :width]
    return own if len(own) == rows else own.view(rows, -1, *own.shape[1:])


def share(sums: Array) -> Array:
    """Return sums (..., 2) as a share: the first over the second, 0 where that is 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def f1_of(sums: Array) -> Array:
    """Return F1 of sums (..., 2): what is right, and what is found plus what is there; 0 where nothing is either."""
    return 2 * share(sums)


def mean_f1(sums: Array) -> Array:
    """Return the mean F1 of classes; sums (..., 2 classes): what is right of each, then what is found and there."""
    pairs = np.stack(np.split(sums, 2, axis=-1), axis=-1)  # (..., classes, 2)
    return np.asarray(f1_of(pairs).mean(-1))


def mean_of(parts: Array) -> Sums:
    """Return a metric that is the mean of its parts (rows,)."""
    return Sums(np.stack([parts, np.ones(len(parts))], axis=1).astype(np.float64), share)


def scored(
    sums: Callable[[str, Array, Array, Sequence[str]], Sums | None],
    metrics: Sequence[str],
    predictions: Array,
    labels: Array,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Return the metrics of an objective that says them as sums over rows."""
    found = {metric: sums(metric, predictions, labels, names) for metric in metrics}
    return {metric: float(of.score(of.parts.sum(0))) for metric, of in found.items() if of is not None}


def ragged(parts: list[Array]) -> Array:
    """Stack predictions (rows, ...) of batches whose last axis may differ: it is filled up with IGNORED."""
    widest = max(part.shape[-1] for part in parts)
    return np.concatenate(
        [
            np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, widest - part.shape[-1])], constant_values=IGNORED)
            if part.ndim > 1
            else part
            for part in parts
        ]
    )
