"""Multiple choice: a question, choices and the right one; a classifier with one output scores each choice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor
from torch.nn import functional as F

from loralab.data import Split, Task, checks, tables
from loralab.data.batches import Rows, tokenized
from loralab.data.own_files import OwnFile, divided
from loralab.objectives.classification import shares
from loralab.objectives.objective import Array, Encoding, Objective, Sums, head_outputs, mean_of, scored

NAME = "multiple-choice"
COLUMNS = ("question", "choices", "answer")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read(file: OwnFile) -> Task:
    """Make the task of a file; the answer is the place of a choice (from 0), its letter (from A) or its text."""
    outside = None if file.validation is None else _rows(file.validation)
    return divided(file, _rows(file.train), outside, None, ("accuracy",), [], NAME, COLUMNS[:2])


def _rows(path: Path) -> Split:
    columns = tables.read(path, COLUMNS)
    faults: checks.Faults = {}
    rows = checks.convert(zip(*columns.values(), strict=True), lambda row: _row(*row), "", faults)
    checks.raise_faults(path, faults)
    return Split([row[0] for row in rows], [row[1:] for row in rows])


def _row(question: Any, choices: Any, answer: Any) -> tuple[tuple[str, ...], int, int]:
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # as ARC has them
        choices = choices["text"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{checks.kind(choices)} instead of a list of at least two choices")
    texts = [checks.text(checks.literal(choice)) for choice in choices]
    if len(set(texts)) < len(texts):
        raise ValueError("a choice twice")
    text = checks.literal(answer).strip()
    place = LETTERS.find(text) if len(text) == 1 and text.isalpha() else -1
    place = texts.index(text) if text in texts else place
    if place < 0 and text.isdecimal():
        place = int(text)
    if not 0 <= place < len(texts):
        raise ValueError(f"the answer {checks.shown(answer)}, which is none of its {len(texts)} choices")
    return (checks.text(question), *texts), place, len(texts)


def encode(task: Task, split: Split, tokenizer: Any, how: Encoding) -> Rows:
    """Tokenize question and choice as pairs; a row has as many sequences as the longest list has choices.

    Rows.labels are (rows, 2): the right choice, and how many there are; the sequences after them repeat the first.
    """
    most = max(count for rows in (task.train, *task.validation.values()) for _, count in rows.labels)
    pairs = [
        (question, choices[i] if i < len(choices) else choices[0])
        for question, *choices in split.texts
        for i in range(most)
    ]
    columns, uncut = tokenized(pairs, tokenizer, how.max_length)
    return Rows(columns, torch.tensor(split.labels), uncut, how.max_length, sequences=most)


def predict(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows, choices): the score of each choice, -inf where there is none; logits (rows, choices, 1)."""
    scores = logits.squeeze(-1)
    absent = torch.arange(scores.shape[1], device=scores.device) >= labels[:, 1:]  # (rows, choices)
    return scores.masked_fill(absent, float("-inf"))


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,): the cross-entropy over the choices of a row."""
    return F.cross_entropy(predict(logits, labels), labels[:, 0], reduction="none")


def score(task: Task, scores: Array, labels: Array) -> dict[str, float]:
    """Return the share of rows whose right choice has the highest score."""
    return scored(sums, task.metrics, scores, labels)


def sums(metric: str, scores: Array, labels: Array, names: Sequence[str]) -> Sums | None:
    """Return accuracy as sums over rows."""
    return mean_of(scores.argmax(1) == labels[:, 0]) if metric == "accuracy" else None


def sure(task: Task, scores: Array, labels: Array) -> tuple[Array, Array]:
    """Return the probability of each chosen answer (rows,), and whether it is right."""
    return softmax(scores.astype(np.float64), axis=1).max(1), scores.argmax(1) == labels[:, 0]


def wrong(task: Task, scores: Array, labels: Array) -> Array:
    """Return (rows,): the negative log-probability of the right choice where another is chosen, else 0."""
    found = -log_softmax(scores.astype(np.float64), axis=1)[np.arange(len(labels)), labels[:, 0].astype(int)]
    return np.where(scores.argmax(1) == labels[:, 0], 0.0, found)


def told(task: Task, row: tuple[Any, ...], label: Any, scores: Array) -> tuple[str, str]:
    """Return the right choice of a row, and the chosen one."""
    return str(row[1 + int(label[0])]), str(row[1 + int(scores.argmax())])


def ask(question: Any, choices: Any) -> tuple[tuple[Any, ...], Any]:
    """Return question and choices of a row."""
    texts, _, count = _row(question, choices, 0)
    return texts, (0, count)


def answer(task: Task, row: tuple[Any, ...], scores: Array) -> dict[str, Any]:
    """Return the choice with the highest score, and the probabilities of all; scores (choices,)."""
    choices = row[1:]
    found = shares(choices, scores[: len(choices)])
    return {"answer": max(found, key=found.__getitem__), "probabilities": found}


OBJECTIVE = Objective(
    name=NAME,
    task_type="SEQ_CLS",
    wants=(COLUMNS,),
    read=read,
    encode=encode,
    forward=head_outputs,
    loss=loss,
    score=score,
    outputs=lambda task: 1,
    predict=predict,
    names=lambda task: ("score",),
    ask=ask,
    answer=answer,
    sums=sums,
    sure=sure,
    wrong=wrong,
    told=told,
    collapsed=lambda scores, labels: bool((scores.argmax(1) == scores.argmax(1)[0]).all()),
)
