"""Runs one after the other, in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loralab.run import Outcome, Settings
from loralab.study.bar import StudyBar
from loralab.study.runners.one import run


@dataclass(frozen=True)
class InTurn:
    wide: bool = False

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]:
        for settings in runs:
            bar.begin(settings)
            yield settings, run(settings, bar, adapters)
