"""A base and the adapter of a folder on it, for the commands that need both."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab import adapters
from loralab.adapters import Adapters
from loralab.cli.show import note
from loralab.data import tables
from loralab.errors import UserError
from loralab.files import AdapterFile, FolderNote
from loralab.serve.loading import on_base


def read(folder: Path, name: str | None = None) -> AdapterFile:
    """Read an adapter folder and print its notes; `name` replaces the adapter's own. Raises UserError."""
    warnings.simplefilter("ignore", FolderNote)  # its notes are printed here
    file = adapters.read(folder)
    for text in file.notes:
        note(f"{folder}: {text}")
    return replace(file, name=name or file.name, notes=())


def load(
    model: str, folder: Path, name: str | None = None, whole: bool = False, device: str = "cpu"
) -> tuple[Adapters, Any]:
    """(adapters, tokenizer): the adapter of a folder on its base, as the model class that it was made on.

    Raises UserError for what does not fit, and with `whole` where a part of the head would be random.
    """
    file = read(folder, name)
    return on_base(model, file, folder, name, whole, note, device)


def check_counts(**counts: int | None) -> None:
    """Raise UserError for a flag, named by its parameter, that is given and below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")


def check_idle(given: Mapping[str, bool], where: str) -> None:
    """Raise UserError for the flags, by parameter, that are given and do nothing; `where` says why: "with --x"."""
    idle = [f"--{name.replace('_', '-')}" for name, there in given.items() if there]
    if idle:
        raise UserError(f"{', '.join(idle)} would do nothing {where}: leave {'it' if len(idle) == 1 else 'them'} out")


def check_out(path: Path | None, flag: str = "--out") -> None:
    """Raise UserError for a file of answers that exists, whose folder does not, or whose kind cannot be written."""
    if path is not None and path.exists():
        raise UserError(f"{flag} {path} exists: choose a new file")
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}: make it, or choose another")
    kinds = (*tables.WRITERS, ".parquet")
    if path is not None and path.suffix.lower() not in kinds:
        raise UserError(f"{flag} {path}: a name ending in {', '.join(kinds)} was expected")
