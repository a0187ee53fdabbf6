"""A layer as one node of autograd. What it computes, forward and backward, its modules say; the rest is here, once.

The modules of a layer (`LayerModules`, `PreNormModules`, `DecoderModules`) have two methods:

    compute(call, x, mask, given, joined) -> out, the tensors that backward needs, and those of each product
    backward(call, grad, kept) -> dx or None, the gradients of each product's updates

x, out, grad and dx are (b, t, d); `given` are tensors of the call beside the mask (positions, say).
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralab.fast.joined import JoinedUpdate, Saved, by_product
from loralab.fast.shared import LayerCall, no_autocast, refuse_more_than_a_gradient

Given = Sequence[Any]
Computed = tuple[Tensor, tuple[Tensor | None, ...], list[Saved]]
Gradients = tuple[Tensor | None, tuple[Any, ...]]


class Joined(NamedTuple):
    """The updates of each product, None without one, and whether an A of it learns: only that needs its input."""

    updates: Sequence[JoinedUpdate | None]
    learns: Sequence[bool]


class Kept(NamedTuple):
    """What backward gets of the forward pass."""

    given: Given
    saved: Sequence[Any]  # as `compute` gave them
    updates: Sequence[Any]  # of each product, one for each of its layers
    of_products: Sequence[Saved]
    learns: Sequence[bool]
    to_x: bool  # whether the gradient of x is wanted


FIRST = 4  # inputs of `LayerFunction` before the tensors that are given


class LayerFunction(torch.autograd.Function):
    """Inputs: call, x, mask, how many tensors are given, these, then A, B and gain of every linear layer."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, call: LayerCall, x: Tensor, mask: Tensor | None, count: int, *rest: Tensor
    ) -> Tensor:
        given, flat = rest[:count], rest[count:]
        updates = by_product(flat, call.products)
        joined = [product.join(own, x.dtype) for product, own in zip(call.products, updates, strict=True)]
        A_learns = iter(ctx.needs_input_grad[FIRST + count :: 3])  # of each linear layer
        ctx.learns = [any(list(islice(A_learns, len(product.bases)))) for product in call.products]
        out, saved, of_products = call.modules.compute(call, x, mask, given, Joined(joined, ctx.learns))
        ctx.call, ctx.count, ctx.updates = call, count, len(flat)
        ctx.save_for_backward(*given, *flat, *saved, *(t for of_one in of_products for t in of_one))
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Once, and outside autocast."""
        refuse_more_than_a_gradient(grad)
        ctx.call.read.check()
        tensors = iter(ctx.saved_tensors)  # read once: checkpointing recomputes them for the first reader and no other
        given, flat = tuple(islice(tensors, ctx.count)), tuple(islice(tensors, ctx.updates))
        rest, products, width = tuple(tensors), ctx.call.products, len(Saved._fields)
        end = len(rest) - width * len(products)
        of_products = [Saved(*rest[i : i + width]) for i in range(end, len(rest), width)]
        to_x = ctx.needs_input_grad[1]
        kept = Kept(given, rest[:end], by_product(flat, products), of_products, ctx.learns, to_x)
        with no_autocast(grad.device.type):
            dx, grads = ctx.call.modules.backward(ctx.call, grad, kept)
        return None, dx, None, None, *(None for _ in given), *(g for of_one in grads for g in of_one)
