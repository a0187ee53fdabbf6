"""A user's own CSV, TSV, JSON or parquet file as a Task: one or two columns of text, a column of labels."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loralab.data import tables
from loralab.data.selection import held_out
from loralab.data.task import Split, Task, build, digest, require_two
from loralab.errors import UserError

FRACTION = 0.2  # of the rows validate where no validation file is given
FEW = 10  # values up to which whole-numbered floats, and above which whole numbers, make us say how labels were read
MISSING = {"", "nan", "null"}  # what tools write for a label that is not there


def load(
    train: Path,
    validation: Path | None,
    text: Sequence[str],
    label: str | None,
    regression: bool | None = None,
) -> Task:
    """The task of a file. Floats make a regression unless `regression` says otherwise; other labels name classes."""
    _check(train, validation, text, label)
    columns = (*text, str(label))
    texts, values = _read(train, columns)
    more = None if validation is None else _read(validation, columns)
    regress = _is_regression(train, values, regression)
    classes = None if regress else sorted(set(values))
    names = None if classes is None else tuple(map(_name, classes))
    rows = Split(texts, _labels(train, values, names))
    require_two(train, names, rows)
    notes = [_note(values, names)]
    if validation is None or more is None:
        part, rest = _divided(train, rows, names)
        notes.append(f"no validation file: {len(rest)} of {len(rows)} rows are held out for it, stratified by label")
    else:
        part, rest = rows, Split(more[0], _labels(validation, more[1], names))
    both = sum(map(set(part.texts).__contains__, rest.texts))
    notes += [f"{both} of {len(rest)} rows of validation have the text of a row of train"] * bool(both)
    return build(train.stem, names, _metrics(names), part, {"validation": rest}, tuple(notes))


def _divided(path: Path, rows: Split, names: tuple[str, ...] | None) -> tuple[Split, Split]:
    """A fifth of the rows apart, by the data's hash."""
    try:
        inside, outside = held_out(rows, digest(names, {"train": rows}), names is not None, FRACTION, len(rows))
    except UserError as problem:
        raise UserError(f"{path}: {problem}, or give a validation file") from None
    return rows.take(inside), rows.take(outside)


def _check(train: Path, validation: Path | None, text: Sequence[str], label: str | None) -> None:
    """What can be said before the rows are read."""
    for path in (train, validation):
        if path is not None and path.suffix.lower() not in tables.READERS:
            raise UserError(f"{path}: a file ending in {', '.join(tables.READERS)} was expected")
    if not 1 <= len(text) <= 2 or label is None:
        given = f"text columns {', '.join(text) or 'none'} and label column {label or 'none'} given"
        there = ", ".join(map(tables.one_line, tables.names(train)))
        raise UserError(f"{train}: {given}; name one or two (--text) and one (--label) of {there}")
    if len({*text, label}) < len(text) + 1:
        raise UserError(f"{train}: {', '.join((*text, label))} name a column twice: text and label need a column each")
    if validation is not None and validation.resolve() == train.resolve():
        raise UserError(f"{train} is both train and validation: give another file, or none to hold out a fifth")


def _read(path: Path, columns: tuple[str, ...]) -> tuple[list[tuple[str, ...]], list[Any]]:
    """Texts and labels of a file, with all that is wrong in them in one message."""
    *text, label = columns
    read = tables.read(path, columns, text)
    faults: tables.Faults = {}
    texts = [tables.convert(read[name], tables.text, f"column {name!r}: ", faults) for name in text]
    values = tables.convert(read[label], _label, f"column {label!r}: ", faults)
    tables.raise_faults(path, faults)
    kinds = {type(value).__name__ for value in values}
    if len(kinds) > 1 and not kinds <= {"int", "float"}:
        raise UserError(f"{path}: column {label!r} mixes {' and '.join(sorted(kinds))}: write all labels as one kind")
    if set(values) == {-1}:
        raise UserError(
            f"{path}: all of column {label!r} is -1, as in a test split without labels: give a labelled file"
        )
    return list(zip(*texts, strict=True)), values


def _label(value: Any) -> bool | int | float | str:
    if value is None or value != value or (isinstance(value, str) and value.strip().lower() in MISSING):
        raise ValueError("null")
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{type(value).__name__} instead of text, a number, true or false")
    return tables.number(value) if isinstance(value, float) else value


def _is_regression(path: Path, values: list[Any], asked: bool | None) -> bool:
    kinds = {type(value) for value in values}
    if asked and not kinds <= {int, float}:
        raise UserError(
            f"{path}: regression needs numbers, the labels are {' and '.join(k.__name__ for k in kinds)}: leave it out"
        )
    return float in kinds if asked is None else asked


def _name(value: Any) -> str:
    """Label as text; 1.0 is 1, so that a column that became float names the same classes."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _labels(path: Path, values: list[Any], names: tuple[str, ...] | None) -> list[int] | list[float]:
    faults: tables.Faults = {}
    change: Callable[[Any], int | float] = tables.number if names is None else _identify(names)
    labels: list[Any] = tables.convert(values, change, "label: ", faults)
    tables.raise_faults(path, faults)
    return labels


def _identify(names: tuple[str, ...]) -> Callable[[Any], int]:
    ids = {name: place for place, name in enumerate(names)}

    def identify(value: Any) -> int:
        if _name(value) not in ids:
            raise ValueError(f"new value {tables.one_line(repr(value), 40)}, which train lacks,")
        return ids[_name(value)]

    return identify


def _metrics(names: tuple[str, ...] | None) -> tuple[str, ...]:
    if names is None:
        return ("pearson", "spearman")
    return ("accuracy", "f1", "matthews_correlation") if len(names) == 2 else ("accuracy", "f1_macro")


def _note(values: list[Any], names: tuple[str, ...] | None) -> str:
    """How the labels were read, since a guess is involved."""
    if names is None:
        few = len(set(values)) <= FEW and all(float(value).is_integer() for value in values)
        hint = "; they look like classes: say regression = false if they are" if few else ""
        return f"labels are read as a regression, {min(values)} to {max(values)}{hint}"
    counts = Counter(map(_name, values))
    shown = ", ".join(f"{name} ({counts[name]})" for name in names[:FEW]) + ", ..." * (len(names) > FEW)
    hint = "; if they are scores, say regression = true" if len(names) > FEW and isinstance(values[0], int) else ""
    return f"labels are read as {len(names)} classes: {shown}{hint}"
