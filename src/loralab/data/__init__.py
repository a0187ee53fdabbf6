"""Tasks: GLUE, the embedded ones, a user's own file; with their metrics and held-out rows."""

from collections.abc import Callable
from pathlib import Path

from loralab.data import embedded, glue, records, tables
from loralab.data.metrics import METRICS, is_constant, is_flat, score
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
    "is_flat",
    "is_name",
    "load",
    "names",
    "objective",
    "sample",
    "score",
]

EMBEDDED: dict[str, tuple[str, Callable[[], Task]]] = {  # name -> its objective, and what makes it
    "minimal-pairs": ("classification", embedded.load),
    records.NAME: ("causal", records.load),
}
ALIASES = {"demo": "minimal-pairs", "embedded": "minimal-pairs"}


def names() -> tuple[str, ...]:
    """Return the names of all tasks that have one."""
    return (*EMBEDDED, *glue.TABLE)


def is_name(task: str) -> bool:
    """Tell whether a task is known by this name."""
    return _embedded(task) is not None or glue.canonical(task) is not None


def load(task: str, data: Path | str | None = None) -> Task:
    """Load a task by its name; `data` is the folder of GLUE. Raises UserError."""
    if (name := _embedded(task)) is not None:
        return EMBEDDED[name][1]()
    if glue.canonical(task) is None:
        raise UserError(_unknown(task))
    return glue.load(task, None if data is None else Path(data))


def objective(task: str) -> str:
    """Return the objective of a task by name; of a name that nobody knows, classification."""
    name = _embedded(task)
    return "classification" if name is None else EMBEDDED[name][0]


def _embedded(task: str) -> str | None:
    name = ALIASES.get(task.lower(), task.lower())
    return name if name in EMBEDDED else None


def _unknown(task: str) -> str:
    file = next((f"{task}{ending}" for ending in tables.READERS if Path(f"{task}{ending}").is_file()), None)
    names_near = hint(task.lower(), (*EMBEDDED, *ALIASES, *glue.TABLE), cutoff=0.5)
    meant = names_near if file is None else f" (did you mean {file!r}?)"
    return f"no task {task!r}: there are {', '.join(names())}, or a file ending in {', '.join(tables.READERS)}{meant}"
