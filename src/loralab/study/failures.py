"""The failed runs of a study, those with one reason together."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from loralab.run.folder import FAILED
from loralab.schema import listed
from loralab.study.record import Cell, Key, Study, failure

NUMBER = re.compile(r"\d+")
BEFORE, AFTER = " failed: ", "; its traceback is in "  # what stands around the reason in a run's own message
SHOWN = 3  # reasons, and cells of each


@dataclass
class Reason:
    """Why runs failed, in the words of the first of them."""

    text: str
    folders: list[Path] = field(default_factory=list)  # of the runs
    cells: dict[Key, None] = field(default_factory=dict)  # in the order of the study

    def __str__(self) -> str:
        names = [" ".join(key) for key in self.cells]
        runs = f"{len(self.folders)} run{'s' * (len(self.folders) > 1)}"
        return f"{self.text} ({runs}: {listed(names, SHOWN)})"


def reasons(study: Study) -> list[Reason]:
    """Return why final runs failed, the most frequent first. Messages that differ in numbers alone are one reason."""
    found: dict[str, Reason] = {}
    seen: set[str | None] = set()
    for s in study.schedule:
        if s.role != "final" or (why := failure(study.store, s)) is None:
            continue
        text = _without_folder(why, str(s.address))
        reason = found.setdefault(NUMBER.sub("#", text), Reason(text))
        reason.cells[s.key] = None
        if s.address not in seen:  # two cells may want one run
            reason.folders.append(study.store / str(s.address))
        seen.add(s.address)
    return sorted(found.values(), key=lambda reason: -len(reason.folders))


def _without_folder(why: str, address: str) -> str:
    """Return a run's message without the places in it, which no two runs share."""
    before, said, rest = why.partition(BEFORE)
    return (rest if said and before.endswith(address) else why).partition(AFTER)[0]


def message(study: Study) -> str | None:
    """Return one line on all that failed or could not run, None if nothing did."""
    found = reasons(study)
    collapsed, other = list[str](), list[str]()
    for key, cell in study.cells().items():
        if cell.pending:
            (collapsed if _collapsed(study, cell) else other).append(" ".join(key))
    parts = []
    if found:
        failed = sum(len(reason.folders) for reason in found)
        head = f"{failed} run{'s' * (failed > 1)} failed: " + "; ".join(map(str, found[:SHOWN]))
        more = f"; and {len(found) - SHOWN} other reasons" if len(found) > SHOWN else ""
        parts.append(f"{head}{more}; each run's own message and traceback are in {_place(study, found)}")
    if other:
        parts.append(f"not run, as no tuning run worked or it could not start: {listed(other, SHOWN)}")
    if parts:
        parts.append("--retry runs again what failed")
    if collapsed:
        why = "every value that was tried gives the same for every row on a seed of tuning, try others"
        parts.append(f"not run, as {why}: {listed(collapsed, SHOWN)}")
    return "; ".join(parts) or None


def _collapsed(study: Study, cell: Cell) -> bool:
    """Whether tuning ended without a failure, and without a value whose runs all learned."""
    failed = any(failure(study.store, s) for s in study.schedule if s.role == "tune" and s.key == cell.key)
    return not failed and cell.tuning_collapsed > 0


def _place(study: Study, found: list[Reason]) -> Path:
    """Return the one file, or where such files lie."""
    first = found[0].folders[0]
    only = len(found) == len(found[0].folders) == 1
    return (first if only else study.store / "ADDRESS") / FAILED
