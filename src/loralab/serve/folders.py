"""The adapter folders that rows may name, known from their headers alone; tensors are read when a row needs them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab import files
from loralab import peft_format as peft_layout
from loralab.data import glue
from loralab.disk import read_header
from loralab.errors import UserError


@dataclass(frozen=True)
class Known:
    """One folder that can be asked for."""

    folder: Path
    name: str
    text: tuple[str, ...]  # columns it was trained on; empty where the folder does not tell
    base: str | None  # the base's name, as a run was given it or as the folder tells it
    sha256: str | None  # of that base


def known(given: Sequence[str]) -> dict[str, Known]:
    """What a row may say -> folder. An entry is a folder, or NAME=FOLDER; every problem is told at once.

    A folder answers to its own name if no other has it, and always to its path as given.
    """
    found: list[tuple[str, Known]] = []
    problems = []
    for entry in given:
        name, named, path = entry.rpartition("=")
        try:
            found.append((path if not named else name, _known(Path(path), name)))
        except UserError as error:
            problems.append(str(error))
    if twice := [name for name, times in Counter(key for key, _ in found).items() if times > 1]:
        problems.append(f"{', '.join(twice)} given twice")
    if problems:
        raise UserError("; ".join(problems))
    times = Counter(adapter.name for _, adapter in found)
    return {a.name: a for _, a in found if times[a.name] == 1} | dict(found)


def _known(folder: Path, name: str) -> Known:
    if (folder / peft_layout.HEADER).is_file():
        config = read_header(folder / peft_layout.HEADER)
        return Known(folder, name or folder.resolve().name, (), config.get("base_model_name_or_path"), None)
    header = read_header(folder / files.HEADER)
    base = header.get("base")
    if not isinstance(base, dict):
        raise UserError(f"{folder / files.HEADER}: not an adapter header, it names no base")
    own, settings = str(header.get("name")), _settings(folder)
    return Known(
        folder, name or own, _text(own, settings), settings.get("model") or base.get("name"), base.get("sha256")
    )


def _settings(folder: Path) -> Mapping[str, Any]:
    """Of the run that wrote the adapter, where its folder still lies in the run's."""
    try:
        settings = json.loads((folder.resolve().parent / "run.json").read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _text(name: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    if settings.get("text"):
        return tuple(settings["text"])
    task = glue.canonical(str(settings.get("task", name)))
    return glue.TABLE[task].columns if task else ()
