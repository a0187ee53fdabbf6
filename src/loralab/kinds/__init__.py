"""Layer kinds: how a layer of a model is read as a weight W (out, in), and how it comes back with another.

A kind is a file with a base, the frozen layer as the normal form sees it, and one row of KINDS. A layer of an exact
type of a row is of that kind. A layer of a subclass is, too, where its own forward agrees with the normal form, which
is tried on the layer; otherwise `kind_of` says why not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab import stores
from loralab.kinds import convolution, embedding, loaded, stack
from loralab.kinds.by_forward import ByForward, disagreement

OUTPUT = nn.modules.linear.NonDynamicallyQuantizableLinear  # what nn.MultiheadAttention calls its out_proj
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others are codes, and have scales elsewhere
REFUSED = {  # package that a layer or its weight is of -> what it is called
    "auto_gptq": "GPTQ", "gptqmodel": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "torchao": "torchao", "optimum": "Optimum",
    "aqlm": "AQLM", "eetq": "EETQ", "fbgemm_gpu": "FBGEMM", "quanto": "Quanto", "vptq": "VPTQ",
}  # fmt: skip


class Kind(NamedTuple):
    """One kind of layer."""

    name: str  # what coverage calls it
    exact: tuple[type, ...]  # layers that compute W x + b, whatever is in them
    wider: tuple[type, ...]  # whose subclasses do so where their forward agrees
    size: Callable[[Any], tuple[int, int]]  # layer -> (out, in)
    by_forward: Callable[[Any], Any]  # layer -> base that its own forward computes
    refusal: Callable[[Any], str | None] = lambda layer: None  # why a layer of the kind cannot be adapted
    product: bool = False  # whether x (..., in) is multiplied as it is, so that a store can keep W


def _linear_size(layer: Any) -> tuple[int, int]:
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def _embedding_size(layer: Any) -> tuple[int, int]:
    return layer.weight.shape[1], layer.weight.shape[0]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR = Kind("linear", (*stores.LINEAR, OUTPUT), (nn.Linear,), _linear_size, ByForward, product=True)
EMBEDDING = Kind("embedding", (nn.Embedding,), (nn.Embedding,), _embedding_size, embedding.Table, embedding.refusal)
CONVOLUTION = Kind("convolution", CONVOLUTIONS, CONVOLUTIONS, convolution.size, convolution.Kernel, convolution.refusal)
EXPERTS = Kind("experts", (stack.Stack,), (), stack.size, lambda layer: layer)
KINDS = (LINEAR, EMBEDDING, CONVOLUTION, EXPERTS)

_tried: dict[Any, str | None] = {}  # settings of a subclass's layer -> why its forward does not agree, or None


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind whose rules a layer goes by, whether it can be adapted or not; None for any other module."""
    return next((kind for kind in KINDS if isinstance(layer, (*kind.exact, *kind.wider))), None)


def refusal(layer: nn.Module) -> str | None:
    """Why a layer of a kind cannot be adapted, or None; also for layers of quantization packages, which have none."""
    for held in (layer, getattr(layer, "weight", None)):
        package = type(held).__module__.split(".")[0]
        if package in REFUSED:
            return f"{type(held).__name__} is a layer of {REFUSED[package]}, whose weight loralab cannot read"
    kind = kind_of(layer)
    if kind is None or loaded.is_loaded(layer):
        return None
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return "it has no weight of its own"
    if weight.dtype not in FLOATS:
        return f"its weight is kept in {str(weight.dtype).removeprefix('torch.')}, which loralab cannot read as numbers"
    if (why := kind.refusal(layer)) is not None:
        return why
    if type(layer) in kind.exact:
        return None
    key = (type(layer), kind.size(layer), _settings(layer))
    if key not in _tried:
        _tried[key] = disagreement(kind.by_forward(layer))
    return _tried[key]


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """The plain values among the attributes of a layer, which decide what its forward does."""
    plain = {key: value for key, value in vars(layer).items() if isinstance(value, int | float | str | tuple | None)}
    return tuple(sorted((key, repr(value)) for key, value in plain.items()))


def is_product(layer: nn.Module) -> bool:
    """Whether a layer multiplies x (..., in) by W itself: a linear layer."""
    kind = kind_of(layer)
    return kind is not None and kind.product


def size(layer: Any) -> tuple[int, int]:
    """(out, in) of a layer of a kind."""
    kind = kind_of(layer)
    assert kind is not None
    return kind.size(layer)


def keep(layer: Any, store: str | None = None) -> Any:
    """The base of a layer: its weight (out, in), in a store where it is a product, with its bias.

    Raises UserError for an unknown store.
    """
    kind = kind_of(layer)
    assert kind is not None
    if loaded.is_loaded(layer):
        return loaded.Loaded(layer)
    if type(layer) in (*stores.LINEAR, OUTPUT) or (kind.product and store is not None):
        return stores.keep(layer, store)
    return kind.by_forward(layer)


def restore(layer: Any, base: Any, W: Tensor | None) -> Any:
    """The layer with another weight W (out, in); None gives it back the one that `base` keeps."""
    if hasattr(base, "restore"):
        return base.restore(layer, W)
    stores.restore(layer, base.dense() if W is None else W)
    layer.bias = base.bias
    return layer


def sides(base: Any) -> tuple[int, ...] | None:
    """What other libraries shape A (r, in) by: (in, k1, ...) for a convolution, () for a table, None for a product."""
    if isinstance(base, embedding.Table):
        return ()
    return base.sides if isinstance(base, convolution.Kernel) else None
