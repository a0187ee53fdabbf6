"""A weight kept as it is or rounded to bfloat16; products run in the dtype of the weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.cache import Cache

PIECES = 12  # blocks of rows that norms are computed in


class Float(nn.Module):
    """W (out, in) in float32, float16 or bfloat16. The tensors of the wrapped layer are shared, not copied."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dtype = dtype or weight.dtype
        kept = weight.dtype == dtype and isinstance(weight, nn.Parameter)
        self.weight = weight if kept else nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self._norms = Cache()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x (+ bias): (..., in) -> (..., out), in x's dtype.

        x is made contiguous: for a slice (b, t, in) of a larger tensor torch copies a frozen W b times.
        """
        W, x = self.weight, x.contiguous()
        if x.dtype == W.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, W, bias)
        return F.linear(x.to(W.dtype), W, None if bias is None else bias.to(W.dtype)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.bias)

    def square_norms(self) -> Tensor:
        """|W_i|^2 (out,) in float32 or wider, kept only inside `caching`: somebody may write into W."""
        W = self.weight.detach()
        dtype = torch.promote_types(W.dtype, torch.float32)

        def make() -> Tensor:
            """Without making anything of the size of W: on the CPU a few rows at a time, elsewhere in one kernel."""
            if W.device.type != "cpu":
                norms: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=dtype)  # (out,)
                return norms.square()
            few = -(-len(W) // PIECES)
            return torch.cat([rows.to(dtype).square().sum(1) for rows in W.split(few)])  # (out,)

        squares: Tensor = self._norms.get((dtype, W.device), [W], make, frozen=True)
        return squares

    def dense(self) -> Tensor:
        """W (out, in) as kept."""
        return self.weight
