"""A layer as one node of autograd. What it computes, forward and backward, its modules say; the rest is here, once.

The modules of a layer (`LayerModules`, `PreNormModules`, `DecoderModules`) have two methods:

    compute(call, x, mask, given, joined, learns) -> out, the tensors that backward needs, and those of each product
    backward(call, grad, given, saved, updates, of_products, learns, to_x) -> dx or None, the gradients of each product

x, out, grad and dx are (b, t, d); `given` are tensors of the call beside the mask (positions, say); `learns` says of
each product whether an A of it learns, as only the gradient of A needs the product's input.
"""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from loralab.fast.joined import Saved, by_product
from loralab.fast.shared import LayerCall, no_autocast, refuse_more_than_a_gradient

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
        out, saved, of_products = call.modules.compute(call, x, mask, given, joined, ctx.learns)
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
        kept, products, width = tuple(tensors), ctx.call.products, len(Saved._fields)
        end = len(kept) - width * len(products)
        of_products = [Saved(*kept[i : i + width]) for i in range(end, len(kept), width)]
        updates = by_product(flat, products)
        with no_autocast(grad.device.type):
            dx, grads = ctx.call.modules.backward(
                ctx.call, grad, given, kept[:end], updates, of_products, ctx.learns, ctx.needs_input_grad[1]
            )
        return None, dx, None, None, *(None for _ in given), *(g for of_one in grads for g in of_one)
