"""The normal form every method lowers to: y = g * (W x + B A x) + b.

W (out, in) is frozen, A (r, in) and B (out, r) carry the scaling, g (out,) is absent without a gain.
A leading axis on A, B and g means one adapter per row of the batch; matrix products broadcast over it.
Forward, merge, mixed batches and export are written here once, for the triple.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Base(Protocol):
    """How a frozen layer is kept (see `bases/`)."""

    bias: Tensor | None  # (out,)

    def __call__(self, x: Tensor) -> Tensor: ...  # W x + b: (..., in) -> (..., out)


class Update(NamedTuple):
    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r)   scaling folded in
    gain: Tensor | None = None  # (..., out)


def apply(x: Tensor, base: Base, u: Update, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """g * (W x + B A drop(x)) + b for x (..., t, in); with a leading axis on `u`, x is (rows, t, in)."""
    h = (x if drop is None else drop(x)) @ u.A.mT.to(x.dtype)  # (..., t, r)
    y = base(x) + h @ u.B.mT.to(x.dtype)  # (..., t, out)
    if u.gain is None:
        return y
    g = u.gain.unsqueeze(-2).to(y.dtype)  # (..., 1, out)
    if base.bias is None:
        return y * g
    # y holds the bias already, so (1 - g) b is what is missing; at g = 1 this is y, bit for bit
    return torch.addcmul((1 - g) * base.bias.to(y.dtype), y, g)


def merged(W: Tensor, u: Update) -> Tensor:
    """The dense weight (..., out, in) that acts like `apply`, in W's dtype or wider."""
    V = W + u.B @ u.A
    return V if u.gain is None else V * u.gain.unsqueeze(-1)


def stack(updates: Sequence[Update]) -> Update:
    """K updates as one with a leading axis of K: ranks padded with zeros, absent gains filled with ones."""
    rank = max(u.A.shape[-2] for u in updates)
    A = torch.stack([F.pad(u.A, (0, 0, 0, rank - u.A.shape[-2])) for u in updates])  # (K, r, in)
    B = torch.stack([F.pad(u.B, (0, rank - u.B.shape[-1])) for u in updates])  # (K, out, r)
    if all(u.gain is None for u in updates):
        return Update(A, B)
    gains = [u.B.new_ones(u.B.shape[-2]) if u.gain is None else u.gain for u in updates]
    return Update(A, B, torch.stack(gains))  # gain (K, out)


def take(u: Update, ids: Tensor) -> Update:
    """The update of each row: `ids` (rows,) index the leading axis."""
    return Update(u.A[ids], u.B[ids], None if u.gain is None else u.gain[ids])


def nothing(out_features: int, in_features: int, like: Tensor) -> Update:
    """The update that changes nothing, for a row whose adapter has no part in a layer."""
    return Update(like.new_zeros(1, in_features), like.new_zeros(out_features, 1))
