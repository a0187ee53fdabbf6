"""Embeddings: y = W e, the column of W (out, in) that a number names; in is the size of the vocabulary.

A (r, in) is looked up like W, so that an adapted embedding costs what a lookup of r values and a product with B costs.
Subclasses that scale what they look up, or that make the numbers themselves (positions), do so for A as well.
"""

from typing import Any

import torch
from torch import Tensor, nn

from loralab.kinds.by_forward import ByForward


class Table(ByForward):
    """The weight (in, out) of an nn.Embedding, as W (out, in)."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def as_weight(self, W: Tensor) -> Tensor:
        return W.mT

    def example(self) -> tuple[Any, ...]:
        return (torch.tensor([[1, 0, 1], [0, 1, 0]], device=self.weight.device),)

    def few(self) -> Tensor:
        padding = getattr(self.layer[0], "padding_idx", None) or 0
        rows: Tensor = self.weight[: max(16, padding + 1)]
        return rows


def refusal(layer: nn.Embedding) -> str | None:
    """Why an embedding cannot be adapted, or None."""
    if getattr(layer, "max_norm", None) is not None:
        return "its max_norm changes the weight in place at every call"
    return None
