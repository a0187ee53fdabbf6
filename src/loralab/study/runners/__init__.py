"""Who does the runs of a study: a table of runners. One gets settings and yields each with its outcome, as they finish.

`wide` asks for all runs of a stage at once, not a task at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from loralab.errors import UserError
from loralab.run import Outcome, Settings
from loralab.study.bar import StudyBar
from loralab.study.runners.in_turn import InTurn
from loralab.study.runners.on_ray import OnRay
from loralab.study.runners.on_ray import library as ray_library
from loralab.study.runners.together import Together

__all__ = ["RUNNERS", "Outcome", "Runner", "runner"]


class Runner(Protocol):
    @property
    def wide(self) -> bool: ...

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]: ...


def _in_turn(address: str | None) -> Runner:
    if address is not None:
        raise UserError(f"--on in-turn:{address}: in-turn is this process and has no address")
    return InTurn()


def _on_ray(address: str | None) -> Runner:
    ray_library()
    return OnRay(address)


def _together(most: str | None) -> Runner:
    if most is None:
        return Together()
    if not most.isdecimal() or int(most) < 1:
        raise UserError(f"--on together:{most}: expected how many runs may share a pass, 1 or more, as in together:8")
    return Together(int(most))


RUNNERS: dict[str, Callable[[str | None], Runner]] = {"together": _together, "in-turn": _in_turn, "ray": _on_ray}


def runner(on: str) -> Runner:
    """The runner of a flag: its name, or name:address."""
    name, _, address = on.partition(":")
    if name not in RUNNERS:
        raise UserError(f"--on {on}: expected {', '.join(RUNNERS)}, as in --on together:8 or --on ray:ADDRESS")
    return RUNNERS[name](address or None)
