"""An adapter in the layouts of other tools: what each can hold is checked here, and its file written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loralab import gguf_format, kinds, peft_export
from loralab.adapted import AdaptedModel
from loralab.contents import base_of
from loralab.errors import UserError
from loralab.kinds.stack import Stack
from loralab.schema import listed
from loralab.update import Update


def export(handle: AdaptedModel, name: str, folder: Path, layout: str, base_name: str | None) -> Path:
    """Write an adapter in a layout of LAYOUTS; return the folder. `base_name` is what the base is called there.

    Raises UserError for another layout, and for an adapter that the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    handle.check_undivided("export")
    r = handle.specs[name].recipe
    if handle.specs[name].coverage is None or r.factors is None:
        raise UserError(f"adapter {name!r} adapts no layer, so there is no LoRA to export; merge it instead")
    base = {**base_of(handle.model), "sha256": handle.base_sha256}
    base["name"] = base_name or base["name"]
    return LAYOUTS[layout](handle, name, folder, base)


def _gguf(handle: AdaptedModel, name: str, folder: Path, base: dict[str, Any]) -> Path:
    spec = handle.specs[name]
    start = f"adapter {name!r} cannot be a GGUF file: llama.cpp's LoRA has no"
    if not spec.recipe.low_rank:
        raise UserError(f"adapter {name!r} is no low-rank product, so there is no LoRA to export; merge it instead")
    if spec.recipe.gain:
        raise UserError(f"{start} gain (DoRA); merge it instead")
    if spec.base_names:
        raise UserError(f"{start} biases ({listed(spec.base_names, 2)}); merge it instead")
    if spec.recipe.ranks is not None and any(layer.tokens for layer in spec.recipe.ranks.adapted.values()):
        raise UserError(f"{start} single tokens; merge it instead")
    if stacks := [path for path in spec.paths if isinstance(handle.layers[path].base, Stack)]:
        raise UserError(f"{start} place for the experts {stacks[0]} yet; merge it instead")
    if spec.heads:
        raise UserError(f"{start} head ({listed(spec.heads, 2)}); merge it instead")
    if others := [path for path in spec.paths if not kinds.is_product(handle.layers[path].original[0])]:
        raise UserError(f"{start} place for {listed(others, 2)}, which is no linear layer; merge it instead")
    if shared := _tied(handle, spec.paths):
        raise UserError(f"{start} place for {shared[0]}, whose weight another layer has too; merge it instead")
    updates: dict[str, Update] = {path: handle.layers[path].lower(name) for path in spec.paths}  # type: ignore[misc]
    gguf_format.write_adapter(folder, getattr(handle.model, "config", None), updates, base, name)
    return folder


def _tied(handle: AdaptedModel, paths: Sequence[str]) -> list[str]:
    """The layers whose weight is that of another module."""
    tied: dict[str, str] = getattr(handle.model, "all_tied_weights_keys", None) or {}
    keys = {*tied, *tied.values()}
    return [path for path in paths if f"{path}.weight" in keys]


LAYOUTS: dict[str, Callable[[AdaptedModel, str, Path, dict[str, Any]], Path]] = {
    "peft": peft_export.export, "gguf": _gguf,
}  # fmt: skip
