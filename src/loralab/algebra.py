"""Algebra of adapters: weighted sums, differences, multiples, and fewer ranks, of folders or of a model's adapters.

Each adapter adds D_i = B_i A_i (out, in) to a weight, and the result is a LoRA of scaling 1 for

exact      D = sum w_i D_i, as A = [A_1; A_2; ...] and B = [w_1 B_1, w_2 B_2, ...]: no error, ranks add up
magnitude  the sum, each D_i at the `density` of its largest values
dare       the sum, each value of D_i kept with probability `density` and divided by it (Yu et al., 2024)
ties       each D_i trimmed as in magnitude; per value the sign of the larger total, and the weighted sum of the D_i
           of that sign, divided by their number (Yadav et al., 2023)

A `rank` cuts the result to its best one by SVD, and the error is said: |D - D_r| / |D|, |.| the Frobenius norm. PEFT's
`linear` adds A and B by themselves, so that B A has the cross terms B_i A_j; its error is given beside. In a stack of
experts D, A and B have an axis of experts in front, and each expert is merged and cut by itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from loralab.errors import UserError
from loralab.files import AdapterFile
from loralab.methods.lora import LoRA
from loralab.rankmap import LayerRank, RankMap
from loralab.recipe import recipe
from loralab.schema import listed
from loralab.update import Update

Merge = Callable[[list[Tensor], Sequence[float], float, Generator], Tensor]  # D_i, w_i, density, generator -> D


class Cut(NamedTuple):
    """One layer of a result: its rank, and relative errors of it and of PEFT's `linear`, where that is defined."""

    rank: int
    error: float
    linear: float | None


@dataclass(frozen=True)
class Combined:
    """A combination: the adapter, and what was lost in each layer."""

    file: AdapterFile
    layers: Mapping[str, Cut]
    error: float  # over all layers together


# ---- ways to merge ---------------------------------------------------------------------------------------------------


def _sum(parts: list[Tensor], weights: Sequence[float], density: float, generator: Generator) -> Tensor:
    return sum((w * D for w, D in zip(weights, parts, strict=True)), torch.zeros_like(parts[0]))


def _trimmed(D: Tensor, density: float) -> Tensor:
    """D with the share `density` of its values that are largest, and zeros."""
    count = int(density * D.numel())
    kept = D.abs().flatten().topk(count).indices  # (count,)
    out = torch.zeros_like(D).flatten()
    out[kept] = D.flatten()[kept]
    return out.view_as(D)


def _magnitude(parts: list[Tensor], weights: Sequence[float], density: float, generator: Generator) -> Tensor:
    return _sum([_trimmed(D, density) for D in parts], weights, density, generator)


def _dare(parts: list[Tensor], weights: Sequence[float], density: float, generator: Generator) -> Tensor:
    kept = [torch.rand(D.shape, generator=generator, dtype=D.dtype) < density for D in parts]
    return _sum([D * mask / density for D, mask in zip(parts, kept, strict=True)], weights, density, generator)


def _ties(parts: list[Tensor], weights: Sequence[float], density: float, generator: Generator) -> Tensor:
    stacked = torch.stack([_trimmed(D, density) for D in parts])  # (n, out, in)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)  # (out, in)
    agree = stacked.sign() == sign  # (n, out, in)
    scaled = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, 1, 1)
    return (scaled * agree).sum(0) / agree.sum(0).clamp_min(1)


MERGES: dict[str, Merge] = {"exact": _sum, "magnitude": _magnitude, "dare": _dare, "ties": _ties}


