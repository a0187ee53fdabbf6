"""Multi-label classification: one text or two, and any number of labels."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional as F

from loralab.data import Split, Task, checks, tables
from loralab.data.batches import Rows, tokenized
from loralab.data.own_files import OwnFile, blank_note, divided, read_texts
from loralab.errors import UserError
from loralab.objectives.objective import Array, Encoding, Objective, Sums, f1_of, head_outputs, mean_f1, mean_of, scored

NAME = "multi-label"
METRICS = ("f1_micro", "f1_macro", "exact")
SEPARATOR = ";"  # between the labels of a CSV cell
YES_OR_NO = {"1": True, "0": False, "true": True, "false": False}


def read(file: OwnFile) -> Task:
    """Make the task of a file: a column of lists (`labels`), or with --label A,B,C a column of 0 and 1 for each label.

    A cell of a CSV is a JSON list or names with ; between them. Raises UserError.
    """
    there = tables.names(file.train)
    text = file.text or next((names for names in (("text",), ("sentence",)) if {*names} <= {*there}), ("text",))
    label = file.label or "labels"
    columns = (label,) if label in there else tuple(label.split(","))
    rows, found = _rows(file, file.train, text, columns)
    names = file.names or (columns if len(columns) > 1 else tuple(sorted(set().union(*found))))
    if len(names) < 2:
        raise UserError(f"{file.train}: {len(names)} label in column {label!r}: expected at least two different ones")
    if file.names and len(columns) > 1 and (absent := set(names) - {file.merged(name) for name in columns}):
        raise UserError(
            f"{file.train}: no column of {', '.join(sorted(absent))}, which the adapter tells: name all labels"
        )
    counts = ", ".join(f"{name} ({sum(name in row for row in found)})" for name in names)
    outside = None
    if file.validation is not None:
        outside = Split(*_numbered(file.validation, names, *_rows(file, file.validation, text, columns)))
    notes = [f"labels are read as {len(names)} that a row may have at once: {counts}"]
    split = Split(*_numbered(file.train, names, rows, found))
    notes += [*blank_note(split), *joined_note(names)]
    return divided(file, split, outside, names, METRICS, notes, NAME, text)


def names_columns(label: str, there: Sequence[str]) -> bool:
    """Tell whether a label names columns, with a comma between them."""
    return label not in there and {*label.split(",")} <= {*there}


def joined_note(names: Sequence[str]) -> list[str]:
    """Name the labels that look like several: another mark than SEPARATOR stands between names that are labels too."""
    parts = {name: [part.strip() for part in re.split(r"[,|/+&]", name)] for name in names}
    joined = [name for name, mine in parts.items() if len(mine) > 1 and {*mine} & {*names}]
    listed = ", ".join(map(checks.shown, joined[:5])) + ", ..." * (len(joined) > 5)
    return [f"{listed}: one label each; in a cell {SEPARATOR} stands between labels"] * bool(joined)


def _rows(
    file: OwnFile, path: Path, text: tuple[str, ...], labels: tuple[str, ...]
) -> tuple[list[Any], list[set[str]]]:
    """Return the texts and the labels of each row."""
    columns = tables.read(path, (*text, *labels))
    faults: checks.Faults = {}
    texts = read_texts(columns, text, faults)
    if len(labels) == 1:
        found = checks.convert(columns[labels[0]], _listed, f"column {labels[0]!r}: ", faults)
    else:
        each = [checks.convert(columns[name], _yes, f"column {name!r}: ", faults) for name in labels]
        found = [] if faults else [
            {name for name, yes in zip(labels, row, strict=True) if yes} for row in zip(*each, strict=True)
        ]  # fmt: skip
    checks.raise_faults(path, faults)
    file.check_map(path, set().union(*found) if len(labels) == 1 else {*labels})
    return texts, [{file.merged(name) for name in row} for row in found]


def _listed(cell: Any) -> set[str]:
    if isinstance(cell, str):
        try:
            cell = (
                json.loads(cell) if cell.lstrip().startswith("[") else [x for x in cell.split(SEPARATOR) if x.strip()]
            )
        except ValueError:
            raise ValueError("a cell that begins a JSON list and is none") from None
    if not isinstance(cell, list):
        raise ValueError(f"{checks.kind(cell)} instead of a list of labels")
    names = [checks.literal(value).strip() for value in cell]
    if len(set(names)) < len(names):
        raise ValueError("a label twice")
    if not all(names):
        raise ValueError("an empty label")
    return set(names)


def _yes(cell: Any) -> bool:
    answer = YES_OR_NO.get(checks.literal(cell).strip().lower())
    if answer is None:
        raise ValueError(f"{checks.shown(cell)} instead of 0, 1, true or false")
    return answer


def _numbered(
    path: Path, names: tuple[str, ...], texts: list[Any], found: list[set[str]]
) -> tuple[list[Any], list[Any]]:
    faults: checks.Faults = {}

    def row(mine: set[str]) -> list[int]:
        if new := mine - set(names):
            raise ValueError(f"new value {checks.shown(min(new))}, which train lacks,")
        return [int(name in mine) for name in names]

    labels = checks.convert(found, row, "label: ", faults)
    checks.raise_faults(path, faults)
    return texts, labels


def encode(task: Task, split: Split, tokenizer: Any, how: Encoding) -> Rows:
    """Tokenize texts; the labels are 0 or 1 for each name, (rows, labels)."""
    columns, uncut = tokenized(split.texts, tokenizer, how.max_length)
    return Rows(columns, torch.tensor(split.labels, dtype=torch.float32), uncut, how.max_length)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,): the mean binary cross-entropy over the labels; logits and labels (rows, labels)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def score(task: Task, logits: Array, labels: Array) -> dict[str, float]:
    """Return F1 over all labels, the mean F1 of each, and the share of rows that are right in every label."""
    return scored(sums, METRICS, logits, labels)


def sums(metric: str, logits: Array, labels: Array, names: Sequence[str]) -> Sums | None:
    """Return a metric as sums over rows: of hits, and of labels found and there, in all or by label."""
    if metric not in METRICS:
        return None
    found, there = logits > 0, labels > 0
    if metric == "exact":
        return mean_of((found == there).all(1))
    counts = [(found & there).astype(np.float64), found.astype(np.float64) + there]  # (rows, labels) each
    if metric == "f1_macro":
        return Sums(np.concatenate(counts, axis=1), mean_f1)
    return Sums(np.stack([part.sum(1) for part in counts], axis=1), f1_of)


def parts(task: Task, logits: Array, labels: Array) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and rows of each label."""
    columns = precision_recall_fscore_support(labels, logits > 0, zero_division=0)
    heads = ("precision", "recall", "f1", "rows")
    return {
        name: dict(zip(heads, map(float, row), strict=True))
        for name, row in zip(task.labels or (), zip(*columns, strict=True), strict=True)
    }


