"""Start a run from a trained adapter: its tensors go into the fresh adapter of the run, its head where labels agree."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
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
from loralab.layer import Adapted
from loralab.methods.base import Roles
from loralab.recipe import Recipe
from loralab.schema import listed

FILES = ("adapter*.json", "adapter*.safetensors")  # of either layout


def checksum(folder: Path) -> str:
    """The sha256 of an adapter folder's files. Raises UserError for a folder without any."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    if not files:
        raise UserError(f"--from-adapter {folder} holds no adapter: expected the adapter/ of a finished run")
    return hashlib.sha256(" ".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()


def begin_from(handle: Adapters, name: str, folder: Path) -> str:
    """Put the tensors of an adapter folder into the adapter `name` of a model; return a note of what was done.

    The head stays as it was drawn where the labels are others. Raises UserError, with nothing changed, for an adapter
    of another method, base or set of layers, or of settings under which its tensors mean another update.
    """
    where, file, spec = f"--from-adapter {folder}", adapters.read(folder), handle.spec(name)
    problems = _other_method(file.recipe, spec.recipe)
    if file.base.get("sha256") not in (None, handle.base_sha256):
        problems.append(f"it was trained on another base ({file.base.get('name')})")
    own = {key: tensor for key, (_, tensor) in once(handle.tensors(name)).items()}
    same_head = list(file.heads) == list(spec.heads) and list(file.labels) == list(spec.labels)
    wanted = {key: tensor for key, tensor in own.items() if same_head or inside(key, spec.heads) is None}
    given = {key: tensor for key, tensor in file.tensors.items() if same_head or inside(key, file.heads) is None}
    problems = problems or _unlike(wanted, given) or _other_updates(handle, name, file)
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
    """What makes an adapter of one recipe none of the other, whatever its tensors."""
    pairs = {
        "method": (getattr(theirs.factors, "kind", None), getattr(ours.factors, "kind", None)),
        "gain": (theirs.gain, ours.gain),
    }
    return [f"its {what} is {a}, that of the run {b}" for what, (a, b) in pairs.items() if a != b]


def _other_updates(handle: Adapters, name: str, file: AdapterFile) -> list[str]:
    """The settings of the first layer in which the same tensors are another update in the run than in the file.

    Settings that differ are tried, since many have no part in the update: alpha and rank have one by their ratio only,
    the phases of a training none.
    """
    spec = handle.spec(name)
    theirs, tried = replace(spec, recipe=file.recipe), set()
    for path in spec.paths:
        layer, pair = handle.layers[path], (file.recipe.at(path).factors, spec.recipe.at(path).factors)
        sizes = layer.out_features, layer.in_features
        if pair[0] == pair[1] or (*pair, *sizes) in tried:
            continue
        tried.add((*pair, *sizes))
        one, other = (_moved(layer, name, f, handle.constants(of)) for f, of in zip(pair, (theirs, spec), strict=True))
        if not torch.allclose(one, other):
            a, b = (vars(f) for f in pair)
            differ = [f"its {key} is {a.get(key)}, that of the run {b.get(key)}" for key in a if a[key] != b.get(key)]
            return [f"{', '.join(differ)} ({path})"]
    return []


def _moved(layer: Adapted, name: str, factors: Any, constants: Roles) -> Tensor:
    """What the update of a layer makes of random x (in, 1), under these settings of the method, from random tensors."""
    generator, sizes = torch.Generator().manual_seed(0), (layer.out_features, layer.in_features)
    own, fixed = layer.roles(name), factors.local(constants, *sizes)
    p = {role: _drawn(t.shape, generator) if t.is_floating_point() else t.cpu() for role, t in own.items()}
    p |= {role: t.double() if t.is_floating_point() else t for role, t in fixed.items()}
    x = _drawn((layer.in_features, 1), generator)
    if factors.low_rank:
        A, B = factors.lower(p)
        return B @ (A @ x)  # type: ignore[no-any-return]
    W = {"W": layer.base.dense().detach().cpu().double()} if factors.sees_weight else {}
    return factors.dense({**p, **W}, *sizes) @ x  # type: ignore[no-any-return]


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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
