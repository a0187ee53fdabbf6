"""What an adapter learned: the spectrum of each layer's update, its directions, and how they lie to W and to others.

D = B A, or the dense update itself: what is added to W before a gain. D = U diag(s) V^T with U (out, k), V (in, k) and
s (k,) falling; of a low-rank update it comes from two thin QRs and the SVD of an (r, r) matrix, so D is never formed.

effective rank   exp(-sum p log p) with p = s / sum(s): how many equal singular values would be as spread out
                 (Roy and Vetterli, 2007); 0 for an update of zero
share            |D|^2 of the layer over that of all layers, |.| the Frobenius norm
similarity       phi(i, j) = |U_i^T X_j|^2 / min(i, j) from 0 to 1 for the first i columns of one and the first j of
                 the other (Hu et al., 2021, section 7.2); of random directions in n dimensions it is max(i, j) / n
amplification    |D| / |U^T W V| over the first `top` directions (section 7.3), and how |U^T W V| compares with the
                 root mean square of random directions, top |W| / sqrt(out in)

A stack of experts is one layer: its values are those of all experts, each expert has its own directions, similarity is
the mean over experts, and amplification is that of the block matrix with an expert in each block.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loralab.adapters import Adapters, load, read
from loralab.algebra import lowered, singular
from loralab.coverage import kind, summary
from loralab.errors import UserError
from loralab.inputs import evaluating
from loralab.kinds import is_product, keep
from loralab.merging import MERGE_DTYPES
from loralab.update import Dense, Update, each

TOP = 8  # directions to compare by default: the usual rank


class Layer(NamedTuple):
    update: Update | Dense  # its gain is known only over a base
    weight: Tensor | None  # W (out, in) of that base, or (n, out, in) of n experts

    def experts(self) -> "list[Layer]":
        """A layer for each expert of a stack; the layer itself where it is none."""
        if (first := self.update[0]).ndim == 2:  # A or D
            return [self]
        W: Any = [None] * len(first) if self.weight is None else self.weight
        return [Layer(each(lambda t, e=e: t[e], self.update), W[e]) for e in range(len(first))]  # type: ignore[misc]


class Directions(NamedTuple):
    U: Tensor  # (out, k)   what the update writes
    s: Tensor  # (k,)       falling
    V: Tensor  # (in, k)    what it reads


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one layer's update and numbers made from it; the last three need a base."""

    path: str
    shape: tuple[int, int]
    values: list[float]  # singular values, falling
    norm: float
    share: float
    effective_rank: float
    gain: float | None = None  # largest |g - 1| of a gain
    amplification: float | None = None
    along: float | None = None  # |U^T W V| over that of random directions


@torch.no_grad()
def updates(folder: Path | str, model: nn.Module | None = None) -> dict[str, Layer]:
    """Path -> the update of every linear layer that the adapter of `folder` changes.

    With `model` (a fresh base, which is changed) every method lowers, full fine-tuning too; without one only what
    holds its A and B, and a gain stays unknown. An adapter that changes no weight (head, bitfit) has none.
    Raises UserError where a base is needed, and as `loralab.load` does.
    """
    file = read(folder)
    if model is None:
        return {path: Layer(update, None) for path, update in lowered(file, folder)}
    before = {p: keep(m).dense().clone() for p, m in model.named_modules() if is_product(m)}
    handle = load(model, folder)
    name = handle.only(None)
    spec = handle.spec(name)
    adapted = {p: Layer(handle.layers[p].lower(name), handle.layers[p].base.dense()) for p in spec.paths}
    learned = [key.removesuffix(".weight") for key in spec.base_names if key.endswith(".weight")]
    in_place = {p: Layer(Dense(_weight(model, p) - before[p]), before[p]) for p in learned if p in before}
    return adapted | in_place


def _weight(model: nn.Module, path: str) -> Tensor:
    weight: Tensor = keep(model.get_submodule(path)).dense()
    return weight


@torch.no_grad()
def directions(u: Update | Dense) -> Directions:
    """The singular value decomposition of an update, in float64, without forming the product of a low-rank one."""
    if isinstance(u, Dense):
        U, s, Vh = torch.linalg.svd(u.D.double(), full_matrices=False)
        return Directions(U, s, Vh.mT)
    return Directions(*singular(u))


def effective_rank(s: Tensor) -> float:
    """exp(entropy) of the singular values s (k,) as shares of their sum; 0 for an update of zero."""
    p = s[s > 0] / s.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def leading(d: Directions, top: int) -> Directions:
    """The first `top` directions, or fewer where the rest of the spectrum is rounding."""
    eps = torch.finfo(torch.float32).eps  # an adapter is stored in float32
    k = min(top, int((d.s > len(d.s) * eps * d.s.max()).sum()))
    return Directions(d.U[:, :k], d.s[:k], d.V[:, :k])


def similarity(X: Tensor, Y: Tensor) -> Tensor:
    """phi (p, q) of the first i columns of X (n, p) and the first j of Y (n, q), both orthonormal."""
    both = (X.mT @ Y).square().cumsum(0).cumsum(1)  # (p, q): |X_i^T Y_j|^2
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return both / torch.minimum(i[:, None], j)


