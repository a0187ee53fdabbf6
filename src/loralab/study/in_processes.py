"""Groups of runs in several processes of this machine: many cores, or one GPU that a single process leaves idle.

A step of a small model on a GPU waits for Python, so several processes on one card do several times the work of one.
Runs that can share passes do (see `together`), in no larger groups than keep every process busy. On a GPU each process
has its part of the memory (run/room.py). A run that is out of memory there, with no other in its process, is tried
again at the end, when no other process has anything to do.
"""

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

from loralab.errors import UserError
from loralab.run import Outcome, Settings
from loralab.run.bar import Silent
from loralab.run.folder import FAILED
from loralab.run.memory import trim
from loralab.run.room import share_card
from loralab.run.sharing import MOST, grouped
from loralab.run.state import OutOfMemory
from loralab.study.bar import StudyBar
from loralab.study.stored import run_stored_together

LOOKS = 1.0  # seconds after which the study looks again how far its processes are


@dataclass
class InProcesses:
    count: int
    wide: bool = True  # all runs of a stage at once, over models and tasks
    pool: ProcessPoolExecutor | None = None  # kept from stage to stage, as its processes take seconds to start
    at: Sequence[float] = ()  # shared with the processes: rows done and rows to do of each

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]:
        """Yield each run with its outcome, as they finish. Raises UserError if a process dies."""
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.at, begun = context.RawArray("d", 2 * self.count), context.Value("i", 0)
            self.pool = ProcessPoolExecutor(self.count, context, initializer=_begin, initargs=(self.at, begun))
        threads = max(1, (os.cpu_count() or 1) // self.count)
        ready = [replace(s, threads=s.threads or threads) for s in runs]
        original = {at.folder: settings for at, settings in zip(ready, runs, strict=True)}
        groups = grouped(ready, min(MOST, math.ceil(len(runs) / self.count)))
        groups.sort(key=lambda group: len(group.runs), reverse=True)  # the longest first, so that all end together
        left = {self.pool.submit(work, group.runs, adapters, self.count): group.runs for group in groups}
        again: list[Settings] = []
        try:
            while left:
                for done in self._finished(left, bar):
                    for s, outcome in zip(left.pop(done), done.result(), strict=True):
                        if isinstance(outcome, OutOfMemory) and self.count > 1:
                            (s.folder / FAILED).unlink(missing_ok=True)
                            again.append(s)
                        else:
                            yield original[s.folder], outcome
            for s in again:
                alone = self.pool.submit(work, [s], adapters, 1)
                while not self._finished([alone], bar):
                    pass
                (outcome,) = alone.result()
                yield original[s.folder], outcome
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the study died, perhaps for want of memory. The same command goes on."
            ) from error
        except BaseException:
            self._stop()
            raise

    def _finished(self, left: Collection[Future[Any]], bar: StudyBar) -> set[Future[Any]]:
        """Those that are done, after LOOKS seconds at most; the bar says how far the others are."""
        finished, others = wait(left, LOOKS, FIRST_COMPLETED)
        if busy := min(self.count, len(others)):
            bar.elsewhere(f"in {busy} process{'es' * (busy > 1)}", sum(self.at[::2]), sum(self.at[1::2]))
        return finished

    def _stop(self) -> None:
        """End the processes at once: their runs go on from their checkpoints next time."""
        assert self.pool is not None
        for process in list(self.pool._processes.values()):
            process.terminate()
        self.pool.shutdown(cancel_futures=True)


class Told(Silent):
    """Tells the study how far the runs of this process are, in its place of the shared array."""

    def __init__(self, at: Any, place: int) -> None:
        self.at, self.place = at, 2 * place

    def start(self, label: str, rows: int, done: int) -> None:
        self.at[self.place : self.place + 2] = [done, rows]

    def advance(self, rows: int, loss: float) -> None:
        self.at[self.place] += rows

    def nothing(self) -> None:
        """There are no runs here any more; those that are trained and still evaluated count as all but done."""
        self.at[self.place : self.place + 2] = [0, 0]


_told: Told | None = None  # of this process


def work(many: Sequence[Settings], adapters: bool, count: int) -> list[Outcome]:
    """Run a group in this process, one of `count` that have work. Raises what `run_stored_together` does."""
    share_card(count)
    try:
        return run_stored_together(many, _told, adapters)
    finally:
        if _told is not None:
            _told.nothing()
        trim()  # what this process keeps no other one can have


def _begin(at: Any, begun: Any) -> None:
    """Begin a process: take a place in the shared array, and end when the parent has."""
    global _told
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the processes
    Thread(target=_end_with_parent, daemon=True).start()
    with begun:
        _told, begun.value = Told(at, begun.value), begun.value + 1


def _end_with_parent() -> None:
    """A parent that was killed ends nobody: its processes would train on for an hour and hold their runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)  # files are written under another name first, as for any kill
