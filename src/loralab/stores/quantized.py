"""A frozen weight kept in few bits: y = W x + b, with W (out, in) made anew in forward and again in backward.

Left to autograd, the product would keep the dense W for its backward pass, and lose the memory that few bits save.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

Kept = Mapping[str, Tensor]  # name -> codes (whole numbers) or statistics (float32)


class Codec(NamedTuple):
    """How W becomes a few tensors and comes back."""

    encode: Callable[[Tensor], Kept]  # W (out, in) in float32 -> what is kept of it
    decode: Callable[[Kept, torch.Size, torch.dtype], Tensor]  # kept, (out, in), dtype -> W in that dtype


class FrozenLinear(torch.autograd.Function):
    """x (..., in), bias (out,) -> W x + b (..., out), keeping nothing for backward but the base itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, base: "Quantized") -> Tensor:
        ctx.base, ctx.bias_shape = base, None if bias is None else bias.shape
        return F.linear(x, base.decoded(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads  # (..., out)
        to_x, to_bias, _ = ctx.needs_input_grad
        x = grad @ ctx.base.decoded(grad.dtype) if to_x else None
        return x, grad.sum_to_size(ctx.bias_shape) if to_bias else None, None


class Quantized(nn.Module):
    """W (out, in) as the codes and statistics of a codec, which are buffers; products run in x's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, codec: Codec) -> None:
        super().__init__()
        self.codec = codec
        self.bias = bias
        self.out_features, self.in_features = self.shape = weight.shape
        W = weight.detach().float()
        kept = codec.encode(W)
        self.statistics = [name for name, tensor in kept.items() if tensor.is_floating_point()]
        for name, tensor in kept.items():
            # statistics as the bits of a whole number, so that model.half() does not round them
            self.register_buffer(name, tensor.view(torch.int32) if name in self.statistics else tensor)
        self._square_norms: Tensor | None = None
        self.error = _error(W, self.dense())

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), made anew."""
        kept = {k: t.view(torch.float32) if k in self.statistics else t for k, t in self.named_buffers()}
        return self.codec.decode(kept, self.shape, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x (+ bias): (..., in) -> (..., out), in x's dtype, or autocast's where that is on."""
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        apply: Callable[..., Tensor] = FrozenLinear.apply
        return apply(x.to(dtype), None if bias is None else bias.to(dtype), self)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.bias)

    def square_norms(self) -> Tensor:
        """|W_i|^2 (out,) in float32 of the weight as kept, computed once: W never changes."""
        device = next(self.buffers()).device
        if self._square_norms is None or self._square_norms.device != device:
            self._square_norms = self.dense().square().sum(1)
        return self._square_norms

    def dense(self) -> Tensor:
        """W (out, in) as kept, in float32."""
        return self.decoded(torch.float32)


def _error(W: Tensor, kept: Tensor) -> float:
    """|W - kept| / |W|; of a plan's tensors, which have no values, it is not known."""
    return math.nan if isinstance(W, FakeTensor) else float((W - kept).norm() / W.norm().clamp_min(1e-30))


def in_blocks(W: Tensor, size: int) -> Tensor:
    """The flattened weight in rows of `size`; the last row is padded with zeros."""
    return F.pad(W.flatten(), (0, -W.numel() % size)).view(-1, size)


def from_blocks(V: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `in_blocks`."""
    return V.flatten()[: shape.numel()].view(shape)
