"""Read and write JSON and safetensors files and folders: written whole or not at all, read strictly and within limits.

Reading takes regular files only, and checks every size that a file claims before memory is taken for it.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralab.errors import UserError
from loralab.schema import listed

MAX_JSON = 32 * 2**20  # bytes of a JSON file, or of the JSON header in a safetensors file
MAX_DEPTH = 64  # levels of nesting in JSON
METADATA = "__metadata__"  # the one key of a safetensors header that names no tensor: text -> text
ITEM_BYTES = {  # dtype as safetensors spells it -> bytes of one value
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


# ---- writing ---------------------------------------------------------------------------------------------------------


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


@contextmanager
def replacing_both(first: Path, last: Path) -> Iterator[tuple[Path, Path]]:
    """Give two paths to write, the `last` one last, then put both in their places: a pair is the old or the new one.

    A process that is killed on the way leaves one of the two whole; `newest` tells readers where it is, and the next
    write clears up. Raises OSError.
    """
    _settle(first, last)
    written = _beside(first), _beside(last)
    try:
        yield written
    except BaseException:
        for path in reversed(written):
            path.unlink(missing_ok=True)
        raise
    _settle(first, last)


def newest(first: Path, last: Path) -> tuple[Path, Path]:
    """Where the files of a pair are: in their places, or beside them if a writer was killed when both were whole."""
    if not _beside(last).exists():
        return first, last
    return (_beside(first) if _beside(first).exists() else first), _beside(last)


def _settle(first: Path, last: Path) -> None:
    """Put a pair that is whole in its place, or remove what there is of one that is not."""
    if not _beside(last).exists():
        _beside(first).unlink(missing_ok=True)
        return
    for path in (first, last):  # once the last has gone, the first is in its place on the disk
        if _beside(path).exists():
            os.replace(_beside(path), path)
            _sync(path.parent)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".new")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, then rename it to `path`, which must not exist: it appears whole or not at all.

    What a killed process left half-filled is removed first. Raises OSError.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for place in (*partial.rglob("*"), partial):
            _sync(place)
        replace_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target`, which must be missing or empty. Raises OSError."""
    os.replace(source, target)
    _sync(target.parent)


def check_output_folder(path: Path, belongs: Callable[[Path], bool] = lambda path: False) -> None:
    """Raise UserError unless files can be written to a folder that is new, empty, or `belongs` to who asks."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file, expected a folder")
    if path.exists() and any(path.iterdir()) and not belongs(path):
        raise UserError(f"--out {path} holds other files: choose an empty or a new folder")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {path}: no permission to write in {there}; choose another folder")


def _sync(path: Path) -> None:
    if os.name != "posix":  # a folder cannot be opened elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError."""
    copies = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(copies, temporary, None if metadata is None else dict(metadata))
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_header(path: Path, others: Sequence[str] = ()) -> dict[str, Any]:
    """Read the JSON header of an adapter or run folder. Raises UserError as `read_json` does, and if it is missing.

    Then it names the folders inside that have such a header, or one of the `others`.
    """
    if not path.exists():
        folder = path.parent
        found = [place.parent.name for name in (path.name, *others) for place in folder.glob(f"*/{name}")]
        if inside := sorted(set(found)):
            raise UserError(
                f"{folder} is no adapter folder, and holds {listed(inside, 4)}: name one, {folder / inside[0]}"
            )
        raise UserError(f"{folder} is no adapter folder: it has no {path.name}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises UserError for a file that is missing, unreadable, no regular file, larger than MAX_JSON, nested deeper than
    MAX_DEPTH, or that gives a key twice.
    """
    with _opened(path) as stream:
        text = stream.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise UserError(f"{path} cannot be read: it is larger than {MAX_JSON:,} bytes, the most that is read here")
    return _parse(text, str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError as `tensor_headers` does."""
    tensor_headers(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


class TensorHeader(NamedTuple):
    """What a safetensors file says of one tensor."""

    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]


def tensor_headers(path: Path) -> dict[str, TensorHeader]:
    """Read the header of a safetensors file without its tensors.

    Raises UserError if the file is missing, no regular file or damaged: the tensors that the header lists must fill the
    rest of the file, without gap or overlap.
    """
    header, size = _header(path)
    header.pop(METADATA, None)
    headers, spans = {}, []
    for key, entry in header.items():
        if wrong := _entry_problem(entry):
            raise UserError(f"{path} cannot be read: tensor {key!r} {wrong}")
        headers[key] = TensorHeader(entry["dtype"], tuple(entry["shape"]))
        spans.append(entry["data_offsets"])
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise UserError(f"{path} cannot be read: its tensors overlap or leave a gap at byte {end}")
        end = stop
    if end != size:
        raise UserError(f"{path} cannot be read: its tensors take {end:,} bytes, the file has {size:,} for them")
    return headers


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts that a safetensors file holds beside its tensors. Raises UserError for a damaged file."""
    metadata = _header(path)[0].get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} cannot be read: its metadata are not texts")
    return metadata


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(JSON header of a safetensors file, bytes of the file after it)."""
    with _opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON):
            raise UserError(f"{path} cannot be read: it is no safetensors file, or cut off")
        return _parse(stream.read(length), f"the header of {path}"), size - 8 - length


def _entry_problem(entry: Any) -> str | None:
    """What is wrong with the header of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"has dtype {str(dtype)[:20]!r}: expected one of {', '.join(ITEM_BYTES)}"
    numbers = isinstance(shape, list) and isinstance(span, list) and len(span) == 2
    if not numbers or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *span)):
        return "has a shape or data_offsets that are not whole numbers"
    if span[1] - span[0] != prod(shape) * ITEM_BYTES[dtype]:
        return f"of shape {tuple(shape[:8])} does not take the {span[1] - span[0]:,} bytes given to it"
    return None


def sha256(path: Path) -> str:
    """Hex digest of a file. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; UserError for anything else, such as a pipe, which would never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} cannot be read: it is no regular file")
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(text: bytes, source: str) -> dict[str, Any]:
    """A JSON object, strictly; `source` is for errors."""
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
        _check_depth(data)
        if b"\\ud" in text.lower():  # half of a surrogate pair is no character: it could not even be printed
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise UserError(f"{source} cannot be read: it is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # of JSON or of Unicode
        raise UserError(f"{source} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(data).__name__}")
    return data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:80]!r} is given twice")
    return data


def _check_depth(data: Any) -> None:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RecursionError


# ---- sizes -----------------------------------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """A number of bytes for people, in powers of 1000 and three digits: 1234567 -> 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # above, three digits round to 1000
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
