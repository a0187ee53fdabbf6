"""A user's own CSV, TSV, JSON or parquet file as a Task: one or two columns of text, a column of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.data import checks, labels, tables
from loralab.data.selection import held_out
from loralab.data.task import Split, Task, build, digest, require_two
from loralab.errors import UserError

FRACTION = 0.2  # of the rows validate where no validation file is given


def load(
    train: Path,
    validation: Path | None,
    text: Sequence[str],
    label: str | None,
    regression: bool | None = None,
) -> Task:
    """Make the task of a file.

    Numbers with a fraction make a regression unless `regression` says otherwise; other labels name classes. Without a
    validation file a fifth of the rows is held out for it. Raises UserError for files that cannot be learned from.
    """
    label = _check(train, validation, text, label)
    texts, values = _read(train, text, label)
    regression = labels.is_regression(train, values) if regression is None else regression
    names = None if regression else labels.class_names(values)

    def ids(path: Path, values: list[Any]) -> list[int] | list[float]:
        return labels.numbers(path, label, values) if names is None else labels.class_ids(path, names, values)

    rows = Split(texts, ids(train, values))
    require_two(train, names, rows)
    notes = labels.notes(values, names)
    if validation is None:
        inside, outside = _divided(train, rows, names)
        notes.append(f"no validation file: {len(outside)} of {len(rows)} rows are held out for it, stratified by label")
    else:
        texts, values = _read(validation, text, label)
        inside, outside = rows, Split(texts, ids(validation, values))
    repeated = sum(map(set(inside.texts).__contains__, outside.texts))
    notes += [f"{repeated} of {len(outside)} rows of validation have the text of a row of train"] * bool(repeated)
    return build(train.stem, names, _metrics(names), inside, {"validation": outside}, tuple(notes))


def _divided(path: Path, rows: Split, names: tuple[str, ...] | None) -> tuple[Split, Split]:
    """Divide the rows into train and a fifth that validates, by the data's hash."""
    try:
        inside, outside = held_out(rows, digest(names, {"train": rows}), names is not None, FRACTION, len(rows))
    except UserError as problem:
        raise UserError(f"{path}: {problem}, or give a validation file") from None
    return rows.take(inside), rows.take(outside)


def _check(train: Path, validation: Path | None, text: Sequence[str], label: str | None) -> str:
    """Check what can be checked before the rows are read; returns the label column."""
    for path in (train, validation):
        if path is not None and path.suffix.lower() not in tables.READERS:
            raise UserError(f"{path}: a file ending in {', '.join(tables.READERS)} was expected")
    if not 1 <= len(text) <= 2 or label is None:
        given = f"text columns {', '.join(text) or 'none'} and label column {label or 'none'} given"
        there = ", ".join(map(checks.one_line, tables.names(train)))
        raise UserError(f"{train}: {given}; name one or two (--text) and one (--label) of {there}")
    if len({*text, label}) < len(text) + 1:
        raise UserError(f"{train}: {', '.join((*text, label))} name a column twice: text and label need a column each")
    if validation is not None and validation.resolve() == train.resolve():
        raise UserError(f"{train} is both train and validation: give another file, or none to hold out a fifth")
    return label


def _read(path: Path, text: Sequence[str], label: str) -> tuple[list[tuple[str, ...]], list[Any]]:
    """Read the texts and labels of a file; all that is wrong in them is one message."""
    columns = tables.read(path, (*text, label))
    faults: checks.Faults = {}
    texts = [checks.convert(columns[name], checks.text, f"column {name!r}: ", faults) for name in text]
    values = checks.convert(columns[label], labels.check, f"column {label!r}: ", faults)
    checks.raise_faults(path, faults)
    labels.check_types(path, label, values)
    if set(map(checks.literal, values)) == {"-1"}:
        raise UserError(
            f"{path}: all of column {label!r} is -1, as in a test split without labels: give a labelled file"
        )
    return list(zip(*texts, strict=True)), values


def _metrics(names: tuple[str, ...] | None) -> tuple[str, ...]:
    if names is None:
        return ("pearson", "spearman")
    return ("accuracy", "f1", "matthews_correlation") if len(names) == 2 else ("accuracy", "f1_macro")
