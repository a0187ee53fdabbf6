"""Read and write CSV, TSV, JSON and parquet files as columns of values.

A CSV or TSV cell is text, exactly as the file has it: nothing is taken for a number or a date. A number of a JSON file
keeps how it was written. Only regular files are read, and none that would take more memory than a limit.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from loralab.data import reading
from loralab.data.checks import (
    Faults,
    convert,
    kind,
    literal,
    one_line,
    raise_faults,
    shown,
    without_bad_rows,
    written_float,
    written_int,
)
from loralab.disk import replacing, size_text
from loralab.errors import UserError

Columns = dict[str, list[Any]]

LIMIT = "LORALAB_DATA_GB"  # environment variable: most gigabytes that a data file may take once it is read
DEFAULT_GB = 2.0
CELL = 64  # bytes that Python needs for a value beside its content
BATCH = 1024  # rows of a parquet file that are decoded at once
UNTYPED = (".csv", ".tsv")  # formats in which every cell is text


def read(path: Path, wanted: Sequence[str]) -> Columns:
    """Read the wanted columns of a file. Raises UserError for a file without them, or without rows."""
    present, columns = _open(path, wanted)
    require(path, present, wanted)
    reading.current().columns.setdefault(path, set()).update(wanted)
    if not columns[wanted[0]]:
        raise _without_rows(path)
    return columns


def _without_rows(path: Path) -> UserError:
    skipped = len(reading.current().skipped.get(path, ()))
    left_out = f", as all {skipped} are left out" if skipped else ""
    return UserError(f"{path} has no rows{left_out}: at least one was expected")


def read_all(path: Path) -> Columns:
    """Read every column of a file."""
    return read(path, names(path))


def read_to_answer(path: Path, how: reading.Reading, keep_going: bool) -> tuple[Columns, dict[int, str]]:
    """Read every column of a file of rows to answer; also return what is wrong with rows that cannot be read, by place.

    These are refused, or with `keep_going` have no cells: each is None.
    """
    found = replace(how, skip=keep_going, skipped={})
    columns = without_bad_rows(found, lambda: read_all(path), "or answer the others with --keep-going")
    bad = {row - 1: why for row, why in found.skipped.get(path, {}).items()}
    cells = {name: iter(column) for name, column in columns.items()}
    count = len(bad) + len(next(iter(columns.values())))
    return {name: [None if i in bad else next(column) for i in range(count)] for name, column in cells.items()}, bad


def names(path: Path) -> list[str]:
    """Return the names of all columns of a file. Raises UserError for one of which all rows are left out."""
    found = _open(path, ())[0]
    if not found and reading.current().skipped.get(path):
        raise _without_rows(path)
    return found


def _open(path: Path, wanted: Sequence[str]) -> tuple[list[str], Columns]:
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: a file ending in {', '.join(READERS)} was expected")
    with readable(path):
        check_file(path)
        present, columns = READERS[path.suffix.lower()](path, wanted)
    if any("\0" in name for name in present):
        raise UserError(f"{path} has NUL characters in the names of its columns: save it as UTF-8 text")
    return present, columns


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while reading a file into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except PermissionError:
        raise UserError(f"{path} may not be read: permission denied, change its rights or copy it") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError, OverflowError, MemoryError, csv.Error, pa.ArrowException) as problem:
        encoding = isinstance(problem, UnicodeDecodeError) or "UTF8" in str(problem)
        advice = "save it as UTF-8 text" if encoding else "is it whole?"
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {one_line(problem)}; {advice}") from problem


def check_file(path: Path) -> None:
    """Raise for what is no regular file, is empty, or is larger than the limit."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a folder: a file was expected")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a pipe or a device: a regular file was expected, copy it into one")
    if status.st_size == 0:
        raise UserError(f"{path} is empty: a header and rows were expected")
    check_size(path, status.st_size)


