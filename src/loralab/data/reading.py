"""How files of one's own are read: separator, encoding and line ends by looking at them, and which rows are left out.

A `Reading` holds what the user says and what was found. Inside `with reading.active():` it holds for every file that
tables.py reads; outside, each file is looked at anew and no row is left out.
"""

import codecs
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from loralab.errors import UserError

Separator = Literal["auto", ",", ";", "tab", "|"]
SEPARATORS = {",": ",", ";": ";", "tab": "\t", "|": "|"}
USUAL = {".csv": ",", ".tsv": "tab"}  # file ending -> the separator that it names
LINES = 50  # of a file that are looked at for its separator
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
GUESSES = ("cp1252", "latin-1")  # for what is no UTF-8; the second takes any bytes
LINE_END = re.compile(r"\r\n|\n|\r")
SHOWN = 10  # rows that a message names
Item = TypeVar("Item")


class Form(NamedTuple):
    """What a text file is written in."""

    separator: str | None  # a key of SEPARATORS; None for a file without columns, as JSON
    encoding: str
    guessed: bool  # whether the encoding is a guess
    line_end: str


@dataclass
class Reading:
    """What is known of the files that are read."""

    separator: str = "auto"
    encoding: str = "auto"
    skip: bool = False
    """Whether rows that cannot be used are left out, instead of refused."""
    likely: Mapping[str, str] = field(default_factory=dict)
    """Separator and encoding of the file that an adapter was trained on: tried first, where looking leaves it open."""
    forms: dict[Path, Form] = field(default_factory=dict)
    """What each file that was read is written in."""
    rows: dict[Path, int] = field(default_factory=dict)
    """Rows of each file, with those that are left out."""
    columns: dict[Path, set[str]] = field(default_factory=dict)
    """Columns of each file whose cells were read."""
    skipped: dict[Path, dict[int, str]] = field(default_factory=dict)
    """File -> row, counted from 1 -> why it is left out."""

    def __post_init__(self) -> None:
        if self.encoding != "auto":
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise UserError(f"encoding={self.encoding!r}: no such encoding; try utf-8, cp1252 or utf-16") from None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Read all files in this way inside the block."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def leave_out(self, path: Path, rows: Mapping[int, str]) -> bool:
        """Leave rows of a file out when it is read again; False if that is not wanted, or changes nothing."""
        before = self.skipped.setdefault(path, {})
        new = {row: why for row, why in rows.items() if row not in before}
        if not self.skip or not new:
            return False
        before |= new
        return True

    @property
    def main(self) -> dict[str, str]:
        """Separator and encoding of the first file that was read, as `likely` takes them."""
        form = next(iter(self.forms.values()), None)
        if form is None:
            return {}
        return {"encoding": form.encoding, **({} if form.separator is None else {"separator": form.separator})}

    def notes(self) -> list[str]:
        """What the user should know: what is not as usual in the files, and how many rows are left out."""
        return [note for path in self.forms for note in self._notes(path)]

    def _notes(self, path: Path) -> Iterator[str]:
        form, found = self.forms[path], []
        if form.separator not in (None, USUAL.get(path.suffix.lower())):
            found.append(f"{form.separator!r} between its cells")
        if form.encoding != "utf-8":
            why = ", a guess because it is no UTF-8 (--encoding NAME says another)" if form.guessed else ""
            found.append(f"encoding {form.encoding}{why}")
        if form.line_end != "\n":
            found.append(f"lines that end with {form.line_end!r}")
        if found:
            yield f"{path.name} is read with {', '.join(found)}"
        if left := self.skipped.get(path):
            reasons: dict[str, list[int]] = {}
            for row in sorted(left):
                reasons.setdefault(left[row], []).append(row)
            listed = "; ".join(f"{why} in {counted(rows)}" for why, rows in reasons.items())
            yield f"{path.name}: {len(left)} of {self.rows.get(path, len(left))} rows are left out: {listed}"


_active: ContextVar[Reading | None] = ContextVar("reading", default=None)


