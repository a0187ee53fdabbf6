"""An adapter of a model as PEFT and its relatives read it: what can be written, and what each layer is called there."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import conversion_mapping

from loralab import kinds, peft_methods, peft_write
from loralab.adapted import AdaptedModel, AdapterSpec, base_tensor
from loralab.contents import labels_of
from loralab.errors import UserError
from loralab.heads import head_of
from loralab.kinds.stack import Stack
from loralab.peft_format import INSIDE
from loralab.schema import listed

HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose adapters PEFT expects to have a head of their own


class ExportNote(UserWarning):
    """An exported adapter that is another function elsewhere, unless its reader does something for it."""


def export(handle: AdaptedModel, name: str, folder: Path, base: dict[str, Any]) -> Path:
    """Write an adapter in PEFT's layout: as a LoRA or a DoRA if it is a low-rank product, else as PEFT's own method.

    `base` is what the folder says of it: name, class, task_type and sha256.
    Raises UserError, with nothing written, for an adapter that is neither, and as `peft_write` does.
    """
    spec = handle.specs[name]
    own = _check(handle, spec, name)
    labels = labels_of(spec, base["task_type"])
    if base["task_type"] in HEADED and not set(head_of(handle.model)) <= set(spec.heads):
        base["task_type"] = None  # else PEFT asks the folder for the head of the task
    head = {key: t for key, (role, t) in handle.tensors(name).items() if role == "head"}
    for note in _notes(handle, spec, name):
        warnings.warn(note, ExportNote, stacklevel=4)
    tokens = _tokens(handle, spec, name)
    biases = {key: handle.state(name)[key] for key in spec.base_names}
    around = peft_write.Around(base, head, spec.heads, labels, biases, tokens)
    layers = {path: handle.layers[path] for path in spec.paths if not _of_tokens(spec, path)}
    if own:
        roles = {path: layer.roles(name) for path, layer in layers.items()}
        written = peft_methods.OWN[own](spec.recipe.factors, roles)
        return peft_write.write_own(folder, written, list(layers), around)
    updates = {path: layer.lower(name) for path, layer in layers.items()}
    gains = {path: layer.roles(name)["m"] for path, layer in layers.items() if spec.recipe.gain}
    sides = {path: kinds.sides(layer.base) for path, layer in layers.items()}
    return peft_write.write_lora(folder, updates, gains, around, sides, _stacks(handle, spec))


def _check(handle: AdaptedModel, spec: AdapterSpec, name: str) -> str | None:
    """The kind of a method that PEFT has too and that is no low-rank product, else None.

    Raises UserError for what PEFT has no place for.
    """
    r = spec.recipe
    assert r.factors is not None  # `exports.export` has seen to it
    if r.gain and (stacks := [path for path in spec.paths if isinstance(handle.layers[path].base, Stack)]):
        raise UserError(
            f"adapter {name!r} has a gain (DoRA) on the experts {stacks[0]}, which PEFT has not; merge it instead"
        )
    if r.low_rank:
        return None
    kind = r.factors.kind
    if kind not in peft_methods.OWN or r.gain:
        raise UserError(f"adapter {name!r} is no low-rank product, so there is no LoRA to export; merge it instead")
    if spec.base_names:
        raise UserError(
            f"adapter {name!r} changes {spec.base_names[0]} too, and {kind} of PEFT changes no bias; merge it instead"
        )
    scaled = peft_methods.OWN_METHOD[kind].unbiased(r.factors, spec.paths)
    if biased := [path for path in scaled if handle.layers[path].bias is not None]:
        raise UserError(
            f"adapter {name!r} does not scale the bias of {biased[0]}, and PEFT's would ({len(biased)} of "
            f"{len(spec.paths)} layers have one); merge it instead"
        )
    return kind


def _notes(handle: AdaptedModel, spec: AdapterSpec, name: str) -> Iterator[str]:
    """What makes the folder another function for whoever reads it."""
    if kept := sorted({store for path in spec.paths if (store := handle.layers[path].store) is not None}):
        yield (
            f"adapter {name!r} was trained beside a base kept in {', '.join(kept)}: over a base that is not rounded "
            "so it is another function; load the base so there too, or merge it here"
        )
    if taken := _taken_for_experts(handle, spec.paths):
        yield (
            f"PEFT takes {listed(taken, 2)} ({len(taken)} layers) for experts, as they are named like those of older "
            "versions of this model, and leaves the adapter there out; merge it instead, or exclude these layers"
        )


def _taken_for_experts(handle: AdaptedModel, paths: Sequence[str]) -> list[str]:
    """The layers whose names PEFT changes, by what transformers says of the experts of older checkpoints."""
    kind = getattr(getattr(handle.model, "config", None), "model_type", None)
    if kind not in getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}):
        return []
    sources = [
        p for row in conversion_mapping.get_checkpoint_conversion_mapping(kind) or () for p in row.source_patterns
    ]
    old = {p.removesuffix(".weight").rpartition(".")[2] for p in sources if ".experts.*." in p}
    return [p for p in paths if p.rpartition(".")[2] in old and not isinstance(handle.layers[p].base, Stack)]


def _of_tokens(spec: AdapterSpec, path: str) -> bool:
    """Whether single tokens of a layer learn."""
    return spec.recipe.ranks is not None and spec.recipe.ranks.layers[path].tokens is not None


def _tokens(handle: AdaptedModel, spec: AdapterSpec, name: str) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Path -> (tokens, their vectors W[tokens] + D); a layer tied to the embedding has no vectors of its own."""
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    shares: set[str | None] = {None}
    for path in spec.paths:
        if spec.recipe.ranks is None or not (tokens := spec.recipe.ranks.layers[path].tokens):
            continue
        if (share := spec.recipe.ranks.layers[path].share) in shares - {None}:
            continue
        shares.add(share)
        W = base_tensor(handle.model, f"{path}.weight").detach()  # (V, width)
        D = handle.layers[path].roles(name)["D"]
        found[path] = (tokens, W[list(tokens)].to(D) + D)
    return found


def _stacks(handle: AdaptedModel, spec: AdapterSpec) -> dict[str, str]:
    """Path of each stack of experts -> the path of its adapter, as PEFT wraps a module once for each of its parameters.

    The wrapper of the last parameter is the outermost.
    """
    bases = {path: handle.layers[path].base for path in spec.paths}
    found = {}
    for path, base in bases.items():
        if not isinstance(base, Stack):
            continue
        holder, _, last = path.rpartition(".")
        names = [name for name, _ in base.holder[0].named_parameters(recurse=False) if f"{holder}.{name}" in bases]
        found[path] = holder + INSIDE * (len(names) - 1 - names.index(last))
    return found
