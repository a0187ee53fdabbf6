"""Runs that share passes over one base, a group after the other, in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loralab.run import Outcome, Settings
from loralab.run.sharing import MOST, grouped
from loralab.study.bar import StudyBar
from loralab.study.runners.one import run_together


@dataclass(frozen=True)
class Together:
    most: int = MOST  # runs over one model
    wide: bool = False

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]:
        for group in grouped(runs, self.most):
            bar.begin(group.runs[0], others=len(group.runs) - 1, why=group.why)
            yield from zip(group.runs, run_together(group.runs, bar, adapters), strict=True)