def current() -> Reading:
    """The reading that holds here."""
    return _active.get() or Reading()


def counted(rows: Sequence[int]) -> str:
    """Rows as messages name them: at most SHOWN, the others counted."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{len(rows)} rows ({', '.join(map(str, rows[:SHOWN]))}{more})"


def left(path: Path, items: Sequence[Item]) -> list[Item]:
    """The items of a file, one a row, without those that are left out."""
    reading = current()
    reading.rows[path] = len(items)
    out = reading.skipped.get(path, {})
    return [item for row, item in enumerate(items, 1) if row not in out]


def numbers(where: object, places: Sequence[int]) -> list[int]:
    """The row numbers in the file of rows at these places (from 1) among those that are not left out."""
    out = current().skipped.get(where, {}) if isinstance(where, Path) else {}
    if not out:
        return list(places)
    kept = [row for row in range(1, max(places, default=0) + len(out) + 1) if row not in out]
    return [kept[place - 1] for place in places]


# ---- looking at a file -----------------------------------------------------------------------------------------------


def text_of(path: Path) -> tuple[str, Form]:
    """The text of a file without byte order mark, and what it is written in. Raises UserError, OSError."""
    reading = current()
    data = path.read_bytes()
    encoding, guessed = _encoding(path, data, reading)
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        raise UserError(f"{path} cannot be read in {encoding} ({error}): say another with --encoding") from None
    separator = _separator(path, text, reading) if path.suffix.lower() in USUAL else None
    end = LINE_END.search(text)  # that of the first line: cells may hold others
    reading.forms[path] = form = Form(separator, encoding, guessed, end[0] if end else "\n")
    return text, form


def _encoding(path: Path, data: bytes, reading: Reading) -> tuple[str, bool]:
    """The encoding, and whether it is a guess: as told, by its mark, UTF-8 if it is that, else the likeliest."""
    if reading.encoding != "auto":
        return reading.encoding, False
    if marked := next((name for mark, name in MARKS.items() if data.startswith(mark)), None):
        return marked, False
    try:
        data.decode()
    except UnicodeDecodeError as error:
        _refuse_damaged(path, data, error)
    else:
        return "utf-8", False
    for name in (*filter(None, [reading.likely.get("encoding")]), *GUESSES):
        try:
            data.decode(name)
        except UnicodeError:
            continue
        return name, True
    raise AssertionError("latin-1 takes any bytes")


def _refuse_damaged(path: Path, data: bytes, error: UnicodeDecodeError) -> None:
    """Raise UserError for UTF-8 that is damaged in places: read as another encoding, all its other letters would be."""
    whole = len(re.findall(rb"[\xc2-\xf4][\x80-\xbf]+", data))
    broken = data.decode(errors="replace").count("\ufffd")
    if whole > broken:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is UTF-8, but for {broken} places, the first in line {line}: save it as UTF-8 text again, or say "
            "its encoding with --encoding"
        ) from None


def _separator(path: Path, text: str, reading: Reading) -> str:
    """The separator: as told, else the usual one of the file's ending if its header has it, else one that fits."""
    if reading.separator != "auto":
        return reading.separator
    usual = USUAL[path.suffix.lower()]
    lines = text[: 2**20].splitlines(keepends=True)[:LINES]
    whole = lines[:-1] if len(lines) > 1 and not lines[-1].endswith(("\n", "\r")) and len(text) > 2**20 else lines
    for name in dict.fromkeys([usual, *filter(None, [reading.likely.get("separator")]), *SEPARATORS]):
        if name in SEPARATORS and _fits(whole, SEPARATORS[name]):
            return name
    return usual


def _fits(lines: Sequence[str], separator: str) -> bool:
    """Whether the header has this separator, and most rows as many cells as it."""
    try:
        rows = [row for row in csv.reader(lines, delimiter=separator) if row]
    except csv.Error:
        return False
    if not rows or len(rows[0]) < 2:
        return False
    same = sum(len(row) == len(rows[0]) for row in rows[1:])
    return 2 * same >= len(rows) - 1
