"""Linear layers that read the same x, as one product: y = g * (W x + B A x) + b for all of them, forward and backward.

W (out, in) of q, k and v is one matrix. Their low-rank parts are one pair too, A stacked and B on a block diagonal,
with the bias as the first column of B, for which h = A x is 1. That makes three products where there were a dozen.
With a gain z = W x + B A x + b / g, so that y = z + (g - 1) z needs one pass, and g - 1 keeps its digits in bfloat16.
A leading axis K of the updates means K adapters, each with its own equal part of the rows of x.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.active import Active
from loralab.layer import Adapted
from loralab.stores import keep
from loralab.stores.float import Float
from loralab.update import Update

Low = Update | None


class Joined(NamedTuple):
    """The updates of all layers as one. K stands for the leading axis, absent for a single adapter."""

    A: Tensor  # (K, 1 + r, in)   the first row is zero
    B: Tensor  # (K, out, 1 + r)  the first column is the bias; column by column in memory, as products read it fastest
    more: Tensor | None  # (K, 1, out)   g - 1


class Product:
    """`modules` are linear layers of one input size, adapted or not."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.bases = [module.base if isinstance(module, Adapted) else keep(module) for module in modules]
        self.adapted = {i: module for i, module in enumerate(modules) if isinstance(module, Adapted)}
        self.outs = [base.out_features for base in self.bases]
        self.starts = [0, *accumulate(self.outs)]
        self.last: tuple[list[Joined], Joined] | None = None  # the updates stacked last, and their stack

    def adjoin(self) -> None:
        """Puts float weights side by side in one storage, so that `weight` is a view; the parameters stay the same."""
        if len(self.bases) > 1 and all(isinstance(base, Float) for base in self.bases):
            whole = torch.cat([base.weight.detach() for base in self.bases])
            for base, part in zip(self.bases, whole.split(self.outs), strict=True):
                base.weight.data = part

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) of all layers: a view of float weights that lie side by side, else made anew."""
        bases = self.bases
        parts = [base.weight.detach() if isinstance(base, Float) else base.decoded(dtype) for base in bases]
        if len(parts) == 1:
            return parts[0].to(dtype)
        first = parts[0]
        whole, step = first.untyped_storage()._cdata, first.shape[1]
        beside = all(
            w.untyped_storage()._cdata == whole and w.storage_offset() == first.storage_offset() + step * at
            for w, at in zip(parts, self.starts[:-1], strict=True)
        )
        if beside and first.dtype == dtype:
            return first.as_strided((self.starts[-1], first.shape[1]), (first.shape[1], 1))
        return torch.cat(parts).to(dtype)

    def join(self, lows: Sequence[Low], dtype: torch.dtype, always: bool = False) -> Joined | None:
        """The updates as one; None where nothing is live, unless `always`, and there is a bias alone or none."""
        live = [low for low in lows if low is not None]
        if not live and not always:
            return None
        like = live[0].A if live else torch.empty(0, device=self._device())
        lead = max((low.A.shape[:-2] for low in live), key=len, default=torch.Size())  # () or (K,)
        size, n_in, n_out = 1 + sum(low.A.shape[-2] for low in live), self.bases[0].in_features, self.starts[-1]
        A = like.new_zeros(*lead, size, n_in, dtype=dtype)
        B = like.new_zeros(*lead, size, n_out, dtype=dtype).mT
        gained = any(low.gain is not None for low in live)
        more = like.new_zeros(*lead, n_out) if gained else None
        row = 1
        for low, base, start, out in zip(lows, self.bases, self.starts, self.outs, strict=False):
            bias = None if base.bias is None else base.bias.detach()
            rows = slice(start, start + out)
            if low is not None:
                r = low.A.shape[-2]
                A[..., row : row + r, :] = low.A
                B[..., rows, row : row + r] = low.B
                row += r
                if low.gain is not None:
                    assert more is not None
                    more[..., rows] = low.gain - 1
                    bias = None if bias is None else bias / low.gain
            if bias is not None:
                B[..., rows, 0] = bias
        return Joined(A, B, None if more is None else more.unsqueeze(-2).to(dtype))

    def _device(self) -> torch.device:
        return next(iter(self.adapted.values())).device

    def kept(self, active: Active, dtype: torch.dtype) -> Joined | None:
        """`join` of what is live where nothing learns: done once for each adapter, and stacked for a mixed batch."""
        if not any(name in layer.recipes for layer in self.adapted.values() for name in active.names):
            return None
        each = [self._one(name, active.chosen.get(name), dtype) for name in active.names]
        if active.ids is None:
            return each[0]
        each = each if active.equal_parts else [each[i] for i in active.ids.tolist()]
        if self.last is None or len(self.last[0]) != len(each) or any(map(is_not, self.last[0], each)):
            self.last = each, _stacked(each)
        return self.last[1]

    def _one(self, name: str, chosen: Any, dtype: torch.dtype) -> Joined:
        def lower(i: int) -> Low:
            there = i in self.adapted and name in self.adapted[i].recipes
            return self.adapted[i].lower(name) if there else None  # type: ignore[return-value]

        def made() -> Joined | None:
            return self.join([lower(i) for i in range(len(self.bases))], dtype, always=True)

        layers = list(self.adapted.values())
        of = [t for layer in layers for t in layer.made_from(name)]
        return layers[0].joined.get((name, chosen, dtype), of, made)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, joined: Joined | None) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """x (n, in) -> y (n, out), and what backward needs beside x and `joined`: h, z."""
        W = self.weight(x.dtype)
        if joined is None:
            return F.linear(x, W, self._bias(x.dtype)), (None, None)
        z = x @ W.mT  # (n, out)
        h = _split(x, joined.A) @ joined.A.mT  # (K, m, 1 + r)
        h[..., 0] = 1
        _add_product(_split(z, joined.A), h, joined.B.mT)
        if joined.more is None:
            return z, (h, None)
        parts = _split(z, joined.A)
        return torch.addcmul(parts, parts, joined.more).view_as(z), (h, z)

    def backward(
        self, dy: Tensor, x: Tensor | None, lows: Sequence[Low], kept: Sequence[Tensor | None], to_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dy (n, out) -> dx (n, in) or None, and the gradients of A, B and gain of every layer, in float32 or wider."""
        h, z, A, B, more = kept
        none: list[Tensor | None] = [None] * (3 * len(self.bases))
        if A is None or B is None or h is None:
            return (dy @ self.weight(dy.dtype) if to_x else None), none
        dz, of_gain = dy, None
        if more is not None and z is not None:
            parts = _split(dy, A)
            dz = torch.addcmul(parts, parts, more).view_as(dy)
            of_gain = (parts * _split(z, A)).sum(-2, dtype=torch.promote_types(dy.dtype, torch.float32))  # (K, out)
        dz3 = _split(dz, A)  # (K, m, out)
        dh = dz3 @ B  # (K, m, 1 + r)
        dx = None
        if to_x:
            dx = dz @ self.weight(dz.dtype)
            _add_product(_split(dx, A), dh, A)
        dA = None if x is None else dh.mT @ _split(x, A)  # (K, 1 + r, in)
        dB = (h.mT @ dz3).mT  # (K, out, 1 + r)
        return dx, self._parts(lows, dA, dB, of_gain, B)

    def _parts(
        self, lows: Sequence[Low], dA: Tensor | None, dB: Tensor, of_gain: Tensor | None, B: Tensor
    ) -> list[Tensor | None]:
        """The gradients of the single layers from those of the joined update."""
        out: list[Tensor | None] = []
        row = 1
        for low, start, n_out in zip(lows, self.starts, self.outs, strict=False):
            if low is None:
                out += [None, None, None]
                continue
            rows, r = slice(start, start + n_out), low.A.shape[-2]
            out.append(None if dA is None else dA[..., row : row + r, :].to(low.A.dtype))
            out.append(dB[..., rows, row : row + r].to(low.B.dtype))
            if low.gain is None or of_gain is None:
                out.append(None)
            else:  # z holds b / g, which does not depend on g; the first column of dB is the sum of g * dy
                spare = B[..., rows, 0] * dB[..., rows, 0] / low.gain
                out.append((of_gain[..., rows] - spare).to(low.gain.dtype))
            row += r
        return out

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        some = next((base.bias for base in self.bases if base.bias is not None), None)
        if some is None:
            return None
        zero = [some.new_zeros(out) for out in self.outs]
        return torch.cat([z if base.bias is None else base.bias for z, base in zip(zero, self.bases, strict=True)]).to(
            dtype
        )


def _stacked(each: Sequence[Joined]) -> Joined:
    """With a leading axis: ranks padded with zeros, absent gains as g - 1 = 0."""
    size = max(j.A.shape[-2] for j in each)
    A = torch.stack([_pad(j.A, size) for j in each])
    B = torch.stack([_pad(j.B.mT, size) for j in each]).mT
    if all(j.more is None for j in each):
        return Joined(A, B, None)
    none = A.new_zeros(1, B.shape[-2])
    return Joined(A, B, torch.stack([none if j.more is None else j.more for j in each]))


def _pad(t: Tensor, rows: int) -> Tensor:
    return t if len(t) == rows else F.pad(t, (0, 0, 0, rows - len(t)))


def _split(x: Tensor, A: Tensor) -> Tensor:
    """x (n, d) as (K, n / K, d) where A has a leading axis K."""
    return x.view(len(A), -1, x.shape[-1]) if A.ndim == 3 else x


def _add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y += a b in place, with a leading axis on all three or on none."""
    if y.ndim == 3:
        y.baddbmm_(a, b)
    else:
        y.addmm_(a, b)
