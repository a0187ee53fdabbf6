"""Progress of a run on stderr: a bar with rate and time left, and a line for each epoch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from loralab.errors import printable


class Reporter(Protocol):
    """Receives the progress of a run, or of several over one model; `of` names the run, and is empty for a single one.

    What `epoch` raises ends the training; it goes on from there with --resume.
    """

    def start(self, label: str, rows: int, done: int) -> None: ...
    def advance(self, rows: int, loss: float) -> None: ...
    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Reports nothing: for tests, and for all processes but the first."""

    def start(self, label: str, rows: int, done: int) -> None: ...
    def advance(self, rows: int, loss: float) -> None: ...
    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Plain(ProgressColumn):
    """A text of a task as it is: a name may have brackets, which rich would read as markup, or steer a terminal."""

    def __init__(self, field: str = "") -> None:
        super().__init__()
        self.field = field

    def render(self, task: Task) -> Text:
        return Text(printable(str(task.fields[self.field] if self.field else task.description)))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{'-- rows/s' if speed is None else rate(speed):>11}", style="progress.data.speed")


def rate(rows: float) -> str:
    """Rows a second; below ten with two digits, as a language model on a CPU takes a fraction of one."""
    return f"{rows:.0f} rows/s" if rows >= 10 else f"{rows:.2g} rows/s"


class Pulse:
    """Says once a minute that it is time for a line, where there is no terminal to draw a bar on."""

    every = 60.0  # seconds

    def __init__(self, console: Console) -> None:
        self.silent = console.is_terminal
        self.last = time.monotonic()

    def due(self) -> bool:
        if self.silent or time.monotonic() - self.last < self.every:
            return False
        self.last = time.monotonic()
        return True


class Bar:
    """A bar on stderr; if stderr is no terminal, a line for each epoch and each minute."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.pulse = Pulse(self.console)

    def start(self, label: str, rows: int, done: int) -> None:
        columns = (Plain(), BarColumn(), MofNCompleteColumn(), _Rate(), "left", TimeRemainingColumn())
        loss = Plain("loss")  # nothing before the first step
        self.bar = Progress(*columns, loss, console=self.console, transient=True)
        self.bar.add_task(label, total=rows, completed=done, loss="")
        if self.console.is_terminal:
            self.bar.start()

    def advance(self, rows: int, loss: float | None = None) -> None:
        assert self.bar is not None
        now = "" if loss is None else f"loss {loss:.4f}"
        self.bar.update(self.bar.task_ids[0], advance=rows, loss=now)
        if self.pulse.due():
            task = self.bar.tasks[0]
            left = f", {clock(task.time_remaining)} left" if task.time_remaining is not None else ""
            self.say(f"{task.completed:.0f} of {task.total or 0:.0f} rows{left}" + (now and f", {now}"))

    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None:
        self.say(named(of, epoch_line(record, epochs, metric)))

    def say(self, text: str) -> None:
        self.console.print(printable(text), soft_wrap=True, markup=False, emoji=False)

    def stop(self) -> None:
        if self.bar is not None and self.console.is_terminal:  # one that never started would print an empty line
            self.bar.stop()


@contextmanager
def rows_bar(label: str, rows: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many rows are done, by a bar or a line a minute; gives what is told the rows of each batch."""
    bar = Bar()
    bar.start(label, rows, 0)
    try:
        yield bar.advance
    finally:
        bar.stop()


def named(of: str, text: str) -> str:
    """Return the text with the name of its run before it, if there is one."""
    return f"{of}: {text}" if of else text


def epoch_line(record: dict[str, Any], epochs: int, metric: str) -> str:
    """Return the line of an epoch from its record in metrics.jsonl."""
    held_out = record["held_out"]
    parts = [f"epoch {record['epoch']}/{epochs}", f"loss {record['train_loss']:.4f}"]
    parts += [f"held-out {metric} {held_out[metric]:.4f}"] if held_out else []
    parts += [f"validation {metric} {record['validation'][metric]:.4f}"] if record["validation"] else []
    return "  ".join([*parts, f"{record['seconds']:.1f} s"])


def clock(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
