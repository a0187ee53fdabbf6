"""What makes training fast, each piece optional; every piece computes what the model computes without it.

    choices = loralab.fast.enable(model, dtype="auto")      # as `adapters.fast()` and `loralab train` do
    choices = loralab.fast.prepare(model, speed="auto", store="bfloat16")  # what `enable` comes to

A piece is a row of PIECES: what must hold for it, and how it is put into the model. `speed="off"` leaves the plain
path, which every piece equals (tests/test_fast.py) and is measured against (docs/benchmarks.md). `speed="compile"`
gives the plain path to torch.compile, for GPUs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from loralab.active import Active
from loralab.adapted import HANDLE, AdaptedModel
from loralab.errors import UserError
from loralab.fast import heap, machine, masks
from loralab.fast.block import Block
from loralab.fast.choices import Choice, Choices
from loralab.fast.layers import LAYERS, layers_of, refused
from loralab.kinds import FLOATS
from loralab.layer import FAST, Adapted, plain_modules, put, put_back
from loralab.rounded import Rounded

Speed = Literal["auto", "off", "compile"]
COMPILED = "_loralab_compiled"  # marks a model that `prepare` gave to torch.compile
COMPILER = "inductor"  # torch's own; batches of any shape share what it makes
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # oneDNN reads it at its first product
LARGEST = 8 << 20  # values of a matrix, 32 MiB in float32 (see heap.py)
DROPS = (nn.Dropout.forward, F.dropout)  # torch's own, which somebody may replace
MANY = "16384"  # prepared products; its own 1024 are too few


@dataclass(frozen=True)
class Piece:
    """One piece of the fast path."""

    why: str
    problem: Callable[[nn.Module], str | None]  # what keeps a model from using it
    put: Callable[[nn.Module], None]


def enable(model: nn.Module, dtype: str | torch.dtype = "auto", speed: Speed = "auto") -> Choices:
    """Make forward and backward passes of `model` fast on this machine; call it after `attach`, on the device.

    `dtype` is what products run in: bfloat16, float32, or auto, which is bfloat16 where the machine multiplies it
    fast. For bfloat16 every frozen tensor is rounded to it once, so that no product needs a cast and forward passes
    no autocast; what learns keeps its dtype. If a tensor learns that belongs to no adapter (full fine-tuning), or the
    model takes something else than ids of tokens, it keeps its dtype and `Choices.autocast` is true. Returns what was
    chosen and why; it follows later changes.
    Raises UserError for an unknown dtype or speed.
    """
    if dtype not in ("auto", *DTYPES, *DTYPES.values()):
        raise UserError(f"dtype={dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    narrow = (machine.precision(dtype) if isinstance(dtype, str) else dtype) == torch.bfloat16
    takes_ids = getattr(model, "main_input_name", None) == "input_ids" and not _takes_features(model)
    rounded = narrow and speed != "off" and takes_ids and what_learns(model) is None
    choices = prepare(model, speed, "bfloat16" if rounded else None)
    choices.autocast = narrow and not rounded
    return choices


def _takes_features(model: nn.Module) -> bool:
    """Whether a model may be given pictures or sound in float32 beside ids, by what transformers says of it."""
    given = getattr(model, "input_modalities", "text")
    return any(one != "text" for one in ([given] if isinstance(given, str) else given))


def prepare(model: nn.Module, speed: Speed = "auto", store: str | None = None) -> Choices:
    """Put into `model` what is fast here; call it after `attach`. Returns what was chosen and why.

    `store="bfloat16"` rounds every frozen tensor of the model (see `round_frozen`), whatever else learns.
    Raises UserError for an unknown speed or store.
    """
    if speed not in (known := get_args(Speed)):
        raise UserError(f"speed={speed!r}: expected one of {', '.join(known)}")
    if speed != "auto":
        put_back(model)
    if speed != "compile" and model.__dict__.pop(COMPILED, False):
        model._compiled_call_impl = None
    if store is not None:
        round_frozen(model, store)
    chosen = []
    for name, piece in PIECES.items():
        problem = piece.problem(model) if speed == "auto" else f"speed is {speed}"
        if problem is None:
            piece.put(model)
        chosen.append(Choice(name, problem is None, problem or piece.why))
    if speed == "compile":
        model.compile(dynamic=True, backend=COMPILER)
        model.__dict__[COMPILED] = True
        chosen.append(Choice("compile", True, "torch.compile joins what lies between products"))
    blocks = [_block(layer, model) for layer in layers_of(model)] if speed == "auto" else []
    handle = _handle(model)
    rounded = Rounded() if handle is None else handle.rounded
    return Choices(model, chosen, blocks, PIECES["block"].why, store, rounded)


def round_frozen(model: nn.Module, store: str) -> None:
    """Round every frozen floating-point tensor of the model to `store`, bfloat16 or float32.

    Tensors of adapters stay as they are, frozen ones too. Raises UserError for another store.
    """
    if store not in DTYPES:
        raise UserError(f"store={store!r} for a whole model: expected {' or '.join(DTYPES)}")
    handle = _handle(model)
    if handle is not None:
        _ = handle.base_sha256  # taken while the base still has its own bits
    own = _of_adapters(handle)
    frozen = [p for p in model.parameters() if id(p) not in own and p.dtype in FLOATS and not p.requires_grad]
    tables = [  # of positions, say: what is added to rounded tensors; vectors, such as frequencies, are cast where used
        t
        for _, module in plain_modules(model)
        for t in module._buffers.values()
        if t is not None and t.dtype == torch.float32 and t.ndim > 1
    ]
    before = {p.dtype for p in frozen}  # float8, which holds codes, is none of them
    if handle is not None and len(before) == 1 and before != {DTYPES[store]}:
        handle.rounded_from = before.pop()
    (Rounded() if handle is None else handle.rounded).round([*frozen, *tables], DTYPES[store])
    for layer in model.modules():
        if isinstance(layer, Adapted):
            layer.dtype = DTYPES[store]


def what_learns(model: nn.Module) -> str | None:
    """What learns in the model beside its adapters and their heads, in words; None if all of it is frozen."""
    handle = _handle(model)
    in_place = [] if handle is None else [key for name in handle.names for key in handle.spec(name).base_names]
    if in_place:
        return f"{in_place[0]} learns in place"
    own = _of_adapters(handle)
    others = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    return f"{others[0]} learns, and it is no adapter's" if others else None


def _handle(model: nn.Module) -> AdaptedModel | None:
    return getattr(model, HANDLE, None)


def _active(model: nn.Module) -> Active:
    handle = _handle(model)
    return Active() if handle is None else handle.active


def _of_adapters(handle: AdaptedModel | None) -> set[int]:
    """The id() of every tensor of an adapter or its head."""
    return set() if handle is None else {id(t) for name in handle.names for t in handle.state(name).values()}


# ---- the pieces ------------------------------------------------------------------------------------------------------


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _no_masks(model: nn.Module) -> str | None:
    device, handle = _device(model), _handle(model)
    if device == "cpu" or (handle is not None and len(handle.names) > 1):  # runs that share a batch: each its own
        return None
    return f"the model is on {device}, which draws random numbers fast"


def _dropout(module: nn.Dropout, active: Active, input: torch.Tensor) -> torch.Tensor:
    if module.inplace or (nn.Dropout.forward, F.dropout) != DROPS:
        return nn.Dropout.forward(module, input)
    return masks.dropout(input, module.p, module.training, active.streams)


def _put_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Dropout:
            put(module, partial(_dropout, module, _active(model)))


def _no_block(model: nn.Module) -> str | None:
    if layers_of(model):
        return None
    return refused(model) or f"{type(model).__name__} has no layers of a known kind: {', '.join(LAYERS)}"


def _put_block(model: nn.Module) -> None:
    for layer in layers_of(model):
        block = Block(layer, LAYERS[type(layer).__name__], _active(model))
        put(layer, block)
        if layer.__dict__.get(FAST) is block:  # else a forward of somebody else stays
            block.read_structure(moves=True)


def _block(layer: nn.Module, model: nn.Module) -> Block:
    """The block in the place of a layer's forward; of a layer that has a forward of its own one that says so."""
    found = layer.__dict__.get(FAST)
    return found if isinstance(found, Block) else Block(layer, LAYERS[type(layer).__name__], _active(model))


