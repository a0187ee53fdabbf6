"""Multiple choice: a question, choices and the right one; a classifier with one output scores each choice."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    """Make the task of a file; the answer is the place of a choice (from 0), its letter (from A), its text or its own
    label. All answers of a file are read in one way, which a note says."""
    outside = None if file.validation is None else _rows(file.validation)[0]
    rows, way = _rows(file.train)
    return divided(file, rows, outside, None, ("accuracy",), [f"answers are read as {way}"], NAME, COLUMNS[:2])


def _rows(path: Path) -> tuple[Split, str]:
    """Return the rows, and the way in which their answers are read: the first of WAYS that fits most of them."""
    columns = tables.read(path, COLUMNS)
    faults: checks.Faults = {}
    questions = checks.convert(columns["question"], checks.text, "column 'question': ", faults)
    choices = checks.convert(columns["choices"], _choices, "column 'choices': ", faults)
    checks.raise_faults(path, faults)
    found = list(zip(choices, columns["answer"], strict=True))
    way = max(WAYS, key=lambda way: sum(WAYS[way](*row) is not None for row in found))
    places = checks.convert(found, lambda row: _place(way, *row), "", faults)
    checks.raise_faults(path, faults)
    texts = [(question, *chosen.texts) for question, chosen in zip(questions, choices, strict=True)]
    return Split(texts, [(p, len(c.texts)) for p, c in zip(places, choices, strict=True)]), way


class Choices(NamedTuple):
    """The choices of a row, and their labels where the file has them, as ARC does."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    numbers: bool = False  # whether they are written as numbers, so that an answer that is a number may be their text


def _choices(cell: Any) -> Choices:
    labels: Any = ()
    if isinstance(cell, dict) and isinstance(cell.get("text"), list):
        cell, labels = cell["text"], cell.get("label") or ()
    if not isinstance(cell, list):
        raise ValueError(f"{checks.kind(cell)} instead of a list of at least two choices")
    if len(cell) < 2:
        raise ValueError(f"{len(cell)} of at least two choices")
    texts = tuple(checks.text(checks.literal(choice)) for choice in cell)
    if len(set(texts)) < len(texts):
        raise ValueError("a choice twice")
    return Choices(texts, tuple(map(checks.literal, labels)), not any(isinstance(choice, str) for choice in cell))


def _by_label(choices: Choices, answer: Any) -> int | None:
    text = checks.literal(answer).strip()
    return choices.labels.index(text) if text in choices.labels else None


def _by_place(choices: Choices, answer: Any) -> int | None:
    text = checks.literal(answer).strip()
    return int(text) if text.isdecimal() and int(text) < len(choices.texts) else None


def _by_text(choices: Choices, answer: Any) -> int | None:
    text = checks.literal(answer).strip()
    able = isinstance(answer, str) or choices.numbers
    return choices.texts.index(text) if able and text in choices.texts else None


def _by_letter(choices: Choices, answer: Any) -> int | None:
    text = checks.literal(answer).strip()
    place = LETTERS.find(text) if len(text) == 1 else -1
    return place if 0 <= place < len(choices.texts) else None


WAYS: dict[str, Callable[[Choices, Any], int | None]] = {  # where two fit equally many rows, the first counts
    "labels of their choices": _by_label,
    "texts of their choices": _by_text,
    "letters of their choices, from A": _by_letter,
    "places of their choices, from 0": _by_place,
}


def _place(way: str, choices: Choices, answer: Any) -> int:
    place = WAYS[way](choices, answer)
    if place is None:
        able = any(of(choices, answer) is not None for of in WAYS.values())
        how = f" (answers of this file are read as {way})" if able else ""
        raise ValueError(f"the answer {checks.shown(answer)}, which is none of its {len(choices.texts)} choices{how}")
    return place


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
    scores = logits.reshape(len(labels), -1)
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
    texts = _choices(choices).texts
    return (checks.text(question), *texts), (0, len(texts))


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
    gives=lambda cells: ("answer", "probabilities"),
    answer=answer,
    sums=sums,
    sure=sure,
    wrong=wrong,
    told=told,
    blank=lambda sequences, outputs: torch.tensor([[0, sequences]]),  # one row with as many choices
    collapsed=lambda scores, labels: bool((scores.argmax(1) == scores.argmax(1)[0]).all()),
)
