"""A run folder: run.json first, metrics.jsonl and checkpoint/ while the run goes, predictions and, last, result.json.

A folder with result.json holds everything else whole. One process at a time writes to a folder (`FolderLock`). A
process that is killed at any point leaves a folder that the same command with --resume goes on with.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from loralab.disk import (
    check_output_folder,
    read_json,
    read_tensors,
    replace_folder,
    sha256,
    write_json,
    write_tensors,
    write_text,
)
from loralab.errors import UserError
from loralab.fast.machine import precision
from loralab.recipe import OLD_FIELDS
from loralab.run.records import read_facts, read_result
from loralab.run.settings import NOT_RESULT, Settings

LOCK, TRACEBACK, FAILED = ".lock", "traceback.txt", "failed.json"
SKIPPED, WRONG = "skipped.csv", "wrong.csv"
FILES = (SKIPPED, WRONG, "run.json", "metrics.jsonl", "predictions.safetensors", "result.json")
FOLDERS = ("adapter", "checkpoint", "checkpoint.new", "checkpoint.old")
STATE, PROGRESS = "state.safetensors", "progress.json"  # of a checkpoint; progress.json is written last

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]  # progress, tensors


class RunInterrupted(UserError):
    """A run could not go on for a reason outside it (another writer, a full disk); it can be resumed later."""


class FolderLock:
    """The one writer of a run folder. The system frees the lock of a process that ends, however it ends.

    The lock file names its owner, for the message to a second process.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.lock = FileLock(self.path, is_singleton=False)
        self.file: tuple[int, int] | None = None  # device and inode, which nothing else can have while we hold it

    def acquire(self) -> None:
        """Take the lock. Raises RunInterrupted if another process has it, OSError if the file cannot be written."""
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise RunInterrupted(f"{self.path.parent} is being written by {self._other()}") from None
        try:
            self.file = self._file()
            since = datetime.now(UTC).isoformat(timespec="seconds")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            self.path.write_text(json.dumps(owner))
        except OSError:
            self.release()
            raise

    def held(self) -> bool:
        """Whether the folder still has our lock file: it may have been removed, and made anew by another process."""
        try:
            return self._file() == self.file
        except OSError:
            return False

    def _file(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_dev, found.st_ino

    def release(self) -> None:
        """Remove the lock file and give the lock back."""
        if self.held():
            with suppress(OSError):
                self.path.unlink()
        self.lock.release()

    def _other(self) -> str:
        try:
            owner = json.loads(self.path.read_text())
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}; wait for it, or stop it"
        except (OSError, ValueError, KeyError, TypeError):  # it has only just taken the lock
            return "another process"


