"""What makes training fast, each piece optional: chosen once, before training starts, and named with its reason.

    choices = loralab.fast.prepare(model, speed="auto", store="bfloat16")
    choices, autocast = loralab.fast.quicken(model, "auto", torch.bfloat16)  # as `loralab train` does

A piece is a row of PIECES: what must hold for it, and how it is put into the model. `speed="off"` leaves the plain
path, which every piece equals (tests/test_speed.py) and is measured against (docs/benchmarks.md). `speed="compile"`
gives the plain path to torch.compile, for GPUs; not measured.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn

from loralab.active import Active
from loralab.adapted import HANDLE, AdaptedModel
from loralab.errors import UserError
from loralab.fast import heap, masks
from loralab.fast.encoders import LAYERS, layers_of
from loralab.layer import Adapted, put, put_back

Speed = Literal["auto", "off", "compile"]
COMPILER = "inductor"  # torch's own; batches of any shape share what it makes
SAME = (None, "eager", "sdpa")  # attention of transformers that says what a block computes
CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # oneDNN reads it at its first product
MANY = "16384"  # prepared products; its own 1024 are too few


@dataclass(frozen=True)
class Choice:
    """One piece: whether it is used, and why or why not."""

    piece: str
    used: bool
    reason: str


@dataclass(frozen=True)
class Piece:
    why: str
    problem: Callable[[nn.Module], str | None]  # what keeps a model from using it
    put: Callable[[nn.Module], None]


def prepare(model: nn.Module, speed: Speed = "auto", store: str | None = None) -> list[Choice]:
    """Puts into `model` what is fast here; call it once, after `attach`, before training. Returns what and why.

    `store="bfloat16"` keeps every frozen tensor of the model in bfloat16 and computes in it; what learns stays float32.
    Raises UserError for an unknown speed or store.
    """
    if speed not in (known := get_args(Speed)):
        raise UserError(f"speed={speed!r}: expected one of {', '.join(known)}")
    if store is not None:
        hold(model, store)
    chosen = []
    for name, piece in PIECES.items():
        problem = piece.problem(model) if speed == "auto" else f"speed is {speed}"
        if problem is None:
            piece.put(model)
        chosen.append(Choice(name, problem is None, problem or piece.why))
    if speed == "compile":
        model.compile(dynamic=True, backend=COMPILER)
        chosen.append(Choice("compile", True, "torch.compile joins what lies between products"))
    return chosen


def quicken(model: nn.Module, speed: Speed, precision: torch.dtype) -> tuple[list[Choice], bool]:
    """What is fast for training in that precision: what was chosen, and whether autocast is still wanted.

    A model whose layers are frozen is held in bfloat16, so its products need no casts. It must be on its device.
    """
    narrow = precision == torch.bfloat16
    held = narrow and speed != "off" and frozen(model) is None
    return prepare(model, speed, "bfloat16" if held else None), narrow and not held


def hold(model: nn.Module, store: str) -> None:
    """Rounds every frozen floating tensor of the model to `store`, so that products need no casts."""
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if store not in dtypes:
        raise UserError(f"store={store!r} for a whole model: expected bfloat16 or float32")
    handle = _handle(model)
    if handle is not None:
        _ = handle.base_sha256  # taken while the base still has its own bits
    own = _own(handle)  # tensors of adapters stay as they are, frozen ones too
    for p in model.parameters():
        if id(p) not in own and p.is_floating_point() and not p.requires_grad:
            p.data = p.data.to(dtypes[store])
    for layer in model.modules():
        if isinstance(layer, Adapted):
            layer.dtype = dtypes[store]


def frozen(model: nn.Module) -> str | None:
    """Why a model's layers cannot be taken as frozen, or None."""
    handle = _handle(model)
    in_place = [] if handle is None else [key for name in handle.names for key in handle.spec(name).base_names]
    if in_place:
        return f"{in_place[0]} learns in place"
    own = _own(handle)
    loose = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    return f"{loose[0]} learns, and it is no adapter's" if loose else None


def _handle(model: nn.Module) -> AdaptedModel | None:
    return getattr(model, HANDLE, None)


def _active(model: nn.Module) -> Active:
    handle = _handle(model)
    return Active() if handle is None else handle.active


def _own(handle: AdaptedModel | None) -> set[int]:
    """Of the tensors that an adapter or its head has."""
    return set() if handle is None else {id(t) for name in handle.names for t in handle.state(name).values()}


def _no_masks(model: nn.Module) -> str | None:
    device, handle = next(model.parameters()).device.type, _handle(model)
    if device == "cpu" or (handle is not None and len(handle.names) > 1):  # runs that share a batch: each its own
        return None
    return f"the model is on {device}, which draws random numbers fast"


def _drop(module: nn.Module, active: Active, x: torch.Tensor) -> torch.Tensor:
    return masks.dropout(x, module.p, module.training, active.streams)  # type: ignore[arg-type]


def _put_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Dropout:
            put(module, partial(_drop, module, _active(model)))


def _no_block(model: nn.Module) -> str | None:
    if not layers_of(model):
        return f"{type(model).__name__} has no layers of a known kind: {', '.join(LAYERS)}"
    if (attention := getattr(model.config, "_attn_implementation", None)) not in SAME:
        return f"attention is {attention}"
    return frozen(model)


def _put_block(model: nn.Module) -> None:
    for layer in layers_of(model):
        put(layer, LAYERS[type(layer).__name__](layer, model.config, _active(model)))


def _no_cache(model: nn.Module) -> str | None:
    return None if os.environ.get(CACHE, MANY) == MANY else f"{CACHE} is set to {os.environ[CACHE]}"


def _put_cache(model: nn.Module) -> None:
    os.environ[CACHE] = MANY


def _no_heap(model: nn.Module) -> str | None:
    device = next(model.parameters()).device.type
    return heap.problem() if device == "cpu" else f"the model is on {device}, where PyTorch keeps freed memory itself"


def _put_heap(_model: nn.Module) -> None:
    heap.keep()


PIECES: dict[str, Piece] = {
    "cache": Piece("products of batches of many lengths are prepared once, not again and again", _no_cache, _put_cache),
    "heap": Piece("freed memory is kept for the next step, not asked for again page by page", _no_heap, _put_heap),
    "dropout": Piece("random bits are drawn 64 at a time", _no_masks, _put_dropout),
    "block": Piece(
        "a layer is one step of autograd: q, k, v in one product, nothing kept twice", _no_block, _put_block
    ),
}


__all__ = ["PIECES", "Choice", "Piece", "Speed", "frozen", "hold", "prepare", "put_back", "quicken"]
