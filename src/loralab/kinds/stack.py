"""Stacks of expert weights: W (n, out, in), one matrix for each expert of a mixture, held by the module of them all.

With a leading axis on A (n, r, in), B (n, out, r) and g (n, out) the normal form is that of each expert by itself. The
module picks the experts of a token itself, so it is given W + B A in the place of W, which costs a tensor of W's size.
A module is known by what transformers says of it (`is_transposed`, `num_experts`), not by its name.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """One stack of a module, as W (n, out, in); a transposed one is kept as (n, in, out)."""

    bias = None

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        self.holder, self.name = (holder,), name  # in a tuple, so that it is no submodule
        self.weight: nn.Parameter = getattr(holder, name)
        self.transposed = bool(holder.is_transposed)
        self.count, self.out_features, self.in_features = self.dense().shape

    def dense(self) -> Tensor:
        """W (n, out, in) as kept."""
        return self.own(self.weight)

    def own(self, W: Tensor) -> Tensor:
        """W (n, out, in) in the module's own shape, and back."""
        return W.mT if self.transposed else W

    def linear(self, x: Tensor) -> Tensor:
        """W x by expert: (n, t, in) -> (n, t, out)."""
        W = self.dense()
        return (x.to(W.dtype) @ W.mT).to(x.dtype)

    def square_norms(self) -> Tensor:
        """|W_i|^2 (n, out) in float32 or wider."""
        W = self.dense().detach()
        return W.to(torch.promote_types(W.dtype, torch.float32)).square().sum(-1)

    def restore(self, layer: Any, W: Tensor | None) -> Any:
        """Give the module its own weight back, or another W (n, out, in)."""
        kept = self.weight if W is None else nn.Parameter(self.own(W).contiguous(), requires_grad=False)
        self.holder[0].register_parameter(self.name, kept)
        return layer


def stacks_of(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that are stacks of experts."""
    if not isinstance(getattr(module, "is_transposed", None), bool):
        return []
    count = getattr(module, "num_experts", None)
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if p.ndim == 3 and len(p) == count]


def size(stack: Any) -> tuple[int, int]:
    """(out, in) of each expert."""
    return stack.out_features, stack.in_features