def sure(task: Task, logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the probability of what is said of each label of each row (rows * labels,), and whether it is right."""
    chances = expit(logits.astype(np.float64))
    return np.maximum(chances, 1 - chances).ravel(), ((logits > 0) == (labels > 0)).ravel()


def wrong(task: Task, logits: Array, labels: Array) -> Array:
    """Return (rows,): the mean negative log-probability of the labels where one is wrong, else 0."""
    found = np.logaddexp(0, np.where(labels > 0, -1, 1) * logits.astype(np.float64)).mean(1)
    return np.where(((logits > 0) == (labels > 0)).all(1), 0.0, found)


def told(task: Task, row: tuple[Any, ...], label: Any, logits: Array) -> tuple[str, str]:
    """Return the labels of a row, and those that it is given, with ; between them."""
    names = task.labels or ()
    chosen = [SEPARATOR.join(n for n, yes in zip(names, flags, strict=True) if yes) for flags in (label, logits > 0)]
    return chosen[0], chosen[1]


def ask(*cells: Any) -> tuple[tuple[Any, ...], Any]:
    """Return the texts of a row."""
    return checks.texts(*cells), []


def answer(task: Task, row: tuple[Any, ...], logits: Array) -> dict[str, Any]:
    """Return the labels whose probability is above a half, and all probabilities; logits (labels,)."""
    chances = (1 / (1 + np.exp(-logits.astype(np.float64)))).tolist()
    names = task.labels or ()
    found = [name for name, logit in zip(names, logits, strict=True) if logit > 0]
    return {"labels": found, "probabilities": dict(zip(names, chances, strict=True))}


def begin(model: Any, task: Task) -> None:
    """Let transformers use the same loss for the model."""
    model.config.problem_type = "multi_label_classification"


def collapsed(logits: Array, labels: Array) -> bool:
    """Tell whether all rows have the same labels."""
    found = logits > 0
    return bool(np.all(found == found[0]))


OBJECTIVE = Objective(
    name=NAME,
    task_type="SEQ_CLS",
    wants=(("text", "labels"), ("sentence", "labels")),
    read=read,
    encode=encode,
    forward=head_outputs,
    loss=loss,
    score=score,
    begin=begin,
    collapsed=collapsed,
    ask=ask,
    gives=lambda cells: ("labels", "probabilities"),
    answer=answer,
    parts=parts,
    sums=sums,
    sure=sure,
    wrong=wrong,
    told=told,
    takes=("label_map",),
    blank=torch.zeros,
)
