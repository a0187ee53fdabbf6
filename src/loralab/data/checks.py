"""Checks and conversions of the cells of a data file: all faults of a file in one message, each with its rows."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from loralab.data.reading import Reading, counted, numbers
from loralab.errors import UserError

Faults = dict[str, list[int]]  # what is wrong -> the rows, counted from 1
Value = TypeVar("Value")

MEND = "mend or remove these rows"
SHOWN = 5  # kinds of fault that a message spells out
KINDS = ((str, "text"), (bool, "true or false"), (int | float | Decimal, "number"), (list, "list"), (dict, "object"))
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class WrittenInt(int):
    """A whole number that its file wrote in another way than Python does, as -0."""

    literal: str


class WrittenFloat(float):
    """A number that its file wrote in another way than Python does, as 1.50."""

    literal: str


def written_int(literal: str) -> int:
    """Read a JSON number without a fraction and keep how it was written."""
    value = int(literal)
    if str(value) == literal:
        return value
    number = WrittenInt(value)
    number.literal = literal
    return number


def written_float(literal: str) -> float:
    """Read a JSON number with a fraction or an exponent and keep how it was written."""
    value = float(literal)
    if repr(value) == literal:
        return value
    number = WrittenFloat(value)
    number.literal = literal
    return number


def literal(value: Any) -> str:
    """Return a cell as text: a string as it is, anything else as the JSON of it."""
    if isinstance(value, str):
        return value
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.literal
    if value is None or isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)  # dates and decimals


def kind(value: Any) -> str:
    """Name the type of a cell as JSON does."""
    if value is None:
        return "null"
    return next((name for types, name in KINDS if isinstance(value, types)), type(value).__name__)


def convert(values: Iterable[Any], change: Callable[[Any], Value], where: str, faults: Faults) -> list[Value]:
    """Apply `change` to every value; what it refuses is added to `faults`, under its reason and with the row."""
    changed = []
    for row, value in enumerate(values, 1):
        try:
            changed.append(change(value))
        except ValueError as fault:
            faults.setdefault(f"{where}{fault}", []).append(row)
    return changed


class BadRows(UserError):
    """Rows of a file that cannot be used: `rows` are their numbers in the file, and why."""

    def __init__(self, message: str, path: Path | None, rows: dict[int, str]) -> None:
        super().__init__(message)
        self.path, self.rows = path, rows

    def __reduce__(self) -> Any:
        return BadRows, (str(self), self.path, self.rows)  # a worker's error comes back by pickle

    def advised(self, advice: str) -> "BadRows":
        """Return the same error with one more thing to do about it, where rows are all that is wrong."""
        return BadRows(f"{self}, {advice}", self.path, self.rows) if str(self).endswith(MEND) else self


def few(faults: Sequence[str]) -> str:
    """Return kinds of fault as a message names them: at most SHOWN, the others counted."""
    return "; ".join([*faults[:SHOWN], *[f"{len(faults) - SHOWN} more kinds of fault"] * (len(faults) > SHOWN)])


def raise_faults(where: object, faults: Faults, advice: str = MEND) -> None:
    """Raise one BadRows for all faults of a file, if there are any; rows are counted among those that were read."""
    named = {what: numbers(where, rows) for what, rows in faults.items()}
    if parts := few([f"{what} in {counted(rows)}" for what, rows in named.items()]):
        rows = {row: what for what, mine in reversed(named.items()) for row in mine}
        raise BadRows(f"{where}: {parts}; {advice}", where if isinstance(where, Path) else None, rows)


def without_bad_rows(
    reading: Reading, read: Callable[[], Value], advice: str = "or leave them out with --skip-bad-rows"
) -> Value:
    """Return what `read` gives; where the reading skips them, again and again without the rows that are found bad.

    Else the error ends with the advice.
    """
    with reading.active():
        while True:
            try:
                return read()
            except BadRows as bad:
                if bad.path is None or not reading.leave_out(bad.path, bad.rows):
                    raise bad if reading.skip else bad.advised(advice) from None


def each(where: object, rows: Sequence[int], items: Iterable[Any], change: Callable[[Any], Value]) -> list[Value]:
    """Apply `change` to the item of each row, by its number in the file. Raises one UserError that names the rows which
    it refuses; what it refuses alike in every row is no fault of rows and stands alone."""
    faults: Faults = {}
    changed = convert(items, change, "", faults)
    if len(faults) == 1 and len(rows) > 1 and len(next(iter(faults.values()))) == len(rows):
        raise UserError(next(iter(faults)))
    raise_faults(where, {what: [rows[place - 1] for place in places] for what, places in faults.items()})
    return changed


def one_line(message: object, at_most: int = 200) -> str:
    """Return a message of another library without its line breaks and its tail."""
    line = " ".join(str(message).split())
    return line if len(line) <= at_most else line[:at_most] + "..."


def shown(value: Any) -> str:
    """Return a cell for a message: text in quotes, its spaces as they are."""
    line = repr(value) if isinstance(value, str) else one_line(literal(value))
    return line if len(line) <= 40 else line[:40] + "..."


# --- conversions: each raises ValueError that says what is wrong ---


def text(value: Any) -> str:
    """Return a string with something in it."""
    if not any_text(value).strip():
        raise ValueError("empty")
    return str(value)


def texts(*cells: Any) -> tuple[str, ...]:
    """Return the texts of a row. Of two one may be empty or null, which then is an empty text."""
    blank = [cell is None or (isinstance(cell, str) and not cell.strip()) for cell in cells]
    if len(cells) == 1 or all(blank):
        return tuple(map(text, cells))
    return tuple("" if empty else any_text(cell) for cell, empty in zip(cells, blank, strict=True))


def any_text(value: Any) -> str:
    """Return a string, empty or not, that a tokenizer can take."""
    if value is None:
        raise ValueError("null")
    if not isinstance(value, str):
        raise ValueError(f"{kind(value)} instead of text")
    if "\0" in value:
        raise ValueError("a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    return value


def number(value: Any) -> float:
    """Return a finite float, from a number or from text that is one."""
    if value is None or value == "":
        raise ValueError("null")
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()) is None:
        raise ValueError(f"{shown(value)} instead of a number")
    if isinstance(value, bool):
        raise ValueError(f"{literal(value)} instead of a number")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{shown(value)} instead of a number") from None
    if not math.isfinite(result):
        raise ValueError(f"{result} instead of a finite number")
    return result
