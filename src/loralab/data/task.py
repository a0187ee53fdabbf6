"""Task and Split: rows of texts with labels, and the splits, label names and metrics that make a task."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.data.reading import Reading
from loralab.errors import UserError


@dataclass(frozen=True)
class Split:
    """Rows in file order.

    A row is a tuple of texts (of a chat: of (role, content) pairs). A label is a class id, a float for a regression, a
    list of numbers (of tags, say), or None where the texts are all there is to learn.
    """

    texts: list[tuple[Any, ...]]
    labels: list[Any]
    rows: list[int] = field(
        default_factory=list, compare=False
    )  # their numbers in the file, from 1; by default in order

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", list(range(1, len(self.texts) + 1)))
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} rows of text but {len(self.labels)} labels: the numbers must be equal")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> "Split":
        """Return these rows, in this order."""
        rows = list(indices)
        return Split([self.texts[i] for i in rows], [self.labels[i] for i in rows], [self.rows[i] for i in rows])


@dataclass(frozen=True)
class Task:
    """What a model is trained and scored on. `build` makes one: it checks the splits and computes the hash."""

    name: str
    labels: tuple[str, ...] | None  # class names in id order; None where there are no classes, as in a regression
    metrics: tuple[str, ...]  # those of its objective; the first one selects and is reported
    train: Split
    validation: dict[str, Split]  # the first one is reported
    sha256: str  # of the rows and label names as read, whatever file they came from
    notes: tuple[str, ...] = ()  # what the user should know, one sentence each
    objective: str = "classification"  # a row of objectives.OBJECTIVES
    options: Mapping[str, Any] = field(default_factory=dict)  # of that objective, as the template of a chat
    columns: tuple[str, ...] = ()  # of the file, from which the input of a row is read
    label: str | None = None  # its column of labels, where one was named
    reading: Reading | None = field(default=None, compare=False)  # how the files of a user's own were read

    @property
    def num_outputs(self) -> int:
        """Outputs of a head with labels: one for a regression, else one per class."""
        return 1 if self.labels is None else len(self.labels)


def digest(labels: Sequence[str] | None, splits: Mapping[str, Split]) -> str:
    """Return the sha256 of the content: the same rows give the same hash, from parquet, TSV or the hub, everywhere."""
    total = hashlib.sha256(json.dumps(None if labels is None else list(labels)).encode())
    for name, split in splits.items():
        total.update(json.dumps([name, split.texts, split.labels]).encode())
    return total.hexdigest()


def require_two(where: object, labels: Sequence[str] | None, rows: Split) -> None:
    """Raise where all rows have one label, from which nothing can be learned."""
    if len(set(rows.labels)) == 1:
        shown = rows.labels[0] if labels is None else repr(labels[int(rows.labels[0])])
        raise UserError(f"{where}: all labels are {shown} in {len(rows)} rows: at least two different ones are needed")


def build(
    name: str,
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...],
    train: Split,
    validation: dict[str, Split],
    notes: tuple[str, ...] = (),
    objective: str = "classification",
    options: Mapping[str, Any] | None = None,
    columns: tuple[str, ...] = (),
) -> Task:
    """Make the Task of these splits. Raises UserError for what cannot be trained or scored."""
    for split, rows in {"train": train, **validation}.items():
        if not len(rows):
            raise UserError(f"{name}: {split} has no rows; at least one is needed: check the data")
    if objective == "classification" and validation:
        require_two(f"{name} train", labels, train)
    sha256 = digest(labels, {"train": train, **validation})
    return Task(name, labels, metrics, train, validation, sha256, notes, objective, options or {}, columns)
