"""Linear layers of one input as one product: y = g * (W x + B A x) + b for all of them, forward and backward.

W (out, in) of q, k and v is one matrix. Their low-rank updates are one pair too: A stacked, B on a block diagonal.
Without a gain the bias is the first column of B, and h = A x is 1 there, so adding it costs no pass of its own. That
makes three products where there were a dozen. With a gain y = z + (g - 1) z + b for z = W x + B A x: g - 1 keeps its
digits in bfloat16, and nothing is divided by g, which may be 0. A leading axis K of the updates means K adapters, each
with its own equal part of the rows of x.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from loralab.active import Active
from loralab.layer import Adapted
from loralab.stores.float import Float
from loralab.update import Update

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> what numpy can hold it as
_WHOLE: WeakValueDictionary[int, NDArray[Any]] = WeakValueDictionary()  # address -> weights that lie side by side there


class JoinedUpdate(NamedTuple):
    """The updates of all layers as one. K stands for the leading axis, absent for a single adapter."""

    A: Tensor  # (K, 1 + r, in)   the first row is zero
    B: Tensor  # (K, out, 1 + r)  the first column is the bias; column by column in memory, as products read it fastest
    gain_less_1: Tensor | None = None  # (K, 1, out)   g - 1
    bias: Tensor | None = None  # (K, 1, out)   bias of layers with a gain, which comes after it


class Saved(NamedTuple):
    """What the backward pass of a joined product needs beside its input; all None where no adapter is active."""

    h: Tensor | None = None  # (K, m, 1 + r)   A x, m rows of x for each of K adapters
    z: Tensor | None = None  # (n, out)   W x + B A x, where there is a gain
    A: Tensor | None = None
    B: Tensor | None = None
    gain_less_1: Tensor | None = None


class JoinedLinear:
    """Linear layers of one input size, adapted or not, computed as one. Reads their tensors anew at each call."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.bases: list[Any] = [module.base if isinstance(module, Adapted) else module for module in modules]
        self.adapted = {i: module for i, module in enumerate(modules) if isinstance(module, Adapted)}
        self.outs = [base.out_features for base in self.bases]
        self.starts = [0, *accumulate(self.outs)]
        self.whole: Tensor | None = None  # (out, in) over the memory of all weights, where they lie side by side

    # ---- W and b -------------------------------------------------------------------------------------------------

    def put_side_by_side(self) -> None:
        """Put float weights beside each other in memory, so that one tensor reads them all; parameters stay the same.

        Each keeps a storage of its own: what saves models takes tensors of one storage for tied and writes one of them.
        """
        if len(self.bases) < 2 or not all(isinstance(base, Float | nn.Linear) for base in self.bases):
            return
        parts = [base.weight.detach() for base in self.bases]
        if isinstance(parts[0], FakeTensor):  # an estimate of memory: no values, and no addresses
            self.whole = torch.cat(parts)
            for base, part in zip(self.bases, self.whole.split(self.outs), strict=True):
                base.weight.data = part
            return
        if not all(_is_movable(w, parts[0]) for w in parts):
            return
        with torch.inference_mode(False):  # the first call may be one without gradients
            if not self._holds(parts, bits := _WHOLE.get(parts[0].data_ptr())):
                bits = torch.cat(parts).view(BITS[parts[0].itemsize]).numpy()  # (out, in)
                _WHOLE[bits.ctypes.data] = bits
                for base, start, out in zip(self.bases, self.starts, self.outs, strict=False):
                    base.weight.data = torch.from_numpy(bits[start : start + out]).view(base.weight.dtype)
            self.whole = torch.from_numpy(bits).view(parts[0].dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) of all layers: one tensor over float weights that lie side by side, else made anew."""
        parts = [
            base.weight.detach() if isinstance(base, Float | nn.Linear) else base.decoded(dtype) for base in self.bases
        ]
        if len(parts) == 1:
            return parts[0].to(dtype)
        whole = self.whole
        if whole is not None and (isinstance(whole, FakeTensor) or self._lie_in(parts, whole.data_ptr(), whole.dtype)):
            return whole.to(dtype)
        return torch.cat([w.to(dtype) for w in parts])

    def _holds(self, parts: Sequence[Tensor], found: Any) -> bool:
        """Whether the weights (out_i, in) are the parts of an array (out, in) of their bits, and all of it."""
        if found is None or found.shape != (self.starts[-1], parts[0].shape[1]):
            return False
        return found.itemsize == parts[0].itemsize and self._lie_in(parts, found.ctypes.data, parts[0].dtype)

    def _lie_in(self, parts: Sequence[Tensor], address: int, dtype: torch.dtype) -> bool:
        """Whether the weights (out_i, in), all of that dtype, follow each other in memory from an address on."""
        width = parts[0].shape[1]
        return all(
            w.dtype == dtype and w.stride() == (width, 1) and w.data_ptr() == address + start * width * dtype.itemsize
            for w, start in zip(parts, self.starts[:-1], strict=True)
        )

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """b (out,) of all layers, with zeros for a layer that has none; None if no layer has one."""
        some = next((base.bias for base in self.bases if base.bias is not None), None)
        if some is None:
            return None
        biases = [some.new_zeros(out) for out in self.outs]
        biases = [zero if base.bias is None else base.bias for zero, base in zip(biases, self.bases, strict=True)]
        return torch.cat(biases).to(dtype)

    # ---- updates -------------------------------------------------------------------------------------------------

    def join(self, updates: Sequence[Update | None], dtype: torch.dtype, always: bool = False) -> JoinedUpdate | None:
        """The updates of the layers as one; None if no layer has one, unless `always`, which joins the biases alone."""
        present = [u for u in updates if u is not None]
        if not present and not always:
            return None
        like = present[0].A if present else torch.empty(0, device=next(iter(self.adapted.values())).device)
        lead = max((u.A.shape[:-2] for u in present), key=len, default=torch.Size())  # () or (K,)
        size, n_in, n_out = 1 + sum(u.A.shape[-2] for u in present), self.bases[0].in_features, self.starts[-1]
        has_gain = any(u.gain is not None for u in present)
        A = like.new_zeros(*lead, size, n_in, dtype=dtype)  # (K, 1 + r, in)
        B = like.new_zeros(*lead, size, n_out, dtype=dtype).mT  # (K, out, 1 + r)
        gain_less_1 = like.new_zeros(*lead, 1, n_out, dtype=dtype) if has_gain else None
        bias_after = like.new_zeros(*lead, 1, n_out, dtype=dtype) if has_gain else None
        row = 1
        for u, base, start, out in zip(updates, self.bases, self.starts, self.outs, strict=False):
            rows = slice(start, start + out)
            if u is not None:
                r = u.A.shape[-2]
                A[..., row : row + r, :] = u.A
                B[..., rows, row : row + r] = u.B
                row += r
                if u.gain is not None and gain_less_1 is not None:
                    gain_less_1[..., 0, rows] = u.gain - 1
            if base.bias is not None and bias_after is not None and u is not None and u.gain is not None:
                bias_after[..., 0, rows] = base.bias.detach()
            elif base.bias is not None:
                B[..., rows, 0] = base.bias.detach()
        return JoinedUpdate(A, B, gain_less_1, bias_after)

    def active_update(self, active: Active, dtype: torch.dtype) -> JoinedUpdate | None:
        """`join` of what is active where nothing learns, from the caches of the first adapted layer.

        An adapter is joined once, and a batch of several adapters stacks what each was joined to.
        """
        layers = list(self.adapted.values())
        if not any(name in layer.recipes for layer in layers for name in active.names):
            return None
        if active.ids is None:
            return self._of_one(active.names[0], active, dtype)
        order = range(len(active.names)) if active.equal_parts else active.ids.tolist()
        key = ("joined", active.names, tuple(order), tuple(map(active.chosen.get, active.names)), dtype)
        made_from = [t for name in active.names for t in self._made_from(name)]

        def stacked() -> JoinedUpdate:
            each = [self._of_one(name, active, dtype) for name in active.names]
            return _stack([each[i] for i in order])

        return layers[0].stacked.get(key, made_from, stacked)  # type: ignore[no-any-return]

    def _of_one(self, name: str, active: Active, dtype: torch.dtype) -> JoinedUpdate:
        """`join` of one adapter, cached."""

        def lowered(i: int) -> Update | None:
            there = i in self.adapted and name in self.adapted[i].recipes
            return self.adapted[i].lower(name) if there else None  # type: ignore[return-value]

        def joined() -> JoinedUpdate | None:
            return self.join([lowered(i) for i in range(len(self.bases))], dtype, always=True)

        cache = next(iter(self.adapted.values())).joined
        return cache.get((name, active.chosen.get(name), dtype), self._made_from(name), joined)  # type: ignore[no-any-return]

    def _made_from(self, name: str) -> list[Tensor]:
        """Every tensor that the joined update of an adapter is computed from: the biases of all layers too."""
        biases = [base.bias for base in self.bases if base.bias is not None]
        return [*biases, *(t for layer in self.adapted.values() for t in layer.made_from(name))]

    # ---- forward and backward ------------------------------------------------------------------------------------

    def forward(self, x: Tensor, joined: JoinedUpdate | None) -> tuple[Tensor, Saved]:
        """x (n, in) -> y (n, out), and what backward needs beside x."""
        W = self.weight(x.dtype)  # (out, in)
        if joined is None:
            return F.linear(x, W, self._bias(x.dtype)), Saved()
        A, B, gain_less_1, bias = joined
        z = x @ W.mT  # (n, out)
        h = _split(x, A) @ A.mT  # (K, m, 1 + r)
        h[..., 0] = 1
        parts = _split(z, A)  # (K, m, out)
        _add_product(parts, h, B.mT)
        if gain_less_1 is None or bias is None:
            return z, Saved(h, None, A, B)
        y = torch.addcmul(parts, parts, gain_less_1).add_(bias)  # (K, m, out)
        return y.view_as(z), Saved(h, z, A, B, gain_less_1)

    def backward(
        self, dy: Tensor, x: Tensor | None, updates: Sequence[Update | None], saved: Saved, to_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dy (n, out) -> dx (n, in), None unless `to_x`, and the gradients of A, B and gain of each layer in turn.

        `x` is None where no A learns. The gain's gradient is summed in float32 or wider.
        """
        h, z, A, B, gain_less_1 = saved
        if A is None or B is None or h is None:
            return (dy @ self.weight(dy.dtype) if to_x else None), [None] * (3 * len(self.bases))
        dz, dgain = dy, None
        if gain_less_1 is not None and z is not None:
            parts = _split(dy, A)  # (K, m, out)
            dz = torch.addcmul(parts, parts, gain_less_1).view_as(dy)  # (n, out)
            dgain = (parts * _split(z, A)).sum(-2, dtype=torch.promote_types(dy.dtype, torch.float32))  # (K, out)
        dz_parts = _split(dz, A)  # (K, m, out)
        dh = dz_parts @ B  # (K, m, 1 + r)
        dx = None
        if to_x:
            dx = dz @ self.weight(dz.dtype)  # (n, in)
            _add_product(_split(dx, A), dh, A)
        dA = None if x is None else dh.mT @ _split(x, A)  # (K, 1 + r, in)
        dB = (h.mT @ dz_parts).mT  # (K, out, 1 + r)
        return dx, self._of_each(updates, dA, dB, dgain)

    def _of_each(
        self, updates: Sequence[Update | None], dA: Tensor | None, dB: Tensor, dgain: Tensor | None
    ) -> list[Tensor | None]:
        """The gradients of A, B and gain of each layer, cut from those of the joined update."""
        out: list[Tensor | None] = []
        row = 1
        for u, start, n_out in zip(updates, self.starts, self.outs, strict=False):
            if u is None:
                out += [None, None, None]
                continue
            rows, r = slice(start, start + n_out), u.A.shape[-2]
            out.append(None if dA is None else dA[..., row : row + r, :].to(u.A.dtype))  # (K, r, in)
            out.append(dB[..., rows, row : row + r].to(u.B.dtype))  # (K, out_i, r)
            out.append(None if u.gain is None or dgain is None else dgain[..., rows].to(u.gain.dtype))  # (K, out_i)
            row += r
        return out