def check_size(path: Path, size: float) -> None:
    """Raise where a file takes more bytes than the limit."""
    given = os.environ.get(LIMIT) or DEFAULT_GB
    try:
        limit = float(given) * 1e9
    except ValueError:
        raise UserError(f"{LIMIT}={given}: a number of gigabytes was expected") from None
    if size > limit:
        raise UserError(
            f"{path} takes {size_text(size)} or more once it is read, and the limit is {size_text(limit)}: "
            f"use fewer rows, or raise the limit with {LIMIT}={size / 1e9 + 1:.0f}"
        )


def require(where: object, names: Sequence[str], wanted: Iterable[str]) -> None:
    """Raise where a wanted column is not there exactly once."""
    absent = [name for name in wanted if name not in names]
    doubled = [name for name in wanted if list(names).count(name) > 1]
    problems = [f"no column {', '.join(map(repr, absent))}"] * bool(absent)
    problems += [f"more than one column {', '.join(map(repr, doubled))}"] * bool(doubled)
    if problems:
        raise UserError(f"{where}: {' and '.join(problems)}; columns there: {', '.join(map(one_line, names))}")


# --- readers: (all column names, the wanted columns that are there once) ---


def _delimited(path: Path, wanted: Sequence[str]) -> tuple[list[str], Columns]:
    """Read the header for the names, then all cells as text; pyarrow would take some for numbers and dates.

    The tabs of a TSV are read without quoting: a lone quote mark in a text would swallow the lines up to the next one.
    """
    content, form = reading.text_of(path)
    separator = reading.SEPARATORS[str(form.separator)]
    quoted = path.suffix.lower() != ".tsv" or separator != "\t"
    dialect: Any = {"delimiter": separator, "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
    names = next((row for row in csv.reader(StringIO(content, newline=""), **dialect) if row), [])
    picked = [name for name in wanted if names.count(name) == 1]
    if not picked:
        return names, {}
    ragged: dict[int, str] = {}  # row, counted from 1 -> what is wrong with its cells

    def refuse(row: Any) -> str:
        quote = ", and a quote mark that may be open" if quoted and '"' in row.text else ""
        ragged[row.number - 1] = f"{row.actual_columns} cells where {row.expected_columns} were expected{quote}"
        return "skip"

    data = content.encode()
    table = pa.csv.read_csv(
        pa.BufferReader(data),
        read_options=pa.csv.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1), use_threads=False),
        parse_options=pa.csv.ParseOptions(  # one thread: errors name the row
            delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted,
            invalid_row_handler=refuse,
        ),
        convert_options=pa.csv.ConvertOptions(column_types={name: pa.string() for name in names}),
    )  # fmt: skip
    if table.column_names != names:
        raise ValueError("the header is not clear: quote its names, or leave quotes and line breaks out of them")
    return names, _whole_rows(path, {name: table.column(name).to_pylist() for name in picked}, ragged)


def _whole_rows(path: Path, columns: Columns, ragged: Mapping[int, str]) -> Columns:
    """Return the columns without the rows that are left out, given those with another number of cells."""
    count = len(ragged) + len(next(iter(columns.values())))
    kept = [row for row in reading.left(path, range(1, count + 1)) if row not in ragged]
    faults: Faults = {}
    for place, row in enumerate(reading.left(path, range(1, count + 1)), 1):
        if row in ragged:
            faults.setdefault(ragged[row], []).append(place)
    raise_faults(path, faults)
    place_of = {row: place for place, row in enumerate(row for row in range(1, count + 1) if row not in ragged)}
    return {name: [cells[place_of[row]] for row in kept] for name, cells in columns.items()}


