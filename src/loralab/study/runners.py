"""Who does the runs of a study: a table of runners. A runner takes settings and yields each with its outcome.

`wide` asks for all runs of a stage at once, not a task at a time.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from loralab.errors import UserError
from loralab.run import Outcome, Settings
from loralab.run.sharing import MOST, grouped
from loralab.study import on_ray
from loralab.study.bar import StudyBar
from loralab.study.in_processes import InProcesses
from loralab.study.stored import run_stored, run_stored_together


class Runner(Protocol):
    @property
    def wide(self) -> bool: ...

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]: ...


@dataclass(frozen=True)
class InTurn:
    """Runs one after the other, in this process."""

    wide: bool = False

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]:
        for settings in runs:
            bar.begin(settings)
            yield settings, run_stored(settings, bar, adapters)


@dataclass(frozen=True)
class Together:
    """Runs that share passes over one base, a group after the other, in this process."""

    most: int = MOST  # runs over one model
    wide: bool = False

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]:
        for group in grouped(runs, self.most):
            bar.begin(group.runs[0], others=len(group.runs) - 1, why=group.why)
            yield from zip(group.runs, run_stored_together(group.runs, bar, adapters), strict=True)


def _in_turn(address: str | None) -> Runner:
    if address is not None:
        raise UserError(f"--on in-turn:{address}: in-turn is this process and has no address")
    return InTurn()


def _on_ray(address: str | None) -> Runner:
    on_ray.library()
    return on_ray.OnRay(address)


def _together(most: str | None) -> Runner:
    if most is None:
        return Together()
    if not most.isdecimal() or int(most) < 1:
        raise UserError(f"--on together:{most}: expected how many runs may share a pass, 1 or more, as in together:8")
    return Together(int(most))


def _in_processes(count: str | None) -> Runner:
    if count is None:
        return InProcesses(os.cpu_count() or 1)
    if not count.isdecimal() or not 1 <= int(count) <= 256:
        raise UserError(f"--on processes:{count}: expected how many processes, 1 to 256, as in --on processes:4")
    return InProcesses(int(count))


RUNNERS: dict[str, Callable[[str | None], Runner]] = {
    "together": _together,
    "in-turn": _in_turn,
    "processes": _in_processes,
    "ray": _on_ray,
}


def runner(on: str) -> Runner:
    """The runner of a flag: its name, or name:address. Raises UserError for an unknown one."""
    name, _, address = on.partition(":")
    if name not in RUNNERS:
        raise UserError(f"--on {on}: expected {', '.join(RUNNERS)}, as in --on together:8 or --on ray:ADDRESS")
    return RUNNERS[name](address or None)
