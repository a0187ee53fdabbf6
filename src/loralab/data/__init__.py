"""Tasks: GLUE, the embedded one, a user's own file; and their metrics and held-out rows."""

from collections.abc import Sequence
from pathlib import Path

from loralab.data import files, glue, tables
from loralab.data.metrics import METRICS, is_constant, score
from loralab.data.selection import held_out, sample
from loralab.data.task import Split, Task, build
from loralab.errors import UserError, hint

__all__ = ["METRICS", "Split", "Task", "build", "held_out", "is_constant", "load", "names", "sample", "score"]

EMBEDDED = ("minimal-pairs", "demo", "embedded")  # its name and its aliases


def names() -> tuple[str, ...]:
    """Every task that has a name."""
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
    """A task by name, or of a file. `data` is where GLUE lies; the keywords are for files only."""
    path = Path(task)
    if path.suffix.lower() in tables.READERS:
        columns = (text,) if isinstance(text, str) else tuple(text)
        return files.load(path, None if validation is None else Path(validation), columns, label, regression)
    given = {"--text": text, "--label": label, "--validation": validation, "regression": regression is not None}
    if path.is_file():
        raise UserError(f"{task}: a file ending in {', '.join(tables.READERS)} was expected")
    if task.lower() not in EMBEDDED and glue.canonical(task) is None:
        raise UserError(_unknown(task))
    if any(given.values()):
        used = ", ".join(name for name, value in given.items() if value)
        raise UserError(f"{used} given, but {task} knows its columns: leave it out, it is for a file of your own")
    if task.lower() not in EMBEDDED:
        return glue.load(task, None if data is None else Path(data))
    from loralab.data import embedded

    return embedded.load()


def _unknown(task: str) -> str:
    meant = hint(task.lower(), (*EMBEDDED, *glue.TABLE), cutoff=0.5)
    return f"no task {task!r}: there are {', '.join(names())}, or a file ending in {', '.join(tables.READERS)}{meant}"