def _read_parquet(path: Path, wanted: Sequence[str]) -> tuple[list[str], Columns]:
    """Read only after the decoded size is known: a small file may repeat one long text a million times."""
    metadata = pa.parquet.read_metadata(path)
    leaves = map(metadata.schema.column, range(metadata.num_columns))
    texts = [leaf.path for leaf in leaves if leaf.path in wanted and leaf.physical_type == "BYTE_ARRAY"]
    with pa.parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts) as file:  # repeated texts stay small
        names = file.schema_arrow.names
        picked = [name for name in wanted if names.count(name) == 1]
        if not picked:
            return names, {}
        check_size(path, _recorded_bytes(metadata, len(picked)))
        check_size(
            path, sum(_decoded_bytes(array) for batch in file.iter_batches(BATCH, columns=picked) for array in batch)
        )
        columns: Columns = {name: [] for name in picked}
        for batch in file.iter_batches(BATCH, columns=picked):
            for name, values in columns.items():
                values += _cells(batch.column(name))
        return names, {name: reading.left(path, values) for name, values in columns.items()}


def _cells(array: Any) -> list[Any]:
    cells: list[Any] = array.to_pylist()
    return [cell and dict(cell) for cell in cells] if pa.types.is_map(array.type) else cells


def _recorded_bytes(metadata: Any, columns: int) -> int:
    """Return the bytes that a file takes at least, by what it says of its row groups.

    What it says of the columns of a row group is not asked: pyarrow ends the process where that is damaged.
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return sum(int(group.total_byte_size) for group in groups) + CELL * columns * int(metadata.num_rows)


def _decoded_bytes(array: Any) -> int:
    """Return the bytes that the values of an array take as Python objects."""
    size: int = array.nbytes
    if pa.types.is_dictionary(array.type):
        lengths = pa.compute.binary_length(array.dictionary) if _is_bytes(array.type.value_type) else None
        size = 0 if lengths is None else pa.compute.sum(lengths.take(array.indices)).as_py() or 0
    return size + CELL * len(array)


def _is_bytes(type_: Any) -> bool:
    return any(check(type_) for check in (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string))


class _DoubledKey(ValueError):
    pass


def _read_json(path: Path, wanted: Sequence[str]) -> tuple[list[str], Columns]:
    """Read one object a line, or one list of objects; 1, 1.0, true and "1" stay different values."""
    content, form = reading.text_of(path)
    faults: Faults = {}
    if content.lstrip().startswith("["):
        rows = reading.left(path, _parse(content))
    else:
        end = "\r" if form.line_end == "\r" else "\n"
        lines = [line for line in content.split(end) if line.strip()]  # splitlines would cut texts at U+2028
        rows = convert(reading.left(path, lines), _parse_line, "", faults)
    convert([] if faults else rows, _object, "", faults)
    raise_faults(path, faults)
    names = list(dict.fromkeys(name for row in rows for name in row)) if rows else list(wanted)
    return names, {name: [row.get(name) for row in rows] for name in wanted}


def _parse(content: str) -> Any:
    return json.loads(content, parse_int=written_int, parse_float=written_float, object_pairs_hook=_unique)


def _parse_line(line: str) -> Any:
    try:
        return _parse(line)
    except _DoubledKey:
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("not JSON") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its members; the standard parser drops all but the last of equal names."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubledKey(f"{next(name for name in made if names.count(name) > 1)!r} twice in an object")
    return made


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object with named columns")
    return row


def _read_conll(path: Path, wanted: Sequence[str]) -> tuple[list[str], Columns]:
    """Read a CoNLL file: a word and, last on its line, its tag; an empty line ends a sentence."""
    columns: Columns = {"tokens": [], "tags": []}
    words: list[str] = []
    tags: list[str] = []
    content, form = reading.text_of(path)
    for number, line in enumerate([*content.split("\r" if form.line_end == "\r" else "\n"), ""], 1):
        cells = line.split()
        if cells[:1] == ["-DOCSTART-"] or line.startswith("# "):
            continue
        if len(cells) == 1:
            raise ValueError(f"line {number} has a word without a tag")
        if cells:
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            columns["tokens"].append(words)
            columns["tags"].append(tags)
            words, tags = [], []
    counts = [[str(i) for i in range(1, len(row) + 1)] for row in columns["tokens"]]
    if columns["tokens"] == counts and any(len(row) > 1 for row in counts):
        raise UserError(
            f"{path}: its first column counts the words, as CoNLL-U does: write each word first and its tag last"
        )
    return list(columns), {name: reading.left(path, columns[name]) for name in wanted if name in columns}


READERS: dict[str, Callable[[Path, Sequence[str]], tuple[list[str], Columns]]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
}


# --- writers ---

Table = Mapping[str, Sequence[Any]]


def write(columns: Table, path: Path) -> None:
    """Write a file in the format of its ending, whole or not at all. Raises UserError."""
    try:
        with replacing(path) as temporary:
            if path.suffix.lower() == ".parquet":
                pa.parquet.write_table(pa.table({name: _array(cells) for name, cells in columns.items()}), temporary)
            else:
                temporary.write_text(render(columns, path.suffix.lower()), encoding="utf-8", newline="")
    except UserError as problem:
        raise UserError(f"cannot write {path}: {problem}") from None
    except (OSError, UnicodeEncodeError, pa.ArrowException) as problem:
        raise UserError(f"cannot write {path}: {one_line(problem)}") from problem


def render(columns: Table, suffix: str) -> str:
    """Return a table as the text of a file with that ending, one of WRITERS. A CSV or TSV has values as JSON."""
    return WRITERS[suffix](columns)


def _array(cells: Sequence[Any]) -> Any:
    """Make a parquet column. Values of several types become text; objects of numbers become maps."""
    present = [cell for cell in cells if cell is not None]
    if len(set(map(kind, present))) > 1:
        return pa.array([None if cell is None else literal(cell) for cell in cells])
    if present and all(isinstance(cell, dict) and set(map(type, cell.values())) == {float} for cell in present):
        return pa.array([cell and list(cell.items()) for cell in cells], pa.map_(pa.string(), pa.float64()))
    return pa.array(list(cells))


def _rows(columns: Table) -> Iterator[tuple[Any, ...]]:
    return zip(*columns.values(), strict=True)


def _json_cell(cell: Any, indent: int | None) -> str:
    return literal(cell) if kind(cell) == "number" else json.dumps(cell, ensure_ascii=False, indent=indent, default=str)


def _json(columns: Table) -> str:
    keys = [json.dumps(name, ensure_ascii=False) for name in columns]
    objects = []
    for row in _rows(columns):
        cells = [_json_cell(cell, 1).replace("\n", "\n  ") for cell in row]
        members = ",\n".join(f"  {key}: {cell}" for key, cell in zip(keys, cells, strict=True))
        objects.append(f" {{\n{members}\n }}")
    return "[\n" + ",\n".join(objects) + "\n]\n"


def _jsonl(columns: Table) -> str:
    keys = [json.dumps(name, ensure_ascii=False) for name in columns]
    lines = []
    for row in _rows(columns):
        members = ", ".join(f"{key}: {_json_cell(cell, None)}" for key, cell in zip(keys, row, strict=True))
        lines.append(f"{{{members}}}\n")
    return "".join(lines)


def _csv(columns: Table) -> str:
    def quoted(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"' if re.search('[",\r\n]', cell) else cell

    lines = [list(columns), *(map(_cell, row) for row in _rows(columns))]
    return "".join(",".join(map(quoted, line)) + "\n" for line in lines)


def _tsv(columns: Table) -> str:
    lines = [list(columns), *([_cell(cell) for cell in row] for row in _rows(columns))]
    for place, line in enumerate(lines):
        for cell in line:
            if re.search("[\t\r\n]", cell):
                where = f"row {place}" if place else "the header"
                raise UserError(f"a TSV cannot hold the tab or line break of {shown(cell)} in {where}: choose a CSV")
    return "".join("\t".join(line) + "\n" for line in lines)


def _cell(cell: Any) -> str:
    return "" if cell is None else literal(cell)


WRITERS: dict[str, Callable[[Table], str]] = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl}
