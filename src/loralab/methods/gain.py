"""DoRA: y = m / |W + B A| * (W x + B A x) + b, one learned length m (out,) per row of the weight (Liu et al., 2024).

The norm is taken by output row, as in the authors' code, and B A is never formed:
|W_i + B_i A|^2 = |W_i|^2 + 2 (W A^T)_i . B_i + B_i (A A^T) B_i^T, where W A^T is the base applied to the rows of A.
"""

from typing import Any

import torch
from torch import Tensor

from loralab.update import Dense, Update, each


def row_norms(base: Any, u: Update | Dense) -> Tensor:
    """The norms |W_i + B_i A| (..., out) of the rows; a dense update is added to the weight first."""
    if isinstance(u, Dense):
        W = base.dense()
        V: Tensor = W.to(torch.promote_types(W.dtype, torch.float32)) + u.D  # (..., out, in)
        return V.square().sum(-1).clamp_min(1e-12).sqrt()
    A, B = u.A, u.B
    WA = base.linear(A).mT  # (..., out, r)
    gram = A @ A.mT  # (..., r, r)
    twice = torch.addmm(WA, B, gram, beta=2) if A.ndim == 2 else 2 * WA + B @ gram  # (..., out, r)
    squares: Tensor = base.square_norms() + (twice * B).sum(-1)  # (..., out)
    return squares.clamp_min(1e-12).sqrt()


def gain(m: Tensor, base: Any, u: Update | Dense, exact: bool = False) -> Tensor:
    """g = m / |W + B A| (..., out). The norm is a constant to autograd (section 4.3 of the paper) unless `exact`."""
    if not exact:
        u = each(Tensor.detach, u)
    return m / row_norms(base, u)
