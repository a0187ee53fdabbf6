"""Tasks: GLUE, the embedded one, a user's own file; with their metrics and held-out rows."""

from collections.abc import Sequence
from pathlib import Path

from loralab.data import embedded, glue, own_files, tables
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
    "load",
    "names",
    "sample",
    "score",
]

EMBEDDED = ("minimal-pairs", "demo", "embedded")  # its name and its aliases


def names() -> tuple[str, ...]:
    """Return the names of all tasks that have one."""
    return (EMBEDDED[0], *glue.TABLE)


def load(
    task: str,
    data: Path | str | None = None,
    *,
    text: Sequence[str] = (),
    label: str | None = None,
    validation: Path | str | None = None,
    regression: bool | None = None,
) -> Task:
    """Load a task by its name, or from a file of one's own.

    `data` is the folder of GLUE; the keywords are for own files only: the text columns, the label column, a validation
    file, and whether the labels are scores (None: guess from how they look). Raises UserError.
    """
    path = Path(task)
    if path.suffix.lower() in tables.READERS:
        columns = (text,) if isinstance(text, str) else tuple(text)
        return own_files.load(path, None if validation is None else Path(validation), columns, label, regression)
    options = {"--text": text, "--label": label, "--validation": validation, "--problem-type": regression is not None}
    if path.is_file():
        raise UserError(f"{task}: a file ending in {', '.join(tables.READERS)} was expected")
    is_embedded = task.lower() in EMBEDDED
    if not is_embedded and glue.canonical(task) is None:
        raise UserError(_unknown(task))
    if any(options.values()):
        used = ", ".join(name for name, value in options.items() if value)
        raise UserError(f"{used} given, but {task} knows its columns: leave it out, it is for a file of your own")
    return embedded.load() if is_embedded else glue.load(task, None if data is None else Path(data))


def _unknown(task: str) -> str:
    meant = hint(task.lower(), (*EMBEDDED, *glue.TABLE), cutoff=0.5)
    return f"no task {task!r}: there are {', '.join(names())}, or a file ending in {', '.join(tables.READERS)}{meant}"
