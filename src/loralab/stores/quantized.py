"""A frozen weight kept in few bits: y = W x + b, with W (out, in) decoded in forward and again in backward.

Plain autograd would keep the dense W for the backward pass, which would cost the memory that few bits save.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

Kept = Mapping[str, Tensor]  # name -> codes (whole numbers) or statistics (float32)


class Codec(NamedTuple):
    """How W becomes codes and statistics, and comes back."""

    encode: Callable[[Tensor], Kept]  # W (out, in) in float32 -> codes and statistics
    decode: Callable[[Kept, torch.Size, torch.dtype], Tensor]  # these, (out, in), dtype -> W in that dtype


class FrozenLinear(torch.autograd.Function):
    """x (..., in), bias (out,) -> W x + b (..., out); backward keeps nothing but the base itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, base: "Quantized") -> Tensor:
        ctx.base, ctx.bias_shape = base, None if bias is None else bias.shape
        return F.linear(x.contiguous(), base.decoded(x.dtype), bias)  # as in float.py

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()  # (..., out)
        to_x, to_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.base.decoded(grad.dtype) if to_x else None  # (..., in)
        return grad_x, grad.sum_to_size(ctx.bias_shape) if to_bias else None, None


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
        self._norms: tuple[Any, Tensor] | None = None  # marks of the buffers, |W_i|^2
        self.error = _error(W, self.dense())

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in that dtype, decoded each time."""
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
        """|W_i|^2 (out,) in float32 of the weight as kept, computed anew when a buffer changes."""
        marks = [(t.data_ptr(), t.device, t._version) for t in self.buffers()]
        if self._norms is None or self._norms[0] != marks:
            self._norms = marks, self.dense().square().sum(1)
        return self._norms[1]

    def dense(self) -> Tensor:
        """W (out, in) as kept, in float32."""
        return self.decoded(torch.float32)


@dataclass(frozen=True)
class Stored:
    """Size and error of one stored weight, counted from its tensors."""

    values: int  # of the weight
    bytes: int  # of codes and statistics, padding included
    error: float  # |W - kept| / |W|, Frobenius norms

    @property
    def bits(self) -> float:
        """Bits per value of the weight."""
        return 8 * self.bytes / self.values


def quantization_report(model: Any) -> dict[str, Stored]:
    """Path of each layer with a quantized base -> its size and error; empty if nothing is quantized.

    `model` is a model or the handle of its adapters.
    """
    module: nn.Module = model if isinstance(model, nn.Module) else model.model
    return {
        path.removesuffix(".base"): Stored(base.shape.numel(), sum(b.nbytes for b in base.buffers()), base.error)
        for path, base in module.named_modules()
        if isinstance(base, Quantized)
    }


def _error(W: Tensor, kept: Tensor) -> float:
    """|W - kept| / |W|; NaN for tensors without values, as in an estimate of memory."""
    return math.nan if isinstance(W, FakeTensor) else float((W - kept).norm() / W.norm().clamp_min(1e-30))


def in_blocks(W: Tensor, size: int) -> Tensor:
    """The flattened weight as (blocks, size); the last block is padded with zeros."""
    return F.pad(W.flatten(), (0, -W.numel() % size)).view(-1, size)


def from_blocks(V: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `in_blocks`."""
    return V.flatten()[: shape.numel()].view(shape)
