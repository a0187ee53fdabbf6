"""Adapter folders: adapter.safetensors and adapter.json, which together carry all that an adapter needs.

Loading is strict: every problem of a file is named in one error, and a base it was not trained on is refused.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralab import starts
from loralab.attach import HANDLE, Adapters, of
from loralab.entry import constants_of, once
from loralab.errors import UserError
from loralab.fingerprint import fingerprint
from loralab.recipe import Recipe, from_json, to_json
from loralab.targets import cover

FORMAT, VERSION = "loralab adapter", 1
TENSORS, HEADER = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a folder, before it meets a model."""

    name: str
    recipe: Recipe
    paths: list[str]  # layers adapted
    heads: list[str]
    labels: list[str]
    base: dict[str, Any]  # name, model_type, sha256 (None: the folder does not say)
    tensors: dict[str, Tensor]  # path.role -> tensor
    constants: str | None = None  # sha256 of what the method's seed draws
    begins: bool = False  # the file lacks what its start adds (A0, B0): it is made again, from the base


def save(handle: Adapters, folder: Path | str, name: str | None = None, called: str | None = None) -> Path:
    """Writes an adapter with its head, recipe, scaling, labels, coverage and the base's hash; returns the folder.

    `called` is the name that the file gives it, by default the one it has here.
    """
    name = handle.only(name)
    entry, held = handle.entries[name], once(handle.tensors(name))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": called or name,
        "recipe": to_json(entry.recipe),
        "scaling": _scaling(entry.recipe),
        "coverage": {} if entry.coverage is None else entry.coverage.matched,
        "head": list(entry.heads),
        "labels": list(entry.labels),
        "roles": {key: role for key, (role, _) in held.items()},
        "counts": handle.counts(name),
        "constants": _constants(handle, name),
        "base": {**_base_name(handle.model), "sha256": handle.base_sha256},
    }
    folder = Path(folder)
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, (_, t) in held.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / (TENSORS + ".tmp"))
        (folder / (HEADER + ".tmp")).write_text(json.dumps(header, indent=1) + "\n")
        for file in (TENSORS, HEADER):  # the header last: a folder without it is no adapter
            os.replace(folder / (file + ".tmp"), folder / file)
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    return folder


def read(folder: Path | str) -> AdapterFile:
    """Reads an adapter folder, in loralab's layout or PEFT's. Raises UserError for anything else."""
    from loralab import peft_layout

    folder = Path(folder)
    if (folder / peft_layout.HEADER).is_file():
        return peft_layout.read(folder)
    header = read_header(folder / HEADER)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        got = f"format {header.get('format')!r}, version {header.get('version')!r}"
        raise UserError(f"{folder / HEADER}: {got}; this loralab reads {FORMAT!r}, version {VERSION}")
    try:
        paths = dict.fromkeys(path for paths in header["coverage"].values() for path in paths)
        return AdapterFile(
            header["name"], from_json(header["recipe"]), list(paths), header["head"], header["labels"], header["base"],
            read_tensors(folder / TENSORS), header.get("constants"),
        )  # fmt: skip
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / HEADER}: not an adapter header ({type(error).__name__}: {error})") from error


def load(model: nn.Module, folder: Path | str, name: str | None = None, check_base: bool = True) -> Adapters:
    """Puts the adapter of `folder` on `model`, beside those already there, and leaves it live.

    Raises UserError, with the model as it was, for a file with missing, extra or misshapen tensors, for layers the
    model does not have, and for a base other than the one it was trained on (unless `check_base=False`).
    """
    return put(model, read(folder), folder, name, check_base)


def put(model: nn.Module, file: AdapterFile, folder: Path | str, name: str | None, check_base: bool = True) -> Adapters:
    """`load` of what is read already; `folder` is for its errors."""
    name = name or file.name
    known = getattr(model, HANDLE, None)
    handle = Adapters(model) if known is None else of(model)
    problems = _strange_layers(handle, file)
    if check_base and file.base.get("sha256") not in (None, handle.base_sha256):
        problems.append(
            f"it was trained on another base ({file.base.get('name')}, sha256 {str(file.base['sha256'])[:12]}, "
            f"here {handle.base_sha256[:12]}); load that base, or pass check_base=False if you know better"
        )
    if problems:
        raise UserError(f"{folder}: " + "; ".join(problems))
    handle.add(name, file.recipe, targets=file.paths, head=file.heads, labels=file.labels, filled=not file.begins)
    made = starts.added(file.recipe.start) if file.begins else ()
    held = {key: tensor for key, (role, tensor) in once(handle.tensors(name)).items() if role not in made}
    problems = _fill(held, file.tensors)
    if file.constants not in (None, _constants(handle, name)):
        problems.append(f"what its seed draws here is not what it was trained with (sha256 {file.constants[:12]})")
    if problems:
        if known is None:
            handle.unwrap()
        else:
            handle.remove(name)
        raise UserError(f"{folder}: " + "; ".join(problems))
    setattr(model, HANDLE, handle)
    handle.live.names, handle.live.ids = (name,), None
    return handle


def _constants(handle: Adapters, name: str) -> str | None:
    """sha256 of the frozen tensors that a method draws from a seed and no file holds; None where there are none."""
    drawn = constants_of(handle.model, handle.entries[name])
    return fingerprint(sorted(drawn.items()), exact=True) if drawn else None


def _scaling(recipe: Recipe) -> float | dict[str, float] | None:
    """What B is multiplied by: one number, or with a rank map one for each layer."""
    if recipe.ranks is None or not hasattr(recipe.factors, "scaling"):
        return getattr(recipe.factors, "scaling", None)
    return {path: recipe.at(path).factors.scaling for path in recipe.ranks.adapted}  # type: ignore[union-attr]


def _strange_layers(handle: Adapters, file: AdapterFile) -> list[str]:
    there = {path for path, _ in handle.model.named_modules()}
    missing = [path for path in [*file.paths, *file.heads] if path not in there]
    if missing:
        return [
            f"the model has no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''} ({len(missing)} missing)"
        ]
    if file.paths:
        cover(handle.model, file.paths)
    return []


def _fill(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Copies tensors into the live state if all fit; otherwise changes nothing and tells every problem."""
    problems = []
    if missing := [key for key in state if key not in tensors]:
        problems.append(f"missing tensors: {', '.join(missing)}")
    if extra := [key for key in tensors if key not in state]:
        problems.append(f"unexpected tensors: {', '.join(extra)}")
    for key in state.keys() & tensors.keys():
        if state[key].shape != tensors[key].shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)}, expected {tuple(state[key].shape)}")
        elif not tensors[key].isfinite().all():
            problems.append(f"{key} holds values that are not finite")
    if not problems:
        with torch.no_grad():
            for key, tensor in state.items():
                tensor.copy_(tensors[key])
    return problems


def read_header(path: Path) -> dict[str, Any]:
    """A JSON object, or UserError."""
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
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _base_name(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    return {"name": Path(name).name if Path(name).is_dir() else name, "model_type": getattr(config, "model_type", None)}
