"""Convolutions: W (out, in * k1 * k2 ...) acts on the patches of the input, and each patch is an x.

A (r, in * k1 ...) is a convolution to r channels with the layer's own stride, padding and dilation, and B (out, r) one
of size 1, as in PEFT. The channels of a group of a grouped convolution see only their own inputs, so its W is no
matrix of this kind.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from loralab.kinds.by_forward import ByForward


class Kernel(ByForward):
    """The weight (out, in, k1, ...) of an nn.Conv1d, Conv2d or Conv3d, as W (out, in * k1 * ...)."""

    def __init__(self, layer: Any) -> None:
        self.sides = tuple(layer.weight.shape[1:])  # in, k1, ...
        super().__init__(layer)
        self.channel = -len(self.sides)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_weight(self, W: Tensor) -> Tensor:
        return W.unflatten(1, self.sides)  # type: ignore[no-any-return]

    def after(self, B: Tensor, z: Tensor) -> Tensor:
        return (z.movedim(self.channel, -1) @ B.mT).movedim(-1, self.channel)

    def example(self) -> tuple[Any, ...]:
        layer = self.layer[0]
        size = [(k - 1) * d + 4 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return (torch.randn(2, self.sides[0], *size).to(self.weight),)


def size(layer: Any) -> tuple[int, int]:
    """(out, in * k1 * ...)."""
    return layer.weight.shape[0], prod(layer.weight.shape[1:])


def refusal(layer: Any) -> str | None:
    """Why a convolution cannot be adapted, or None."""
    return None if layer.groups == 1 else f"a convolution of {layer.groups} groups has no one matrix W"
