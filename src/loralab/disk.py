"""Read and write JSON and safetensors files: written whole or not at all, read strictly."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralab.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write, then put it in the place of `path`: readers see the old file or the new one.

    The file reaches the disk before its name does, and the folder after it, so that a power cut leaves one of the two.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    if os.name != "posix":  # a folder cannot be opened elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError for a file that is missing, unreadable or something else."""
    try:
        header = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is no adapter folder: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(header).__name__}")
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError."""
    copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(copies, temporary)
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text)
