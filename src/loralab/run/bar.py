"""What a run tells while it goes: a bar with rate and time left on stderr, and a line for each epoch."""

from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Reporter(Protocol):
    """What hears of one run or of several that go together; `of` is a run's folder, empty where there is one run."""

    def start(self, label: str, rows: int, done: int) -> None: ...
    def advance(self, rows: int, loss: float) -> None: ...
    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Tells nothing: for tests, and for all processes but the first."""

    def start(self, label: str, rows: int, done: int) -> None: ...
    def advance(self, rows: int, loss: float) -> None: ...
    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("  -- rows/s" if speed is None else f"{speed:4.0f} rows/s", style="progress.data.speed")


class Bar:
    """A rich bar on stderr; where stderr is no terminal, only the lines."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None

    def start(self, label: str, rows: int, done: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TextColumn("left"))
        loss = TextColumn("loss {task.fields[loss]:.4f}")
        self.bar = Progress(*columns, TimeRemainingColumn(), loss, console=self.console, transient=True)
        self.bar.add_task(label, total=rows, completed=done, loss=float("nan"))
        if self.console.is_terminal:
            self.bar.start()

    def advance(self, rows: int, loss: float) -> None:
        assert self.bar is not None
        self.bar.update(self.bar.task_ids[0], advance=rows, loss=loss)

    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None:
        self.say(named(of, epoch_line(record, epochs, metric)))

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def named(of: str, text: str) -> str:
    return f"{of}: {text}" if of else text


def epoch_line(record: dict[str, Any], epochs: int, metric: str) -> str:
    held_out = record["held_out"]
    parts = [f"epoch {record['epoch']}/{epochs}", f"loss {record['train_loss']:.4f}"]
    parts += [f"held-out {metric} {held_out[metric]:.4f}"] if held_out else []
    return "  ".join([*parts, f"validation {metric} {record['validation'][metric]:.4f}", f"{record['seconds']:.1f} s"])
