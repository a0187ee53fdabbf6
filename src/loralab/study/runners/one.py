"""Runs of a store, by whoever comes first: a finished one is read, an unfinished one goes on, none runs twice."""

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from loralab.disk import read_header
from loralab.errors import UserError
from loralab.run import Outcome, Settings, train_together
from loralab.run.bar import Reporter
from loralab.run.folder import changed, write_json
from loralab.study.record import FAILED


def run(settings: Settings, reporter: Reporter | None = None, adapters: bool = True) -> Outcome:
    """The run of `settings.folder`, from where it is."""
    return run_together([settings], reporter, adapters)[0]


def run_together(many: Sequence[Settings], reporter: Reporter | None = None, adapters: bool = True) -> list[Outcome]:
    """The runs of folders of one store, in one pass over one model, each from where it is."""
    with ExitStack() as locks:
        for folder in sorted(s.folder for s in many):  # in one order, so that two processes never wait for each other
            locks.enter_context(_alone(folder))
        found: dict[Path, Outcome] = {s.folder: done for s in many if (done := _finished(s.folder))}
        left = [s for s in many if s.folder not in found]
        if left:
            found |= zip((s.folder for s in left), _trained(left, reporter), strict=True)
        if not adapters:
            for s in left:
                shutil.rmtree(s.folder / "adapter", ignore_errors=True)
        return [found[s.folder] for s in many]


def _finished(folder: Path) -> Outcome | None:
    return read_header(folder / "result.json") if (folder / "result.json").is_file() else None


def _trained(many: Sequence[Settings], reporter: Reporter | None) -> list[Outcome]:
    try:
        ready = [replace(s, resume=_can_go_on(s.folder, s)) for s in many]
        outcomes = train_together(ready, reporter)
    except UserError as error:
        if len(many) > 1:  # one of them, or that they are together: who it is shows alone
            return [outcome for s in many for outcome in _trained([s], reporter)]
        outcomes = [error]
    for s, outcome in zip(many, outcomes, strict=True):
        if not isinstance(outcome, UserError):
            (s.folder / FAILED).unlink(missing_ok=True)
        elif (s.folder / "run.json").is_file():  # it began, so it will end like this each time
            write_json(s.folder / FAILED, {"error": str(outcome)})
    return outcomes


def _can_go_on(folder: Path, settings: Settings) -> bool:
    """Takes away what an unfinished run left whose settings read otherwise, as when the data moved."""
    if not (folder / "run.json").is_file():
        return False
    if not changed(read_header(folder / "run.json").get("settings", {}), settings.to_json()):
        return True
    shutil.rmtree(folder)
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another process that has this run; the system frees the lock of one that dies."""
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / folder.name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
