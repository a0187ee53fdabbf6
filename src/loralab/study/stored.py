"""Run what a store lacks, whoever comes first: a finished run is read, an unfinished one goes on, none runs twice.

A run that fails ends alone: failed.json in its folder says why, with the traceback where the failure is no user's
error, and the others go on.
"""

import errno
import shutil
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from loralab.disk import write_json
from loralab.errors import UserError
from loralab.run import Outcome, RunFailed, RunInterrupted, Settings, train_together
from loralab.run.bar import Reporter
from loralab.run.folder import FAILED, changed
from loralab.run.records import read_facts, read_result
from loralab.study.search import Pruned

LOCKS = ".locks"  # in a store: a file for each run that was ever begun
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no fault of a run: the next one would fail too


def run_stored(settings: Settings, reporter: Reporter | None = None, adapters: bool = True) -> Outcome:
    """The run of `settings.folder`, from where it is."""
    return run_stored_together([settings], reporter, adapters)[0]


def run_stored_together(
    many: Sequence[Settings], reporter: Reporter | None = None, adapters: bool = True
) -> list[Outcome]:
    """The runs of folders of one store, in one pass over one model, each from where it is.

    Another process that has one of them is waited for. Raises RunInterrupted or OSError where nothing can be written,
    and Pruned if the reporter does.
    """
    with ExitStack() as locks:
        for folder in sorted(s.folder for s in many):  # in one order, so that two processes never wait for each other
            locks.enter_context(_lock(folder))
        outcomes: dict[Path, Outcome] = {s.folder: result for s in many if (result := _finished(s.folder))}
        left = [s for s in many if s.folder not in outcomes]
        if left:
            outcomes |= zip((s.folder for s in left), _train(left, reporter), strict=True)
        if not adapters:
            for s in left:
                shutil.rmtree(s.folder / "adapter", ignore_errors=True)
        return [outcomes[s.folder] for s in many]


def _lock(folder: Path) -> FileLock:
    """The lock of a run; the system frees that of a process that dies."""
    (folder.parent / LOCKS).mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / LOCKS / folder.name)


def _finished(folder: Path) -> Outcome | None:
    return read_result(folder) if (folder / "result.json").is_file() else None


def _train(many: Sequence[Settings], reporter: Reporter | None) -> list[Outcome]:
    details = None
    try:
        ready = [replace(s, resume=_can_go_on(s)) for s in many]
        outcomes = train_together(ready, reporter)
    except (Pruned, RunInterrupted):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        outcomes = [UserError(_message(error))]
        details = None if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    if len(outcomes) < len(many):  # one of them fails, or that they are together does: which one shows alone
        return [outcome for s in many for outcome in _train([s], reporter)]
    for s, outcome in zip(many, outcomes, strict=True):
        if isinstance(outcome, dict):
            (s.folder / FAILED).unlink(missing_ok=True)
        elif not isinstance(outcome, RunInterrupted):
            _record_failure(s, str(outcome), outcome.traceback if isinstance(outcome, RunFailed) else details)
    for outcome in outcomes:
        if isinstance(outcome, RunInterrupted):
            raise outcome
    return outcomes


def _message(error: Exception) -> str:
    """In one line; an exception that is no user's error with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _record_failure(settings: Settings, why: str, details: str | None) -> None:
    """Write failed.json for a run that began, or that a bug ended: it will end like this each time."""
    began = (settings.folder / "run.json").is_file()
    if began or details is not None:
        settings.folder.mkdir(parents=True, exist_ok=True)
        write_json(settings.folder / FAILED, {"error": why, **({} if details is None else {"traceback": details})})


def _can_go_on(settings: Settings) -> bool:
    """Whether an unfinished run is there to go on with.

    Removes what is not: what a start that was killed left, and a run whose settings read otherwise, as when the data
    moved.
    """
    folder = settings.folder
    if (folder / "run.json").is_file():
        with suppress(UserError):  # a damaged run.json
            if not changed(read_facts(folder), settings.to_json()):
                return True
    shutil.rmtree(folder, ignore_errors=True)
    return False