def _no_primitives(model: nn.Module) -> str | None:
    return None if os.environ.get(PRIMITIVES, MANY) == MANY else f"{PRIMITIVES} is set to {os.environ[PRIMITIVES]}"


def _put_primitives(model: nn.Module) -> None:
    os.environ[PRIMITIVES] = MANY


def _no_heap(model: nn.Module) -> str | None:
    device = _device(model)
    return heap.problem() if device == "cpu" else f"the model is on {device}, where PyTorch keeps freed memory itself"


def keeps_large(model: nn.Module) -> bool:
    """Whether the heap may keep large blocks: not where a product is with a matrix of more than LARGEST values."""
    sizes = (getattr(m, "in_features", 0) * getattr(m, "out_features", 0) for m in model.modules())
    return max((size for size in sizes if isinstance(size, int)), default=0) <= LARGEST


def keep_memory(model: nn.Module) -> None:
    """Keep freed memory in this process for the next step, if this process can."""
    if _no_heap(model) is None:
        heap.keep(keeps_large(model))


PIECES: dict[str, Piece] = {
    "cache": Piece(
        "products of batches of many lengths are prepared once, not again and again", _no_primitives, _put_primitives
    ),
    "heap": Piece("freed memory is kept for the next step, not asked for again page by page", _no_heap, keep_memory),
    "dropout": Piece("random bits are drawn 64 at a time", _no_masks, _put_dropout),
    "block": Piece(
        "a layer is one step of autograd: q, k, v in one product, nothing kept twice", _no_block, _put_block
    ),
}


__all__ = [
    "PIECES",
    "Choice",
    "Choices",
    "Piece",
    "Speed",
    "enable",
    "keep_memory",
    "keeps_large",
    "prepare",
    "put_back",
    "round_frozen",
    "what_learns",
]
