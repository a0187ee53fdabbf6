"""Start a run from a trained adapter: its tensors go into the fresh adapter of the run, its head where labels agree."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab import adapters
from loralab.adapted import once
from loralab.adapters import Adapters
from loralab.disk import sha256
from loralab.errors import UserError
from loralab.files import AdapterFile, inside
from loralab.recipe import Recipe
from loralab.schema import listed

FILES = ("adapter*.json", "adapter*.safetensors")  # of either layout
DRAWN = ("projection_seed", "source")  # settings that decide what no file holds


def checksum(folder: Path) -> str:
    """The sha256 of an adapter folder's files. Raises UserError for a folder without any."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    if not files:
        raise UserError(f"--from-adapter {folder} holds no adapter: expected the adapter/ of a finished run")
    return hashlib.sha256(" ".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()


def begin_from(handle: Adapters, name: str, folder: Path) -> str:
    """Put the tensors of an adapter folder into the adapter `name` of a model; return a note of what was done.

    The head stays as it was drawn where the labels are others. Raises UserError, with nothing changed, for an adapter
    of another method, rank, scaling, base or set of layers.
    """
    where, file, spec = f"--from-adapter {folder}", adapters.read(folder), handle.spec(name)
    problems = _other_method(file.recipe, spec.recipe)
    if file.base.get("sha256") not in (None, handle.base_sha256):
        problems.append(f"it was trained on another base ({file.base.get('name')})")
    own = {key: tensor for key, (_, tensor) in once(handle.tensors(name)).items()}
    same_head = list(file.heads) == list(spec.heads) and list(file.labels) == list(spec.labels)
    wanted = {key: tensor for key, tensor in own.items() if same_head or inside(key, spec.heads) is None}
    given = {key: tensor for key, tensor in file.tensors.items() if same_head or inside(key, file.heads) is None}
    problems = problems or _unlike(wanted, given)
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}: give the run the method and settings of that adapter")
    with torch.no_grad():
        for key, tensor in given.items():
            wanted[key].copy_(tensor)
    head = "" if same_head else f", with a new head: its labels are {_names(file)}"
    what = f"starts from the adapter {file.name} of {folder} (sha256 {checksum(folder)[:12]}){head}"
    return "; ".join([what, *file.notes])


def _names(file: AdapterFile) -> str:
    return listed(list(file.labels), 4) if file.labels else "not known"


def _other_method(theirs: Recipe, ours: Recipe) -> list[str]:
    """What makes the tensors of one recipe mean something else under the other."""
    pairs = {
        "method": (getattr(theirs.factors, "kind", None), getattr(ours.factors, "kind", None)),
        "scaling alpha / r": (getattr(theirs.factors, "scaling", None), getattr(ours.factors, "scaling", None)),
        "gain": (theirs.gain, ours.gain),
        **{key: (_setting(theirs, key), _setting(ours, key)) for key in DRAWN},
    }
    return [f"its {what} is {a}, that of the run {b}" for what, (a, b) in pairs.items() if a != b]


def _setting(recipe: Recipe, key: str) -> Any:
    known = {f.name for f in fields(recipe.factors)} if recipe.factors is not None else set()
    return getattr(recipe.factors, key) if key in known else None


def _unlike(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """Tensors that one side lacks, or that have another shape."""
    found = []
    if more := sorted(given.keys() - wanted.keys()):
        found.append(f"the run has no {listed(more, 3)} ({len(more)} tensors)")
    if less := sorted(wanted.keys() - given.keys()):
        found.append(f"it has no {listed(less, 3)} ({len(less)} tensors)")
    shared = sorted(wanted.keys() & given.keys())
    if other := [f"{key} {tuple(given[key].shape)}" for key in shared if given[key].shape != wanted[key].shape]:
        found.append(f"other shapes: {listed(other, 3)} ({len(other)} tensors)")
    return found
