"""The rows of a file as they are, and the same file with more columns."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from loralab.data import tables
from loralab.errors import UserError

Columns = Mapping[str, Sequence[Any]]


def read(path: Path) -> tables.Columns:
    """Every column of a file, of a CSV or TSV as text, so that 007 stays what it is."""
    if path.suffix.lower() not in tables.READERS:
        raise UserError(f"{path}: a file ending in {', '.join(tables.READERS)} was expected")
    names = tables.names(path)
    return tables.read(path, names, names)


def text(columns: Columns, suffix: str) -> str:
    """A table as the text of a file with that ending; a value that is no text or number is JSON in a CSV or TSV."""
    return WRITERS[suffix](columns)


def write(columns: Columns, path: Path) -> None:
    """The file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix.lower() == ".parquet":
            pa.parquet.write_table(pa.table({name: _array(values) for name, values in columns.items()}), partial)
        else:
            partial.write_text(text(columns, path.suffix.lower()), encoding="utf-8")
        partial.replace(path)
    except (OSError, pa.ArrowException) as problem:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {tables.one_line(problem)}") from problem


def _array(values: Sequence[Any]) -> Any:
    """Text beside numbers is text; objects with keys of their own are maps."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {dict}:
        return pa.array([None if v is None else list(v.items()) for v in values], pa.map_(pa.string(), pa.float64()))
    return pa.array([None if v is None else str(v) for v in values] if kinds == {str, float} else list(values))


def _rows(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _json(columns: Columns) -> str:
    return json.dumps(_rows(columns), ensure_ascii=False, indent=1, default=str) + "\n"


def _jsonl(columns: Columns) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in _rows(columns))


def _csv(columns: Columns) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(columns)
    rows.writerows(map(_cell, row) for row in zip(*columns.values(), strict=True))
    return out.getvalue()


def _tsv(columns: Columns) -> str:
    rows = [list(columns), *(map(_cell, row) for row in zip(*columns.values(), strict=True))]
    return "".join("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row) + "\n" for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False, default=str)


WRITERS: dict[str, Callable[[Columns], str]] = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
