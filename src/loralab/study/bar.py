"""The progress of a study: a bar for the whole of it with time left, and under it that of the run."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress

from loralab.errors import printable
from loralab.run import Settings
from loralab.run.bar import Plain, Pulse, clock
from loralab.study import search


class StudyBar:
    """Counts rows times epochs, so that a long run is more than a short one; it is the Reporter of every run too."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(Plain(), BarColumn(), Plain("status"), console=self.console, transient=True)
        self.study_line = self.bar.add_task("study", total=1, status="")
        self.run_line = self.bar.add_task("", total=1, status="", visible=False)
        self.started = time.monotonic()
        self.pulse = Pulse(self.console)
        self.runs, self.done_runs = 0, 0
        self.rows_done = 0.0  # in this session
        self.label, self.trial = "", None
        self.labels: dict[str, str] = {}  # address -> what a reader calls the run

    def open(self, name: str, runs: int, done: int, rows: float) -> None:
        """`runs` of which `done` are finished; `rows` are left to do, as far as they are known."""
        self.runs, self.done_runs = runs, done
        self.bar.update(self.study_line, description=name, total=max(rows, 1.0), status=f"{done}/{runs} runs")
        if self.console.is_terminal:
            self.bar.start()

    def close(self) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def begin(self, settings: Settings, trial: Any = None, others: int = 0, why: str | None = None) -> None:
        """A run starts in this process, with `others` in the same passes, or alone for the reason `why`; an Optuna
        trial may prune it."""
        more = f" and {others} more in the same passes" if others else f" (alone: {why})" if why else ""
        self.label, self.trial = self.labels.get(settings.folder.name, "") + more, trial

    def finished(self, settings: Settings, outcome: dict[str, Any] | Exception, rows: float) -> None:
        """A line for a run that had `rows` to do."""
        self.done_runs += 1
        self.rows_done += rows
        self._update()
        label, width = self.labels.get(settings.folder.name, ""), len(str(self.runs))
        place = f"[{self.done_runs:{width}d}/{self.runs}]"
        self._line(f"{place} {label}  {described(outcome)}")

    def _update(self, of_run: float = 0.0) -> None:
        done = self.rows_done + of_run
        left = (self.bar.tasks[self.study_line].total or 0) - done
        rate = done / max(time.monotonic() - self.started, 1e-9)
        time_left = f", {clock(left / rate)} left" if done and left > 0 else ""
        self.bar.update(self.study_line, completed=done, status=f"{self.done_runs}/{self.runs} runs{time_left}")

    # ---- the Reporter of a run ----

    def start(self, label: str, rows: int, done: int) -> None:
        self.bar.update(
            self.run_line, description=self.label or label, total=rows, completed=done, status="", visible=True
        )

    def advance(self, rows: int, loss: float) -> None:
        self.bar.update(self.run_line, advance=rows, status=f"loss {loss:.4f}")
        run = self.bar.tasks[self.run_line]
        self._update(run.completed)
        self._pulse(run.description, run.completed, run.total or 0, f", loss {loss:.4f}")

    def elsewhere(self, where: str, done: float = 0.0, rows: float = 0.0) -> None:
        """Runs are under way `where` says, not in this process: `done` of `rows`, where that is known."""
        self.bar.update(self.run_line, description=where, total=rows or None, completed=done, status="", visible=True)
        self._update(done)
        self._pulse(where, done, rows)

    def _pulse(self, what: str, done: float, rows: float, more: str = "") -> None:
        """A line a minute, where there is no terminal to draw a bar on."""
        if self.pulse.due():
            place = f": {done:.0f} of {rows:.0f} rows{more}" if rows else ""
            study = self.bar.tasks[self.study_line].fields["status"]
            self._line(f"{study}; {what}{place}")

    def _line(self, text: str) -> None:
        self.console.print(printable(text), soft_wrap=True, markup=False, emoji=False)

    def epoch(self, record: dict[str, Any], epochs: int, metric: str, of: str) -> None:
        """No line, as a run has one at its end; but here a search decides whether the run goes on."""
        if self.trial is not None:
            search.report(self.trial, record, epochs, metric)

    def say(self, text: str) -> None:
        """Nothing: notes are in run.json, and warnings in the line of the finished run."""

    def stop(self) -> None:
        self.bar.update(self.run_line, visible=False)


def described(outcome: dict[str, Any] | Exception) -> str:
    """The outcome of a run in a few words."""
    if isinstance(outcome, search.Pruned):
        return "pruned"
    if isinstance(outcome, Exception):
        return f"failed: {outcome}"
    metric, unlearnt = outcome["metric"], "  (did not learn: the same for every row)" * outcome["collapsed"]
    return f"{metric['name']} {metric['selected']:.4f}  {clock(outcome['time']['train_s'])}{unlearnt}"