# ---- combining -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def combine(
    files: Sequence[AdapterFile],
    weights: Sequence[float],
    how: str = "exact",
    rank: int | None = None,
    density: float = 1.0,
    seed: int = 0,
    name: str = "combined",
) -> Combined:
    """Combine adapters into one; a single adapter is scaled, and with `rank` resized.

    Weights may be negative, which subtracts. `density` is for magnitude, dare and ties, `seed` for dare. Without
    `rank` the result has as many ranks as it needs. A head is the weighted mean of the heads, so weights must add up to
    1 there. Raises UserError for adapters of other bases, heads or labels, and for those that are no plain products.
    """
    _check(files, weights, how, rank, density)
    updates = [dict(lowered(file, file.name)) for file in files]
    generator = Generator().manual_seed(seed)
    layers: dict[str, Cut] = {}
    tensors: dict[str, Tensor] = {}
    lost = whole = 0.0
    for path in dict.fromkeys(path for of_file in updates for path in of_file):
        there = [i for i, of_file in enumerate(updates) if path in of_file]
        parts, own = [updates[i][path] for i in there], [float(weights[i]) for i in there]
        _check_shapes(path, parts)
        u, D = _merged(parts, own, how, density, generator)
        sides, size = min(D.shape[-2:]), float(D.norm())
        most = min(sides, sides if rank is None else rank)
        if _rank(u) > most:
            u = best(u, most)
        gone = float((D - u.matrix().double()).norm()) if rank is not None else 0.0
        linear = _linear([files[i] for i in there], path, parts, own)
        apart = None if linear is None else float((D - linear).norm())
        layers[path] = Cut(_rank(u), gone / size if size else 0.0, None if apart is None or not size else apart / size)
        tensors |= {f"{path}.A": u.A.float().contiguous(), f"{path}.B": u.B.float().contiguous()}
        lost, whole = lost + gone**2, whole + size**2
    tensors |= _heads(files, weights)
    ranks = {path: cut.rank for path, cut in layers.items()}
    file = AdapterFile(
        name, _recipe(ranks), {path: [path] for path in ranks}, list(files[0].heads), list(files[0].labels),
        next((file.base for file in files if file.base.get("sha256")), files[0].base), tensors,
        {key: key.rpartition(".")[2] if key.rpartition(".")[0] in ranks else "head" for key in tensors},
    )  # fmt: skip
    return Combined(file, layers, math.sqrt(lost / whole) if whole else 0.0)


def lowered(file: AdapterFile, label: Path | str) -> Iterator[tuple[str, Update]]:
    """(path, update without its gain) of each layer; raises UserError, led by `label`, where that needs the base."""
    if file.recipe.learn_base == "all":
        raise UserError(f"{label}: it trained the base in place, so its update is known only over it: give --model")
    of_share: dict[str, dict[str, Tensor]] = {}  # what layers share is kept under the first of them
    for path in file.paths:
        start = f"{path}."
        p = {key.removeprefix(start): t for key, t in file.tensors.items() if key.rpartition(".")[0] == path}
        share = None if file.recipe.ranks is None else file.recipe.ranks.layers[path].share
        if share is not None:
            shared = file.recipe.at(path).factors.shared  # type: ignore[union-attr]  # it has a rank map
            p |= of_share.setdefault(share, {role: p[role] for role in shared if role in p})
        factors: Any = file.recipe.factors
        if not file.recipe.low_rank or factors.constants([(1, 1)]):  # what is drawn over the sizes of the base
            raise UserError(f"{label}: its method makes A and B over the sizes of its base: give --model")
        yield path, file.recipe.at(path).lower_low_rank(p)


def _merged(
    parts: Sequence[Update], weights: Sequence[float], how: str, density: float, generator: Generator
) -> tuple[Update, Tensor]:
    """(the update at whatever rank it has, D (..., out, in) in float64)."""
    each = [u.matrix().double() for u in parts]
    if each[0].ndim == 2:
        D = MERGES[how](each, weights, density, generator)
    else:
        experts = zip(*each, strict=True)
        D = torch.stack([MERGES[how](list(own), weights, density, generator) for own in experts])  # (n, out, in)
    if how != "exact":
        return whole_rank(D), D
    A = torch.cat([u.A for u in parts], -2)  # (..., r, in)
    B = torch.cat([w * u.B for w, u in zip(weights, parts, strict=True)], -1)  # (..., out, r)
    return Update(A, B), D


def _rank(u: Update) -> int:
    return u.A.shape[-2]


def whole_rank(D: Tensor) -> Update:
    """D (..., out, in) as an update of the rank that it has room for."""
    return Update(D, torch.eye(D.shape[-2], dtype=D.dtype, device=D.device).expand(*D.shape[:-1], -1))


