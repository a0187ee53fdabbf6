"""What a study tells while it runs: a bar for the whole of it with time left, and under it that of the run."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from loralab.run import Settings
from loralab.study import search
from loralab.study.estimate import clock


class StudyBar:
    """Counts rows times epochs, so that a long run is more than a short one; it is the Reporter of every run too."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.whole = self.bar.add_task("study", total=1, told="")
        self.part = self.bar.add_task("", total=1, told="", visible=False)
        self.started = time.monotonic()
        self.runs, self.done_runs = 0, 0
        self.work = 0.0  # done in this session, in rows
        self.label, self.trial = "", None
        self.labels: dict[str, str] = {}  # address -> what a reader calls the run

    def open(self, name: str, runs: int, done: int, rows: float) -> None:
        """`runs` of which `done` are finished; `rows` are left to do, as far as they are known."""
        self.runs, self.done_runs = runs, done
        self.bar.update(self.whole, description=name, total=max(rows, 1.0), told=f"{done}/{runs} runs")
        if self.console.is_terminal:
            self.bar.start()

    def close(self) -> None:
        self.bar.stop()

    def begin(self, settings: Settings, trial: Any = None, others: int = 0, why: str | None = None) -> None:
        """A run starts in this process, with `others` in the same passes or for a reason alone; a trial of a search may
        give it up."""
        more = f" and {others} more in the same passes" if others else f" (alone: {why})" if why else ""
        self.label, self.trial = self.labels.get(settings.folder.name, "") + more, trial

    def finished(self, settings: Settings, outcome: dict[str, Any] | Exception, rows: float) -> None:
        """A line for a run; `rows` it had to do."""
        self.done_runs += 1
        self.work += rows
        self._whole()
        label, width = self.labels.get(settings.folder.name, ""), len(str(self.runs))
        place = f"[{self.done_runs:{width}d}/{self.runs}]"
        self.console.print(f"{place} {label}  {told(outcome)}", soft_wrap=True, markup=False)

    def _whole(self, of_part: float = 0.0) -> None:
        done = self.work + of_part
        left = (self.bar.tasks[self.whole].total or 0) - done
        rate = done / max(time.monotonic() - self.started, 1e-9)
        shown = f", {clock(left / rate)} left" if done and left > 0 else ""
        self.bar.update(self.whole, completed=done, told=f"{self.done_runs}/{self.runs} runs{shown}")

    # ---- the Reporter of a run ----

    def start(self, label: str, rows: int, done: int) -> None:
        self.bar.update(self.part, description=self.label or label, total=rows, completed=done, told="", visible=True)

    def advance(self, rows: int, loss: float) -> None:
        self.bar.update(self.part, advance=rows, told=f"loss {loss:.4f}")
        self._whole(self.bar.tasks[self.part].completed)

    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None:
        """A line for a run is enough; but here a search looks whether the run is worth going on."""
        if self.trial is not None:
            search.report(self.trial, record, epochs)

    def say(self, text: str) -> None:
        """Notes are in run.json, and warnings in the line of the finished run."""

    def stop(self) -> None:
        self.bar.update(self.part, visible=False)


def told(outcome: dict[str, Any] | Exception) -> str:
    if isinstance(outcome, search.Pruned):
        return "pruned"
    if isinstance(outcome, Exception):
        return f"failed: {outcome}"
    metric, learnt = outcome["metric"], "  (did not learn: one class for every row)" * bool(outcome["warnings"])
    return f"{metric['name']} {metric['selected']:.4f}  {clock(outcome['time']['train_s'])}{learnt}"
