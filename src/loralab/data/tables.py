"""Columns of a CSV, TSV, JSON or parquet file, and checks of their values: all problems of a file in one message."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from loralab.errors import UserError

Columns = dict[str, list[Any]]
Faults = dict[str, list[int]]  # what is wrong -> the rows, counted from 1
Value = TypeVar("Value")

SHOWN = 5  # rows, and kinds of fault, that a message spells out


def read(path: Path, wanted: Sequence[str], text: Sequence[str] = ()) -> Columns:
    """The wanted columns of a file; those of `text` are strings even where a CSV looks like numbers."""
    there, columns = _open(path, wanted, text)
    require(path, there, wanted)
    if not columns[wanted[0]]:
        raise UserError(f"{path} has no rows: at least one was expected")
    return columns


def names(path: Path) -> list[str]:
    """All columns of a file."""
    return _open(path, (), ())[0]


def _open(path: Path, wanted: Sequence[str], text: Sequence[str]) -> tuple[list[str], Columns]:
    with reading(path):
        if path.is_dir():
            raise UserError(f"{path} is a folder: a file was expected")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: a header and rows were expected")
        return READERS[path.suffix.lower()](path, wanted, text)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong while reading a file into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except PermissionError:
        raise UserError(f"{path} may not be read: permission denied, change its rights or copy it") from None
    except (OSError, ValueError, pa.ArrowException) as problem:
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {one_line(problem)}; is it whole?") from problem


def one_line(problem: object, at_most: int = 200) -> str:
    """A foreign message without its line breaks and its tail."""
    line = " ".join(str(problem).split())
    return line if len(line) <= at_most else line[:at_most] + "..."


def require(where: object, names: Sequence[str], wanted: Iterable[str]) -> None:
    """Raises when a wanted column is not there exactly once."""
    absent = [name for name in wanted if name not in names]
    doubled = [name for name in wanted if list(names).count(name) > 1]
    said = [f"no column {', '.join(map(repr, absent))}"] * bool(absent)
    said += [f"more than one column {', '.join(map(repr, doubled))}"] * bool(doubled)
    if said:
        raise UserError(f"{where}: {' and '.join(said)}; columns there: {', '.join(map(one_line, names))}")


# --- readers: (all column names, the wanted columns that are there once) ---


def _picked(table: Any, wanted: Sequence[str]) -> Columns:
    names = table.column_names
    return {name: table.column(name).to_pylist() for name in wanted if names.count(name) == 1}


def _read_csv(path: Path, wanted: Sequence[str], text: Sequence[str]) -> tuple[list[str], Columns]:
    return _delimited(path, wanted, text, pa.csv.ParseOptions(newlines_in_values=True))


def _read_tsv(path: Path, wanted: Sequence[str], text: Sequence[str]) -> tuple[list[str], Columns]:
    """Without quoting: TSV files of text hold lone quote marks, which would swallow the lines up to the next one."""
    return _delimited(path, wanted, text, pa.csv.ParseOptions(delimiter="\t", quote_char=False))


def _delimited(path: Path, wanted: Sequence[str], text: Sequence[str], parse: Any) -> tuple[list[str], Columns]:
    whole = min(path.stat().st_size + 1, 2**31 - 1)  # one block: types inferred from all rows
    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=whole, use_threads=False),  # one thread: errors carry the row
        parse_options=parse,
        convert_options=pa.csv.ConvertOptions(column_types={name: pa.string() for name in text}),
    )
    return table.column_names, _picked(table, wanted)


def _read_parquet(path: Path, wanted: Sequence[str], text: Sequence[str]) -> tuple[list[str], Columns]:
    with pa.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        return names, _picked(file.read(columns=[name for name in wanted if names.count(name) == 1]), wanted)


def _read_json(path: Path, wanted: Sequence[str], text: Sequence[str]) -> tuple[list[str], Columns]:
    """One object a line, or one list of objects; the standard parser keeps 1, 1.0, true and "1" apart."""
    content = path.read_text(encoding="utf-8-sig")
    faults: Faults = {}
    if content.lstrip().startswith("["):
        rows = json.loads(content)
    else:
        lines = [line for line in content.split("\n") if line.strip()]  # splitlines would cut texts at U+2028
        rows = convert(lines, _parsed, "", faults)
    convert([] if faults else rows, _object, "", faults)
    raise_faults(path, faults)
    names = list(dict.fromkeys(name for row in rows for name in row)) if rows else list(wanted)
    return names, {name: [row.get(name) for row in rows] for name in wanted}


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise ValueError("not JSON") from None


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object with named columns")
    return row


READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], tuple[list[str], Columns]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


# --- values: each raises ValueError with what is wrong ---


def convert(values: Iterable[Any], change: Callable[[Any], Value], where: str, faults: Faults) -> list[Value]:
    """`change` of every value; what it refuses goes to `faults`, under its reason and with the row."""
    changed = []
    for row, value in enumerate(values, 1):
        try:
            changed.append(change(value))
        except ValueError as fault:
            faults.setdefault(f"{where}{fault}", []).append(row)
    return changed


def raise_faults(where: object, faults: Faults) -> None:
    """One UserError for all faults of a file."""
    said = [f"{what} in {_rows(rows)}" for what, rows in list(faults.items())[:SHOWN]]
    said += [f"{len(faults) - SHOWN} more kinds of fault"] * (len(faults) > SHOWN)
    if said:
        raise UserError(f"{where}: {'; '.join(said)}; mend or remove these rows")


def _rows(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"{len(rows)} rows ({', '.join(map(str, rows[:SHOWN]))}{', ...' * (len(rows) > SHOWN)})"


def text(value: Any) -> str:
    """A string with something in it."""
    if not any_text(value).strip():
        raise ValueError("empty")
    return str(value)


def any_text(value: Any) -> str:
    """A string, empty or not, that a tokenizer can take."""
    if value is None:
        raise ValueError("null")
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} instead of text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    return value


def number(value: Any) -> float:
    """A finite float."""
    if value is None or value == "":
        raise ValueError("null")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{one_line(repr(value), 40)} instead of a number") from None
    if not math.isfinite(result):
        raise ValueError(f"{result} instead of a finite number")
    return result
