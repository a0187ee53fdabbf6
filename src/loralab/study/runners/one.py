"""One run of a store, by whoever comes first: a finished one is read, an unfinished one goes on, none runs twice."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab.errors import UserError
from loralab.files import read_header
from loralab.study.address import same
from loralab.study.record import FAILED
from loralab.train import Settings, train
from loralab.train.folder import write_json
from loralab.train.progress import Reporter

Outcome = dict[str, Any] | UserError  # the result of a run, or why there is none


def run(settings: Settings, reporter: Reporter | None = None, adapters: bool = True) -> Outcome:
    """The run of `settings.folder`, from where it is."""
    folder = settings.folder
    with _alone(folder):
        if (folder / "result.json").is_file():
            return read_header(folder / "result.json")
        try:
            result = train(replace(settings, resume=_can_go_on(folder, settings)), reporter)
        except UserError as error:
            if (folder / "run.json").is_file():  # it began, so it will end like this each time
                write_json(folder / FAILED, {"error": str(error)})
            return error
        (folder / FAILED).unlink(missing_ok=True)
        if not adapters:
            shutil.rmtree(folder / "adapter", ignore_errors=True)
        return result


def _can_go_on(folder: Path, settings: Settings) -> bool:
    """Takes away what an unfinished run left whose settings read otherwise, as when the data moved."""
    if not (folder / "run.json").is_file():
        return False
    if same(read_header(folder / "run.json").get("settings", {}), settings):
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
