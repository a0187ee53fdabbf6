"""Tables on stdout, for people or, with --json, for machines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is text, the others are numbers."""
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def as_json(data: Any) -> None:
    print(json.dumps(data, indent=1))


def pairs(title: str, data: Mapping[str, str]) -> None:
    shown = Table(title=title, title_justify="left", show_header=False)
    for key, value in data.items():
        shown.add_row(key, value)
    Console().print(shown)


def size(count: float) -> str:
    """1234567 bytes -> 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
