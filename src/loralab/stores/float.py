"""A weight kept as it is or rounded to bfloat16; products run in the dtype it is kept in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Float(nn.Module):
    """W (out, in) in float32, float16 or bfloat16. The tensors of the wrapped layer are shared, not copied."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dtype = dtype or weight.dtype
        kept = weight.dtype == dtype and isinstance(weight, nn.Parameter)
        self.weight = weight if kept else nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self._square_norms: Tensor | None = None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x (+ bias): (..., in) -> (..., out), in x's dtype."""
        W = self.weight
        if x.dtype == W.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, W, bias)
        return F.linear(x.to(W.dtype), W, None if bias is None else bias.to(W.dtype)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.bias)

    def square_norms(self) -> Tensor:
        """|W_i|^2 (out,) in float32 or wider, computed once: W never changes."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        known = self._square_norms
        if known is None or (known.device, known.dtype) != (self.weight.device, dtype):
            known = self._square_norms = self.weight.detach().to(dtype).square().sum(1)
        return known

    def dense(self) -> Tensor:
        """W (out, in) as kept."""
        return self.weight
