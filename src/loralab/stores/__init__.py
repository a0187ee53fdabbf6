"""How a frozen weight is kept. A format of few bits is one file with `encode` and `decode`, and one row of STORES."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.errors import UserError
from loralab.stores.float import Float
from loralab.stores.int2 import INT2
from loralab.stores.int8 import INT8
from loralab.stores.nf4 import NF4, NF4_DQ
from loralab.stores.quantized import Quantized

# name -> (weight (out, in), bias (out,) or None) -> base
STORES: dict[str, Callable[[Tensor, Tensor | None], Any]] = {
    "float32": partial(Float, dtype=torch.float32),
    "bfloat16": partial(Float, dtype=torch.bfloat16),
    "int8": partial(Quantized, codec=INT8),
    "nf4": partial(Quantized, codec=NF4),
    "nf4-dq": partial(Quantized, codec=NF4_DQ),  # double quantization
    "int2": partial(Quantized, codec=INT2),
}

LINEAR = (nn.Linear, Conv1D)  # the layers that a store can keep; exact types, as a subclass may compute something else


def keep(layer: Any, store: str | None = None) -> Any:
    """The base of a linear layer: its weight (out, in) in a store, with its bias.

    `store=None` keeps the weight as it is; the (in, out) of a Conv1D is transposed. Raises UserError for an unknown
    store.
    """
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, Conv1D):
        weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)  # a view: (out, in)
    if store is None:
        return Float(weight, bias)
    if store not in STORES:
        raise UserError(f"store {store!r} is unknown: choose one of {', '.join(STORES)}")
    return STORES[store](weight, bias)


def restore(layer: nn.Module, weight: Tensor) -> None:
    """Give `layer` (nn.Linear or Conv1D) the weight (out, in); a parameter that it had before stays the same object."""
    if isinstance(layer, Conv1D):
        if layer.weight is not None and layer.weight.data_ptr() == weight.data_ptr():
            return
        weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
