"""Results on stdout: tables for people or, with --json, JSON for machines."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table

from loralab.errors import UserError

Json = Annotated[bool, Parameter(help="Print JSON, for machines.")]

WIDEST = 1000  # characters of a table
FOLDED = 12  # characters to which a text may be folded
NAME = 24  # the same of the first column, which names its row
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what steers a terminal: all but tabs and line ends
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """Print a table. The first `texts` columns are text, the others are numbers, which are never wrapped."""
    shown = _plain()
    columns, rows = [clean(column) for column in columns], [[clean(cell) for cell in row] for row in rows]
    for i, column in enumerate(columns):
        number, widest = i >= texts, max(cell_len(line[i]) for line in (columns, *rows))
        least = widest if number else min(widest, FOLDED if i else NAME)
        side: JustifyMethod = "right" if number else "left"
        shown.add_column(column, justify=side, no_wrap=number, overflow="fold", min_width=least)
    for row in rows:
        shown.add_row(*row)
    _print(title, shown)


def pairs(title: str, data: Mapping[str, str]) -> None:
    """Print a name and its value on each line."""
    shown = _plain()
    shown.show_header = False
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for key, value in data.items():
        shown.add_row(clean(key), clean(value))
    _print(title, shown)


def say(line: str) -> None:
    """Print a line that may have names from files in it."""
    print(clean(line))


def note(text: object, kind: str = "note") -> None:
    """Print a note on stderr; it may quote names from files."""
    print(f"{kind}: {clean(str(text))}", file=sys.stderr)


def clean(text: str) -> str:
    """A text that cannot steer a terminal: control characters are their escapes."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _plain() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _print(title: str, shown: Table) -> None:
    """Print without markup, as a path or an equation may have brackets.

    A table whose numbers do not fit the terminal is printed at its own width: rich would cut digits off.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    needed = console.measure(shown, options=console.options.update(width=WIDEST)).minimum
    console.width = max(console.width, needed)
    console.print(clean(title), style="bold", soft_wrap=True)  # a table would wrap its title to its own width
    console.print(shown)


def as_json(data: Any) -> None:
    """Print JSON; a number that is not known or not finite is null, as JSON has no word for it."""
    print(json.dumps(_finite(data), indent=1, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def as_bytes(memory: str | None) -> int | None:
    """The value of --memory in bytes: 2GB -> 2000000000. Raises UserError for what is no size."""
    if memory is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)", memory.strip())
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise UserError(f"--memory {memory}: expected a size such as 500MB, 2GB or 1.5GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def number(value: float | None) -> str:
    """A number with three digits; - if it is not known."""
    return "-" if value is None else f"{value:.3g}"