def singular(u: Update) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., out, k), s (..., k) falling, V (..., in, k) of B A = U diag(s) V^T, in float64; B A is never formed."""
    write, R_b = torch.linalg.qr(u.B.double())  # (..., out, k), (..., k, r)
    read, R_a = torch.linalg.qr(u.A.double().mT)  # (..., in, k), (..., k, r)
    U, s, Vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    return write @ U, s, read @ Vh.mT


def best(u: Update, rank: int) -> Update:
    """The best update of a lower rank, its singular values divided evenly."""
    U, s, V = singular(u)
    root = s[..., :rank].sqrt().unsqueeze(-2)  # (..., 1, rank)
    return Update((V[..., :rank] * root).mT, U[..., :rank] * root)  # (..., rank, in), (..., out, rank)


def _linear(
    files: Sequence[AdapterFile], path: str, parts: Sequence[Update], weights: Sequence[float]
) -> Tensor | None:
    """What PEFT's `linear` makes of them (..., out, in); None for one adapter, other methods, and unequal ranks."""
    factors = [file.recipe.at(path).factors for file in files]
    alike = len({_rank(u) for u in parts}) == 1 < len(parts)
    if not alike or not all(isinstance(f, LoRA) and f.rank == _rank(parts[0]) for f in factors):
        return None
    scalings = [f.scaling for f in factors]  # type: ignore[union-attr]
    roots = [math.copysign(math.sqrt(abs(w) * s), w) for w, s in zip(weights, scalings, strict=True)]
    A = sum(abs(root) * u.A.double() for root, u in zip(roots, parts, strict=True))
    B = sum(root / s * u.B.double() for root, s, u in zip(roots, scalings, parts, strict=True))
    product: Tensor = B @ A
    return product


def _recipe(ranks: Mapping[str, int]) -> Any:
    """A LoRA of these ranks and scaling 1."""
    most = max(ranks.values())
    even = set(ranks.values()) == {most}
    own = None if even else RankMap({path: LayerRank(r, alpha=float(r)) for path, r in ranks.items()})
    return recipe("lora", rank=most, alpha=float(most), ranks=own)


def _heads(files: Sequence[AdapterFile], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the heads."""
    keys = [key for key in files[0].tensors if any(key.startswith(f"{head}.") for head in files[0].heads)]
    return {key: sum(w * f.tensors[key] for w, f in zip(weights, files, strict=True)) for key in keys}  # type: ignore


# ---- what cannot be combined -----------------------------------------------------------------------------------------


def _check(files: Sequence[AdapterFile], weights: Sequence[float], how: str, rank: int | None, density: float) -> None:
    wrong = []
    if how not in MERGES:
        wrong.append(f"how={how!r}: choose one of {', '.join(MERGES)}")
    if len(weights) != len(files) or not files or not all(math.isfinite(w) for w in weights):
        wrong.append(f"weights={list(weights)} for {len(files)} adapters: expected one number for each")
    if rank is not None and rank < 1:
        wrong.append(f"rank={rank}: expected a whole number, 1 or more")
    if not 0 < density <= 1:
        wrong.append(f"density={density}: expected above 0, at most 1")
    elif density < 1 and how == "exact":
        wrong.append(f"density={density} with how='exact': it drops nothing; choose magnitude, dare or ties")
    if wrong:
        raise UserError("; ".join(wrong))
    for file in files:
        r = file.recipe
        of_tokens = r.ranks is not None and any(layer.tokens for layer in r.ranks.adapted.values())
        of_base = bool(file.of_base or file.vectors or file.parameters)
        if not file.paths or r.gain or r.learn_base or of_tokens or file.starts_anew or of_base:
            what = (
                "adapts no layer" if not file.paths else "has a gain (DoRA)" if r.gain
                else "has biases of the base" if r.learn_base else "has single tokens" if of_tokens
                else "has what only its base tells: load it and save it again" if of_base
                else "starts from weights of its base: load it and save it again"
            )  # fmt: skip
            raise UserError(f"adapter {file.name!r} {what}, so its update is no sum of products B A alone")
    for field in ("sha256", "name", "class"):
        values = {file.base.get(field) for file in files} - {None}
        if len(values) > 1 and not (field == "name" and all(file.base.get("sha256") for file in files)):
            told = ", ".join(f"{file.name!r} {str(file.base.get(field))[:40]}" for file in files)
            raise UserError(f"these adapters are of different bases ({field}: {told}): combine those of one base")
    for what, sets in (("heads", [f.heads for f in files]), ("labels", [f.labels for f in files])):
        if any(one != sets[0] for one in sets):
            told = "; ".join(
                f"{f.name!r} {listed(one, 4) if one else 'none'}" for f, one in zip(files, sets, strict=True)
            )
            raise UserError(f"these adapters have different {what} ({told}): combine those of one task")
    if files[0].heads and abs(sum(weights) - 1) > 1e-6:
        raise UserError(
            f"weights={list(weights)} add up to {sum(weights):.4g}: these adapters have heads, whose mean needs 1"
        )


def _check_shapes(path: str, parts: Sequence[Update]) -> None:
    if len(shapes := {(*u.B.shape[:-1], u.A.shape[-1]) for u in parts}) > 1:
        raise UserError(f"{path} has different shapes in these adapters: {sorted(shapes)}")
