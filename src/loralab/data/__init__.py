"""Tasks: GLUE, the embedded one, a user's own file; with their metrics and held-out rows."""

from pathlib import Path

from loralab.data import embedded, glue, tables
from loralab.data.metrics import METRICS, is_constant, score
from loralab.data.selection import held_out, held_out_unused, sample
from loralab.data.task import Split, Task, build
from loralab.errors import UserError, hint

__all__ = [
    "METRICS",
    "Split",
    "Task",
    "build",
    "held_out",
    "held_out_unused",
    "is_constant",
    "is_name",
    "load",
    "names",
    "sample",
    "score",
]

EMBEDDED = ("minimal-pairs", "demo", "embedded")  # its name and its aliases


def names() -> tuple[str, ...]:
    """Return the names of all tasks that have one."""
    return (EMBEDDED[0], *glue.TABLE)


def is_name(task: str) -> bool:
    """Tell whether a task is known by this name."""
    return task.lower() in EMBEDDED or glue.canonical(task) is not None


def load(task: str, data: Path | str | None = None) -> Task:
    """Load a task by its name; `data` is the folder of GLUE. Raises UserError."""
    if task.lower() in EMBEDDED:
        return embedded.load()
    if glue.canonical(task) is None:
        raise UserError(_unknown(task))
    return glue.load(task, None if data is None else Path(data))


def _unknown(task: str) -> str:
    meant = hint(task.lower(), (*EMBEDDED, *glue.TABLE), cutoff=0.5)
    return f"no task {task!r}: there are {', '.join(names())}, or a file ending in {', '.join(tables.READERS)}{meant}"
