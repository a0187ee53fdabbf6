"""A user's own CSV, TSV, JSON or parquet file as a Task: one or two columns of text, a column of labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loralab.data import checks, labels, tables
from loralab.data.reading import numbers
from loralab.data.selection import has_strata, held_out
from loralab.data.task import Split, Task, build, digest, require_two
from loralab.errors import UserError

FRACTION = 0.2  # of the rows validate where no validation file is given


@dataclass(frozen=True)
class OwnFile:
    """A file of one's own, and what the user says about it."""

    train: Path
    validation: Path | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    regression: bool | None = None  # None: guess from how the labels look
    options: Mapping[str, Any] = field(default_factory=dict)  # of an objective, as the template of a chat
    names: tuple[str, ...] | None = None  # labels that are known; None: those of the file
    whole: bool = False  # whether all rows are one split, as where a trained adapter is evaluated

    @cached_property
    def label_map(self) -> dict[str, str]:
        """Labels -> the labels that they count as, as --label-map gives them."""
        return dict(json.loads(self.options.get("label_map", "{}")))

    def merged(self, label: Any) -> Any:
        """Return a label as it counts."""
        return self.label_map.get(checks.literal(label), label) if self.label_map else label

    def check_map(self, path: Path, there: set[str]) -> None:
        """Raise UserError for a label map that merges none of the labels `there` of the file that is trained on."""
        if self.label_map and not self.whole and path == self.train and not there & set(self.label_map):
            raise UserError(
                f"--label-map names {', '.join(map(checks.shown, list(self.label_map)[:5]))}, and {path} has none of "
                f"them: its labels are {', '.join(map(checks.shown, sorted(there)[:10]))}"
            )

    def __post_init__(self) -> None:
        for path in (self.train, self.validation):
            if path is not None and path.suffix.lower() not in tables.READERS:
                raise UserError(f"{path}: a file ending in {', '.join(tables.READERS)} was expected")
        if self.validation is not None and self.validation.resolve() == self.train.resolve():
            raise UserError(
                f"{self.train} is both train and validation: give another file, or none to hold out a fifth"
            )


def load(file: OwnFile) -> Task:
    """Make the classification or regression of a file.

    Numbers with a fraction make a regression unless `regression` says otherwise; other labels name classes. Raises
    UserError for a file that cannot be learned from.
    """
    label = _check(file)
    texts, values = _read(file, file.train, label)
    regression = labels.is_regression(file.train, values) if file.regression is None else file.regression
    names = None if regression else file.names or labels.class_names(values)
    if regression and file.label_map:
        raise UserError(f"{file.train}: --label-map with scores as labels: there are no classes to merge, leave it out")

    def ids(path: Path, values: list[Any]) -> list[int] | list[float]:
        return labels.numbers(path, label, values) if names is None else labels.class_ids(path, names, values)

    rows = Split(texts, ids(file.train, values))
    if not file.whole:
        require_two(file.train, names, rows)
    outside = None
    if file.validation is not None:
        others = _read(file, file.validation, label)
        outside = Split(others[0], ids(file.validation, others[1]))
    notes = [*labels.notes(values, names), *blank_note(rows)]
    return divided(file, rows, outside, names, _metrics(names), notes, columns=file.text)


def divided(
    file: OwnFile,
    rows: Split,
    outside: Split | None,
    names: tuple[str, ...] | None,
    metrics: tuple[str, ...],
    notes: Sequence[str],
    objective: str = "classification",
    columns: Sequence[str] = (),
) -> Task:
    """Make the task of a file's rows and those of its validation file; without one a fifth is held out for it.

    `columns` are those from which the input of a row is read.
    """
    notes = list(notes)
    rows = replace(rows, rows=numbers(file.train, range(1, len(rows) + 1)))
    if outside is not None and file.validation is not None:
        outside = replace(outside, rows=numbers(file.validation, range(1, len(outside) + 1)))
    more = (objective, file.options, tuple(columns))
    if file.whole:
        return replace(build(file.train.stem, names, metrics, rows, {}, tuple(notes), *more), label=file.label)
    if outside is None:
        inside, outside = _divided(file.train, rows, names)
        by = "stratified by label" if has_strata(rows) else "drawn by the data's hash"
        notes.append(f"no validation file: {len(outside)} of {len(rows)} rows are held out for it, {by}")
    else:
        inside = rows
    repeated = sum(map(set(inside.texts).__contains__, outside.texts))
    notes += [f"{repeated} of {len(outside)} rows of validation have the text of a row of train"] * bool(repeated)
    made = build(file.train.stem, names, metrics, inside, {"validation": outside}, tuple(notes), *more)
    return replace(made, label=file.label)


def _divided(path: Path, rows: Split, names: tuple[str, ...] | None) -> tuple[Split, Split]:
    """Divide the rows into train and a fifth that validates, by the data's hash."""
    try:
        inside, outside = held_out(rows, digest(names, {"train": rows}), names is not None, FRACTION, len(rows))
    except UserError as problem:
        raise UserError(f"{path}: {problem}, or give a validation file") from None
    return rows.take(inside), rows.take(outside)


def _check(file: OwnFile) -> str:
    """Check the columns of text and label before the rows are read; returns the label column."""
    train, text, label = file.train, file.text, file.label
    if not 1 <= len(text) <= 2 or label is None:
        given = f"text columns {', '.join(text) or 'none'} and label column {label or 'none'} given"
        there = ", ".join(map(checks.one_line, tables.names(train)))
        raise UserError(f"{train}: {given}; name one or two (--text) and one (--label) of {there}")
    if len({*text, label}) < len(text) + 1:
        raise UserError(f"{train}: {', '.join((*text, label))} name a column twice: text and label need a column each")
    return label


def read_texts(columns: tables.Columns, text: Sequence[str], faults: checks.Faults) -> list[tuple[str, ...]]:
    """Return the texts of each row; of two columns one may be empty. What cannot be is added to `faults`."""
    if len(text) == 2:
        where = f"columns {text[0]!r} and {text[1]!r}: "
        rows = zip(*(columns[name] for name in text), strict=True)
        return checks.convert(rows, lambda cells: checks.texts(*cells), where, faults)
    found = [checks.convert(columns[name], checks.text, f"column {name!r}: ", faults) for name in text]
    return list(zip(*found, strict=False))


def _read(file: OwnFile, path: Path, label: str) -> tuple[list[tuple[str, ...]], list[Any]]:
    """Read the texts and labels of a file; all that is wrong in them is one message."""
    columns = tables.read(path, (*file.text, label))
    faults: checks.Faults = {}
    texts = read_texts(columns, file.text, faults)
    values = checks.convert(columns[label], labels.check, f"column {label!r}: ", faults)
    checks.raise_faults(path, faults)
    file.check_map(path, set(map(checks.literal, values)))
    values = [file.merged(value) for value in values]
    labels.check_types(path, label, values)
    if set(map(checks.literal, values)) == {"-1"}:
        raise UserError(
            f"{path}: all of column {label!r} is -1, as in a test split without labels: give a labelled file"
        )
    return texts, values


def blank_note(rows: Split) -> list[str]:
    """Say how many rows have one of their two texts only."""
    count = sum(len(texts) > 1 and not all(texts) for texts in rows.texts)
    return [f"{count} of {len(rows)} rows have one of their two texts only: the other is read as blank"] * bool(count)


def _metrics(names: tuple[str, ...] | None) -> tuple[str, ...]:
    if names is None:
        return ("pearson", "spearman")
    return ("accuracy", "f1", "matthews_correlation") if len(names) == 2 else ("accuracy", "f1_macro")
