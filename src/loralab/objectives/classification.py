"""Classification and regression: one text or two, a class or a score."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.data import Split, Task, own_files, tables
from loralab.data.batches import Rows, tokenized
from loralab.data.endpoints import endpoints, threshold_of
from loralab.data.metrics import is_constant, is_flat, is_regression, score
from loralab.data.own_files import OwnFile
from loralab.objectives.objective import Array, Encoding, Objective, head_outputs

COLUMNS = (
    ("text", "label"),
    ("sentence", "label"),
    ("sentence1", "sentence2", "label"),
    ("premise", "hypothesis", "label"),
    ("question", "sentence", "label"),
)
SCORE = ("score",)  # the name of a regression's output


def read(file: OwnFile) -> Task:
    """Make the task of a file; without --text and --label its columns are one of COLUMNS. Raises UserError."""
    if not file.text and file.label is None:
        there = {*tables.names(file.train)}
        if fits := [names for names in COLUMNS if {*names} <= there]:
            *text, label = max(fits, key=len)
            file = replace(file, text=tuple(text), label=label)
    return own_files.load(file)


def encode(task: Task, split: Split, tokenizer: Any, how: Encoding) -> Rows:
    """Tokenize texts; the label is that of the row."""
    columns, uncut = tokenized(split.texts, tokenizer, how.max_length)
    labels = torch.tensor(split.labels, dtype=torch.float32 if task.labels is None else torch.int64)  # (rows,)
    return Rows(columns, labels, uncut, how.max_length)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,): cross-entropy for int64 labels, squared error for float labels; logits (rows, outputs)."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def class_weights(names: Sequence[str], labels: Tensor) -> Tensor:
    """Return (classes,) weights that give every class the same part of the loss; their mean over labels (rows,) is 1.

    A class without rows weighs as one with one row.
    """
    counts = torch.bincount(labels, minlength=len(names))
    return len(labels) / (len(names) * counts.clamp(min=1).float())


def weighted_loss(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,): the loss of each row times the weight (classes,) of its class."""
    return loss(logits, labels) * weights.to(logits.device)[labels]


def scores(task: Task, logits: Array, labels: Array) -> dict[str, float]:
    """Return the metrics of the task from logits (rows, outputs) and labels (rows,)."""
    return score(task.metrics, logits, labels)


def parts(task: Task, logits: Array, labels: Array) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and rows of each class."""
    if task.labels is None:
        return {}
    ids = range(len(task.labels))
    columns = precision_recall_fscore_support(labels, logits.argmax(1), labels=ids, zero_division=0)
    heads = ("precision", "recall", "f1", "rows")
    return {
        name: dict(zip(heads, map(float, row), strict=True))
        for name, row in zip(task.labels, zip(*columns, strict=True), strict=True)
    }


def metrics(task: Task) -> tuple[str, ...]:
    """Return all metrics of two classes, of more, or of scores."""
    if task.labels is None:
        return ("pearson", "spearman")
    return ("accuracy", "f1_macro", "matthews_correlation", *(["f1"] if len(task.labels) == 2 else []))


def confusion(task: Task, logits: Array, labels: Array) -> Array | None:
    """Return counts (label, prediction); None of a regression."""
    if task.labels is None:
        return None
    n = len(task.labels)
    return np.bincount(labels.astype(int) * n + logits.argmax(1), minlength=n * n).reshape(n, n)


def sure(task: Task, logits: Array, labels: Array) -> tuple[Array, Array] | None:
    """Return the probability of each answer (rows,), and whether it is right (rows,); None of a regression."""
    if task.labels is None:
        return None
    return softmax(logits.astype(np.float64), axis=1).max(1), logits.argmax(1) == labels


def wrong(task: Task, logits: Array, labels: Array) -> Array:
    """Return (rows,): the negative log-probability of the label where the answer is another, else 0; of a score how far
    off it is."""
    if task.labels is None:
        return np.asarray(np.abs(logits[:, 0] - labels))
    found = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels.astype(int)]
    return np.where(logits.argmax(1) == labels, 0.0, found)


def told(task: Task, row: tuple[Any, ...], label: Any, logits: Array) -> tuple[str, str]:
    """Return label and answer of a row as texts."""
    if task.labels is None:
        return f"{label:g}", f"{logits[0]:.4g}"
    return task.labels[int(label)], task.labels[int(logits.argmax())]


def answer(task: Task, row: tuple[Any, ...], logits: Array) -> dict[str, Any]:
    """Return the label and its probabilities, or the number of a regression; logits (outputs,)."""
    if task.labels is None:
        return {"label": float(logits[0])}
    return {"label": task.labels[int(logits.argmax())], "probabilities": shares(task.labels, logits)}


def shares(names: Sequence[str], logits: Array) -> dict[str, float]:
    """Return the softmax of logits (names,) by name."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return dict(zip(names, (weights / weights.sum()).tolist(), strict=True))


def collapsed(logits: Array, labels: Array) -> bool:
    """Tell whether all rows have one class, or nearly one value that does not follow the labels."""
    return is_flat(logits[:, 0], labels) if is_regression(logits) else is_constant(logits)


def center(model: Any, task: Task) -> None:
    """Start a regression head at the mean label. From 0 the first steps push the mean through the whole network, which
    at LoRA's learning rates ruins it (docs/decisions.md)."""
    if task.labels is not None:
        return
    outputs = [
        m for child in model.children() for m in child.modules() if isinstance(m, nn.Linear) and m.out_features == 1
    ]
    if outputs and outputs[-1].bias is not None:
        nn.init.constant_(outputs[-1].bias, sum(task.train.labels) / len(task.train))


OBJECTIVE = Objective(
    name="classification",
    task_type="SEQ_CLS",
    wants=COLUMNS,
    read=read,
    encode=encode,
    forward=head_outputs,
    loss=loss,
    score=scores,
    begin=center,
    names=lambda task: task.labels or SCORE,
    collapsed=collapsed,
    answer=answer,
    parts=parts,
    metrics=metrics,
    confusion=confusion,
    sure=sure,
    wrong=wrong,
    told=told,
    takes=("label_map",),
    threshold=threshold_of,
    endpoints=endpoints,
)