def amplification(blocks: Sequence[tuple[Directions, Tensor]]) -> tuple[float | None, float | None]:
    """(|D| / |U^T W V|, |U^T W V| over that of random directions), of the directions given in W (out, in) of each.

    What would be divided by 0, as where W is zero, is None.
    """
    wide = [(d, W.double()) for d, W in blocks]
    along = math.hypot(*(float((d.U.mT @ W @ d.V).norm()) for d, W in wide))
    random = math.hypot(*(len(d.s) * float(W.norm()) / math.sqrt(W.numel()) for d, W in wide))
    norm = math.hypot(*(float(d.s.norm()) for d, _ in blocks))
    return norm / along if along else None, along / random if random else None


def spectra(layers: Mapping[str, Layer], top: int = TOP) -> list[Spectrum]:
    """One `Spectrum` a layer, in the order of the layers."""
    by_path = {path: [directions(one.update) for one in layer.experts()] for path, layer in layers.items()}
    whole = sum(float(d.s.square().sum()) for ds in by_path.values() for d in ds) or 1.0
    return [_spectrum(path, layers[path], ds, whole, top) for path, ds in by_path.items()]


def _spectrum(path: str, layer: Layer, ds: Sequence[Directions], whole: float, top: int) -> Spectrum:
    s = torch.cat([d.s for d in ds]).sort(descending=True).values  # (k,), of a stack (n k,)
    norm, gain, first = float(s.norm()), layer.update.gain, [leading(d, top) for d in ds]
    weights = [one.weight for one in layer.experts()]
    known = [(d, W) for d, W in zip(first, weights, strict=True) if W is not None and len(d.s)]
    amplified = amplification(known) if known else (None, None)
    off = None if gain is None else float((gain - 1).abs().max())
    shape = (ds[0].U.shape[0], ds[0].V.shape[0])
    return Spectrum(path, shape, s.tolist(), norm, norm**2 / whole, effective_rank(s), off, *amplified)


@dataclass(frozen=True)
class Overlap:
    """Similarity of the directions of two updates of one layer."""

    path: str
    reads: Tensor  # (i, j): phi of V and V, what the updates read of x
    writes: Tensor  # (i, j): phi of U and U, what they write
    chance: tuple[float, float]  # phi(i, i) of random directions over i: 1 / in, 1 / out


def overlaps(one: Mapping[str, Layer], other: Mapping[str, Layer], top: int = TOP) -> list[Overlap]:
    """One `Overlap` for every layer that both change and neither leaves at zero.

    Raises UserError if the two have no layer in common, or belong to different bases.
    """
    if not (both := [path for path in one if path in other]):
        layers = " and ".join(summary(list(paths)) or "none" for paths in (one, other))
        raise UserError(f"the two adapters change no layer in common: {layers}")
    out = []
    for path in both:
        pairs = [[leading(directions(e.update), top) for e in layers[path].experts()] for layers in (one, other)]
        sizes = [f"{len(ds)} x " * (len(ds) > 1) + f"{len(ds[0].U)} x {len(ds[0].V)}" for ds in pairs]
        if sizes[0] != sizes[1]:
            raise UserError(f"{path} is {' and '.join(sizes)}: the two adapters belong to different bases")
        if found := [(a, b) for a, b in zip(*pairs, strict=True) if len(a.s) and len(b.s)]:
            reads = mean([similarity(a.V, b.V) for a, b in found])
            writes = mean([similarity(a.U, b.U) for a, b in found])
            first = found[0][0]
            out.append(Overlap(path, reads, writes, (1 / len(first.V), 1 / len(first.U))))
    return out


def mean(matrices: list[Tensor]) -> Tensor:
    """The mean of matrices of different sizes, each entry over those that have it."""
    rows, columns = (max(m.shape[side] for m in matrices) for side in (0, 1))
    padded = torch.full((len(matrices), rows, columns), torch.nan, dtype=matrices[0].dtype)
    for page, m in zip(padded, matrices, strict=True):
        page[: m.shape[0], : m.shape[1]] = m
    return padded.nanmean(0)


def short(path: str) -> str:
    """encoder.layer.3.attention.self.query -> 3 attention.self.query."""
    block = re.search(r"\.(\d+)\.", path)
    return f"{block[1]} {kind(path)}" if block else path


# ---- what a merge costs ----------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_errors(handle: Adapters, name: str | None, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Route -> largest difference of an output from the adapted model's on `batch`, in evaluation mode.

    Routes are the dtypes of `merge`; over a quantized base also its store, which no merge takes: the merged weight
    quantized again, for comparison.
    """
    name = handle.only(name)
    with handle.use(name), evaluating(handle.model):
        expected = _output(handle.model, batch)
    errors = {}
    for route in MERGE_DTYPES:
        errors[route] = _distance(handle.merge(name, route), batch, expected)
    stores = {path: layer.store for path, layer in handle.layers.items() if layer.store not in (None, *MERGE_DTYPES)}
    if stores:
        plain = handle.merge(name, "float32")
        for path, store in stores.items():
            plain.set_submodule(path, keep(plain.get_submodule(path), store))
        errors[f"{' and '.join(sorted(set(map(str, stores.values()))))}, quantized again"] = _distance(
            plain, batch, expected
        )
    return errors


def _distance(plain: nn.Module, batch: Mapping[str, Tensor], expected: Tensor) -> float:
    return float((_output(plain.eval(), batch) - expected).abs().max())


def _output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    out: Any = model(**batch)
    return (out if isinstance(out, Tensor) else out[0]).float()