class RunFolder:
    """The files of one run. `open` before the first write, `close` after the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock: FolderLock | None = None
        self.made: list[Path] = []  # folders that `open` made, the run's own first

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def started(self) -> bool:
        """Whether a run began here, finished or not."""
        return (self.path / "run.json").is_file()

    # ---- who may write -------------------------------------------------------------------------------------------

    def open(self, settings: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
        """Lock the folder for a run; return the result if the run is finished and `resume` asks for it.

        Raises UserError if the folder holds something else or a run of other settings, RunInterrupted if another
        process writes to it.
        """
        self._check(settings, resume)  # before anything is written
        self.made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        lock = FolderLock(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            self._remove_made()
            raise UserError(f"--out {self.path} cannot be written ({_reason(error)}): choose another folder") from error
        self.lock = lock
        try:
            self._check(settings, resume)  # another process may have been here meanwhile
            return self.finished()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock back; a folder that is new and empty goes too."""
        if self.lock is not None:
            ours = self.lock.held()
            self.lock.release()
            self.lock = None
            if ours:
                self._remove_made()

    def _remove_made(self) -> None:
        """Remove the folders that were made for this run and are empty."""
        with suppress(OSError):  # it holds a run
            for path in self.made:
                path.rmdir()

    def _check(self, settings: Mapping[str, Any], resume: bool) -> None:
        check_output_folder(self.path, belongs=lambda path: self.started or only_leftovers(path))
        if not self.started:
            return
        if not resume:
            raise UserError(f"--out {self.path} holds another run: choose a new folder, or go on with --resume")
        facts = read_facts(self.path)
        if keys := changed(facts, settings):
            before = facts.get("settings", {})
            changes = ", ".join(f"{key} was {before.get(key)}, now {settings[key]}" for key in keys)
            raise UserError(f"--resume {self.path}: {changes}; a run goes on only with its own settings")

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError if data, base or recipe are not those that the run began with; `facts` as in run.json."""
        before = read_facts(self.path)
        now = json.loads(json.dumps(dict(facts)))
        rows, rows_now = before.get("data", {}).get("sha256"), now["data"]["sha256"]
        base, base_now = before.get("base_sha256"), now["base_sha256"]
        different = []
        if rows != rows_now:
            different.append(f"its data have changed (sha256 was {str(rows)[:12]}, now {rows_now[:12]})")
        if base != base_now:
            different.append(f"it began with another base (sha256 was {str(base)[:12]}, now {base_now[:12]})")
        if before.get("recipe") != now["recipe"]:
            different.append("its recipe is another now (a rank map, or a setting of the method)")
        if (narrow := before.get("precision", now["precision"])) != now["precision"]:
            different.append(f"its products were in {narrow}, on this machine in {now['precision']} (dtype={narrow})")
        if different:
            raise UserError(f"--resume {self.path}: {'; '.join(different)}; a run goes on only with what it began with")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Report a write that fails in the block as RunInterrupted, one line with folder and reason."""
        try:
            if self.lock is not None and not self.lock.held():
                raise FileNotFoundError("the folder was removed, or another process took it")
            yield
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise RunInterrupted(
                f"cannot write to the run folder {self.path} ({_reason(cause)}); when that is mended, --resume goes on"
            ) from cause

    # ---- files ---------------------------------------------------------------------------------------------------

    def begin(self, facts: Mapping[str, Any], skipped: str = "") -> None:
        """Write run.json and an empty metrics.jsonl; what a killed start left is removed. Raises RunInterrupted.

        `skipped` is the table of rows that the run leaves out, a CSV; a run that leaves none out has no such file.
        """
        with self.writing():
            if not only_leftovers(self.path):
                raise FileExistsError("other files were put there")
            for path in self.path.iterdir():
                if path.is_dir():
                    path.rmdir()
                elif path.name != LOCK:
                    path.unlink()
            if skipped:
                write_text(self.path / SKIPPED, skipped)
            write_json(self.path / "run.json", facts)
            write_text(self.path / "metrics.jsonl", "")

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write a line an epoch. Raises RunInterrupted."""
        with self.writing():
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def write_traceback(self, text: str) -> Path | None:
        """Keep the traceback of a run that failed; None if it cannot be written."""
        try:
            with self.writing():
                write_text(self.path / TRACEBACK, text)
        except RunInterrupted:
            return None
        return self.path / TRACEBACK

    def finish(self, result: Mapping[str, Any], predictions: Mapping[str, Tensor], wrong: str = "") -> None:
        """Write predictions and result.json, then remove the checkpoints. Raises RunInterrupted.

        `predictions` are those of the selected epoch: SPLIT/logits (rows, outputs) float32 and SPLIT/labels (rows,).
        `wrong` is the table of the rows that are most wrong, a CSV.
        """
        with self.writing():
            if wrong:
                write_text(self.path / WRONG, wrong)
            write_tensors(self.path / "predictions.safetensors", predictions)
            write_json(self.result, result)
        self.clear()

    def finished(self) -> dict[str, Any] | None:
        """Return the result of a finished run, or None; checkpoints that a killed process left beside it go."""
        self.clear()
        return read_result(self.path) if self.result.is_file() else None

    def clear(self) -> None:
        """Remove what a finished run does not keep, as a process that was killed at its end left it."""
        if not self.result.is_file():
            return
        for folder in self._checkpoints():
            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.path / TRACEBACK, *self.path.glob("*.tmp")):
            with suppress(OSError):
                path.unlink()

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _checkpoints(self) -> tuple[Path, Path, Path]:
        """(being written, current, set aside), the newest first."""
        return self.path / "checkpoint.new", self.checkpoint, self.path / "checkpoint.old"

    def write_checkpoint(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint with checksums. The one before stays until the new one is whole. Raises RunInterrupted."""
        new = self._checkpoints()[0]
        with self.writing():
            if isinstance(_read(new), tuple):  # a process was killed before it took its place
                self._put_in_place()
            _remove(new)
            new.mkdir()
            try:
                write_tensors(new / STATE, tensors)
                content = {**progress, "state_sha256": sha256(new / STATE)}
                write_json(new / PROGRESS, {**content, "sha256": _checksum(content)})
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            self._put_in_place()

    def _put_in_place(self) -> None:
        """Make the new checkpoint the current one, whose place at no time is the only one that is left empty."""
        new, current, old = self._checkpoints()
        if current.exists():
            _remove(old)
            replace_folder(current, old)
        replace_folder(new, current)
        _remove(old)

    def read_checkpoint(self, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, or None; `say` is told of each that is damaged."""
        for folder in self._checkpoints():
            found = _read(folder)
            if isinstance(found, tuple):
                return found
            if found is not None:
                say(f"{folder} is damaged and skipped: {found}")
        return None


def _read(folder: Path) -> Checkpoint | str | None:
    """Read a checkpoint: progress and tensors, or what is wrong with it, or None if its writing never ended."""
    if not (folder / PROGRESS).exists():
        return f"it has no {PROGRESS}" if folder.name == "checkpoint" and folder.exists() else None
    try:
        progress = read_json(folder / PROGRESS)
        if progress.pop("sha256", None) != _checksum(progress):
            return f"{PROGRESS} is not what was written"
        if progress.pop("state_sha256", None) != sha256(folder / STATE):
            return f"{STATE} is not what was written"
        return progress, read_tensors(folder / STATE)
    except (OSError, UserError) as error:
        return str(error)


def _checksum(progress: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, progress.json first: without it nobody takes the rest for one. Raises OSError."""
    if checkpoint.exists():
        (checkpoint / PROGRESS).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def only_leftovers(path: Path) -> bool:
    """Whether a folder without run.json holds no more than a start that was killed or failed leaves behind."""
    temporary = {f"{name}.tmp" for name in (*FILES, TRACEBACK, FAILED)}
    return all(
        entry.name in FOLDERS and not any(entry.iterdir())
        if entry.is_dir()
        else entry.name in {LOCK, TRACEBACK, FAILED, *temporary}
        for entry in path.iterdir()
    )


def changed(facts: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """List the settings that decide a result and differ from those of a run.json, whose content is `facts`.

    A setting that is younger than the run has its default there, and an old name counts as today's. A dtype of
    products that one of them names and the other leaves to the machine is what it was, or is, on the machine.
    """
    before = facts.get("settings", {})
    now = json.loads(json.dumps(dict(settings)))
    defaults = {f.name: f.default for f in dataclasses.fields(Settings) if f.default is not dataclasses.MISSING}
    then = json.loads(json.dumps(defaults, default=str)) | {OLD_FIELDS.get(key, key): x for key, x in before.items()}
    if then["dtype"] != now.get("dtype", then["dtype"]):
        narrow = precision(now["dtype"], None if now.get("device") != "cpu" else False)
        then["dtype"], now["dtype"] = facts.get("precision", then["dtype"]), str(narrow).removeprefix("torch.")
    return [key for key in now if key not in NOT_RESULT and then.get(key) != now[key]]


def _reason(error: OSError) -> str:
    return " ".join((error.strerror or str(error) or type(error).__name__).split())
