"""The table of published numbers, each with its protocol. They are in no table or picture with the results of a study.

They come from other models, metrics, selections and rows, so they are context and no baseline.
"""

import csv
from collections.abc import Callable
from pathlib import Path

from loralab.errors import UserError
from loralab.report.tables import Column, Table

NEEDED = ("paper_or_seed", "method", "model", "task", "metric", "value")
PROTOCOL = ("trainable_params", "rank", "alpha", "targets", "lr", "epochs", "batch_size", "max_len")
REST = ("std", "where", "notes")
MNLI = {"mnlim": "mnli", "mnlimm": "mnli"}  # matched and mismatched
TITLES = ("trainable", "rank", "alpha", "targets", "lr", "epochs", "batch", "tokens")


def table(file: Path, tasks: list[str]) -> Table:
    """The rows about `tasks`. Raises UserError for a file that cannot be read or used, or has no such row."""
    wanted = {plain(task) for task in tasks}
    rows = [row for row in _read(file) if plain(row["task"]) in wanted]
    if not rows:
        raise UserError(f"--published {file}: no row is about {', '.join(tasks)}")
    columns = [
        Column("task", lambda r: r["task"]),
        Column("source", lambda r: r["paper_or_seed"]),
        Column("method", lambda r: r["method"]),
        Column("model", lambda r: r["model"]),
        Column("metric and selection", lambda r: r["metric"]),
        Column("value", lambda r: r["value"] + f" ± {r['std']}" * bool(r["std"]), _value, "as printed there"),
        *(Column(title, _of(key)) for key, title in zip(PROTOCOL, TITLES, strict=True)),
        Column("where", lambda r: r["where"], short=False),
        Column("notes", lambda r: r["notes"] or "–", short=False),
    ]
    rows.sort(key=lambda row: plain(row["task"]))
    notes = ["Value: as the source prints it, with its ±; – where the source does not say"]
    about = (
        "Numbers of other people's work, under other protocols: another model, another selection (mostly the best "
        "epoch on the reported split), other rows. Most sources print scores times 100. The numbers are context: they "
        "are not compared with the results above."
    )
    return Table("published", "Published numbers", columns, rows, lambda row: row, notes, about, foreign=True)


def _of(key: str) -> Callable[[dict[str, str]], str]:
    return lambda row: row[key] or "–"


def plain(task: str) -> str:
    """SST-2, sst2 and `sst2 (data 1a2b3c)` are one task."""
    name = "".join(c for c in task.partition(" (")[0].lower() if c.isalnum())
    return MNLI.get(name, name)


def _value(row: dict[str, str]) -> float:
    try:
        return float(row["value"])
    except ValueError:
        return float("-inf")


def _read(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            if missing := [key for key in NEEDED if key not in (reader.fieldnames or ())]:
                raise UserError(f"--published {file}: no column {', '.join(missing)}; expected {', '.join(NEEDED)}")
            keys = (*NEEDED, *PROTOCOL, *REST)
            return [{key: (row.get(key) or "").strip() for key in keys} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--published {file} cannot be read: {error}") from error
