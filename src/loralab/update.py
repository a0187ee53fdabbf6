"""The normal form every method lowers to: y = g * (W x + B A x) + b.

W (out, in) is frozen, A (r, in) and B (out, r) carry the scaling, g (out,) is absent without a gain.
A leading axis on A, B and g means one adapter per row of the batch; matrix products broadcast over it.
Forward, merge, mixed batches and export are written here once, for the triple.

An update that is no low-rank product is a `Dense` instead: y = g * (W x + D x) + b. The two types differ in two
products, and the functions below are the same for both.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F


class Base(Protocol):
    """How a frozen layer is kept (see `stores/` and `kinds/`)."""

    bias: Tensor | None  # (out,)

    def __call__(self, x: Tensor) -> Tensor: ...  # W x + b: (..., in) -> (..., out)


class Update(NamedTuple):
    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r)   scaling folded in
    gain: Tensor | None = None  # (..., out)

    def times(self, x: Tensor) -> Tensor:
        """B A x: (..., t, in) -> (..., t, out)."""
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if A.ndim == 2:  # as two calls, since a small step waits for Python
            return F.linear(F.linear(x, A), B)
        return x @ A.mT @ B.mT

    def matrix(self) -> Tensor:
        """B A (..., out, in)."""
        return self.B @ self.A


class Dense(NamedTuple):
    D: Tensor  # (..., out, in)   scaling folded in
    gain: Tensor | None = None  # (..., out)

    def times(self, x: Tensor) -> Tensor:
        """D x: (..., t, in) -> (..., t, out)."""
        return x @ self.D.mT.to(x.dtype)

    def matrix(self) -> Tensor:
        return self.D


U = TypeVar("U", bound=Update | Dense)


def each(f: Callable[[Tensor], Tensor], u: U) -> U:
    """`u` with `f` on each of its tensors."""
    return type(u)(*(None if t is None else f(t) for t in u))  # type: ignore[arg-type]


def apply(x: Tensor, base: Base, u: Update | Dense, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """g * (W x + B A drop(x)) + b for x (..., t, in); with a leading axis on `u`, x is (rows, t, in)."""
    y = base(x) + u.times(x if drop is None else drop(x))  # (..., t, out)
    return y if u.gain is None else gained(y, base.bias, u.gain)


def gained(y: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
    """g * (y - b) + b for y (..., t, out) and g (..., out); at g = 1 it is y, bit for bit."""
    wide = torch.promote_types(gain.dtype, torch.float32)
    more = (gain.to(wide) - 1).unsqueeze(-2).to(y.dtype)  # (..., 1, out); bfloat16 has no number between 1 and 1.0078
    return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), more)


def merged(W: Tensor, u: Update | Dense) -> Tensor:
    """The dense weight (..., out, in) that acts like `apply`, in W's dtype or wider."""
    V = W + u.matrix()
    return V if u.gain is None else V * u.gain.unsqueeze(-1)


def stack(updates: Sequence[Update | Dense]) -> Update | Dense:
    """K updates as one with a leading axis of K: ranks padded with zeros, absent gains filled with ones.

    One dense update among them makes the result dense.
    """
    return _joined(updates, torch.stack)


def cat(updates: Sequence[Update | Dense]) -> Update | Dense:
    """Updates that have a leading axis each as one, along it; ranks and gains as in `stack`."""
    return updates[0] if len(updates) == 1 else _joined(updates, torch.cat)


def _joined(updates: Sequence[Update | Dense], join: Callable[[list[Tensor]], Tensor]) -> Update | Dense:
    low = [u for u in updates if isinstance(u, Update)]
    if len(low) < len(updates):
        return Dense(join([u.matrix() for u in updates]), _gains(updates, join))  # D (K, out, in)
    rank = max(u.A.shape[-2] for u in low)
    A = join([_pad(u.A, (0, 0, 0, rank - u.A.shape[-2])) for u in low])  # (K, r, in)
    B = join([_pad(u.B, (0, rank - u.B.shape[-1])) for u in low])  # (K, out, r)
    return Update(A, B, _gains(low, join))


def _pad(t: Tensor, more: tuple[int, ...]) -> Tensor:
    return F.pad(t, more) if any(more) else t


def _gains(updates: Sequence[Update | Dense], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    if all(u.gain is None for u in updates):
        return None
    ups = [u.B if isinstance(u, Update) else u.D for u in updates]  # (..., out, ...)
    return join([t.new_ones(t.shape[:-1]) if u.gain is None else u.gain for u, t in zip(updates, ups, strict=True)])


def take(u: Update | Dense, ids: Tensor) -> Update | Dense:
    """The update of each row: `ids` (rows,) index the leading axis."""
    return each(lambda t: t[ids], u)


def by_row(updates: Sequence[Update | Dense], ids: Tensor, in_parts: bool) -> Update | Dense:
    """The stacked updates, one for each part of the batch, if its rows are in equal parts in the order of the updates
    (`in_parts`); else one update for each row, by `ids` (rows,)."""
    return stack(updates) if in_parts else take(stack(updates), ids)


def nothing(out_features: int, in_features: int, like: Tensor) -> Update:
    """The update that changes nothing, for a row whose adapter has no part in a layer."""
    return Update(like.new_zeros(1, in_features), like.new_zeros(out_features, 1))
