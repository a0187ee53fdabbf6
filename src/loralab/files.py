"""Adapter folders: adapter.safetensors and adapter.json, which together carry all that an adapter needs.

This file turns such a folder into values and back; it knows no model. Whether they fit a model is checked in
adapters.py, PEFT's folders are read by peft_format.py.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.disk import read_header, read_tensors, write_json, write_tensors
from loralab.errors import UserError
from loralab.recipe import Recipe, from_json, to_json

FORMAT, VERSION = "loralab adapter", 1
TENSORS, HEADER = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as a folder holds it, apart from any model."""

    name: str
    recipe: Recipe
    coverage: Mapping[str, list[str]]  # target pattern -> paths of the layers adapted
    heads: list[str]
    labels: list[str]
    base: dict[str, Any]  # name, model_type, sha256 (None: the folder does not say)
    tensors: dict[str, Tensor]  # path.role -> tensor
    roles: Mapping[str, str] = field(default_factory=dict)  # path.role -> role
    counts: Mapping[str, int] = field(default_factory=dict)
    constants: str | None = None  # sha256 of what the method's seed draws
    starts_anew: bool = False  # the file lacks what its start adds (A0, B0): it is made again, from the base

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers."""
        return list(dict.fromkeys(path for paths in self.coverage.values() for path in paths))


def write(file: AdapterFile, folder: Path | str) -> Path:
    """Write an adapter with its head, recipe, scaling, labels, coverage and the base's hash; return the folder.

    Raises UserError if the folder cannot be written.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": file.name,
        "recipe": to_json(file.recipe),
        "scaling": _scaling(file.recipe),
        "coverage": dict(file.coverage),
        "head": list(file.heads),
        "labels": list(file.labels),
        "roles": dict(file.roles),
        "counts": dict(file.counts),
        "constants": file.constants,
        "base": file.base,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the header last: a folder without it is no adapter
        write_tensors(folder / TENSORS, file.tensors)
        write_json(folder / HEADER, header)
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    return folder


def read(folder: Path | str) -> AdapterFile:
    """Read an adapter folder in loralab's layout. Raises UserError for anything else."""
    folder = Path(folder)
    header = read_header(folder / HEADER)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        got = f"format {header.get('format')!r}, version {header.get('version')!r}"
        raise UserError(f"{folder / HEADER}: {got}; this loralab reads {FORMAT!r}, version {VERSION}")
    try:
        file = AdapterFile(
            header["name"], from_json(header["recipe"]), header["coverage"], header["head"], header["labels"],
            header["base"], read_tensors(folder / TENSORS), constants=header.get("constants"),
        )  # fmt: skip
        _ = file.paths
        return file
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / HEADER}: not an adapter header ({type(error).__name__}: {error})") from error


def _scaling(recipe: Recipe) -> float | dict[str, float] | None:
    """What B is multiplied by: one number, or with a rank map one for each layer."""
    if recipe.ranks is None or not hasattr(recipe.factors, "scaling"):
        return getattr(recipe.factors, "scaling", None)
    return {path: recipe.at(path).factors.scaling for path in recipe.ranks.adapted}  # type: ignore[union-attr]


# ---- hashes ----------------------------------------------------------------------------------------------------------


def fingerprint(tensors: Iterable[tuple[str, Tensor]], exact: bool = False) -> str:
    """sha256 over names, shapes and values rounded to bfloat16: one base loaded in float32 or bfloat16 is one base.

    `exact` takes the values as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        rounded = tensor.detach().to("cpu", tensor.dtype if exact else torch.bfloat16)
        bits = rounded.contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(bits.numpy().data)
    return digest.hexdigest()