def _is_movable(w: Tensor, first: Tensor) -> bool:
    """Whether a weight may get another place in memory: a plain one of this process, which is alone in its storage."""
    plain = type(w) is Tensor and w.device.type == "cpu" and w.itemsize in BITS
    return plain and w.dtype == first.dtype and not w.is_shared() and w.untyped_storage().nbytes() == w.nbytes


def by_product(flat: Sequence[Tensor | None], products: Sequence[JoinedLinear]) -> list[list[Update | None]]:
    """The updates of each product's layers, from A, B and gain of all layers in the order of the products."""
    updates = iter(
        None if (A := flat[i]) is None else Update(A, flat[i + 1], flat[i + 2])  # type: ignore[arg-type]
        for i in range(0, len(flat), 3)
    )
    return [[next(updates) for _ in product.bases] for product in products]


def _stack(each: Sequence[JoinedUpdate]) -> JoinedUpdate:
    """Updates with a leading axis K: ranks padded with zeros, absent gains as g - 1 = 0, their bias left in B."""
    size = max(j.A.shape[-2] for j in each)
    A = torch.stack([_pad(j.A, size) for j in each])  # (K, 1 + r, in)
    B = torch.stack([_pad(j.B.mT, size) for j in each]).mT  # (K, out, 1 + r)
    if all(j.gain_less_1 is None for j in each):
        return JoinedUpdate(A, B)
    zero = A.new_zeros(1, B.shape[-2])  # (1, out)
    gains = torch.stack([zero if j.gain_less_1 is None else j.gain_less_1 for j in each])  # (K, 1, out)
    return JoinedUpdate(A, B, gains, torch.stack([zero if j.bias is None else j.bias for j in each]))


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
