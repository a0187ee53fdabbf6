"""SuperLoRA: y = W x + b + s F(T_1 kron ... kron T_K) x, T_k = C_k x_1 A_k1 ... x_M A_kM (Chen et al., 2024).

s = alpha / r. K = 1, M = 2, no core and no F is LoRA, and lowers to the same A and B. K = 2 is LoKr, K > 2 LoNKr,
M > 2 with a core LoRTA. T_k is (o_k, i_k), with the o_k multiplying to the rows and the i_k to the columns of the
weight, folded to M balanced modes where M > 2; A_km is (n_m, r). A T_k of no more values than its A_km and core would
have is kept whole, as C_k (o_k, i_k).

A group may span layers (a share of a rank map): its factors are those of the weights on top of each other, (L out, in),
and each of the L layers has its rows of the update.

F makes out * in numbers of the rho share that is factored: v, -v, v, -v, ... cut to length, in an order shuffled by
numpy's Philox counter, so that a file needs only the seed. It is linear, and each number has as many places as another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from loralab.methods.base import Roles
from loralab.methods.lora import LoRA
from loralab.methods.tensors import balanced, identity, kron, polyadic, rows_of, shuffle, spread, tucker, uniform

MOST = 2**31 - 1  # numbers that F spreads to; their order is kept in 32 bits each


@dataclass(frozen=True)
class SuperLoRA(LoRA):
    split: int = 1
    """Number K of Kronecker factors; more of them means fewer values and more structure."""
    order: int = 2
    """Number M of modes of each factor: 2 for a matrix, more for a tensor folded from it."""
    core: bool = False
    """Learn the core, which mixes the rank terms; without, it is the identity."""
    fold: bool = False
    """Fold to balanced modes at order 2 too; higher orders always do."""
    ratio: float = 1.0
    """Share rho of the weight's numbers that are factored; below 1 the projection F spreads them over all of it."""
    projection_seed: int = 0
    """Seed of F."""
    source: Literal["philox-1"] = "philox-1"
    """Generator of F."""

    kind: ClassVar[str] = "superlora"

    @property
    def low_rank(self) -> bool:  # type: ignore[override]
        return (self.split, self.order, self.fold, self.ratio) == (1, 2, False, 1)

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.low_rank:
            return ("A", "B", "C") if self.core else ("A", "B")
        return tuple(name for k in range(1, int(self.split) + 1) for name in (f"C{k}", *self._modes(k)))

    @property
    def learn(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.roles

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.roles

    def placed(self, index: int, count: int) -> "OfGroup":
        return OfGroup(**vars(self), index=index, count=count)

    def _modes(self, k: int) -> list[str]:
        return [f"A{k}{m}" for m in range(1, self.order + 1)]

    def problems(self) -> list[str]:
        whole = {"split": (self.split, 1), "order": (self.order, 2)}  # up to 9: one digit each in the name of a role
        return [
            *super().problems(),
            *(
                f"{name}={value!r}: expected a whole number, {least} to 9"
                for name, (value, least) in whole.items()
                if type(value) is not int or not least <= value <= 9
            ),
            *([] if 0 < self.ratio <= 1 else [f"ratio={self.ratio!r}: expected above 0, at most 1"]),
            *([] if self.source == "philox-1" else [f"source={self.source!r}: the one there is is 'philox-1'"]),
        ]

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Only the low-rank form bounds the rank; any size factors, a prime p as 1 x p."""
        if self.ratio < 1 and out_features * in_features > MOST:
            numbers = f"the {out_features} x {in_features} numbers"
            return f"ratio={self.ratio}: F counts to {MOST}, fewer than {numbers}; take fewer layers a group"
        return super().misfit(out_features, in_features) if self.low_rank else None

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """Cores identities, one tensor of the last factor zero, the rest uniform, the product as large as LoRA's A."""
        if self.low_rank:
            p = super().init(out_features, in_features, generator)
            return p | ({"C": torch.eye(self.rank)} if self.core else {})
        p, made = {}, parts(self, out_features, in_features)
        random = self.split - (made[-1].ranks is None)  # factors that have a random tensor
        share = (3 * in_features) ** (-0.5 / max(random, 1))  # deviation of T_k; LoRA's A has (3 in)^-0.5
        for k, part in enumerate(made, 1):
            last = k == self.split
            if part.ranks is None:
                p[f"C{k}"] = torch.zeros(part.matrix) if last else uniform(share, part.matrix, generator)
                continue
            if self.core:
                p[f"C{k}"] = identity(part.ranks)
            # T_k is a sum of min(ranks) products of M entries, or of M - 1 beside the one that is zero
            size = share ** (1 / (self.order - 1)) if last else (share / min(part.ranks) ** 0.5) ** (1 / self.order)
            for role, shape in zip(self._modes(k), zip(part.modes, part.ranks, strict=True), strict=True):
                p[role] = torch.zeros(shape) if last and role[-1] == "1" else uniform(size, shape, generator)
        return p

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        A, B = super().lower(p)
        return A, B @ p["C"] if self.core else B

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        return self._rows(p, (out_features, in_features), 0, out_features)

    def _rows(self, p: Roles, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        """Rows of the update (..., out, in) of a weight of that shape; F needs all numbers of what it spreads."""
        made = parts(self, *shape)
        if self.ratio == 1:
            return self._product(p, made, start, stop)
        v = self._product(p, made, 0, math.prod(part.matrix[0] for part in made)).flatten(-2)
        D = spread(v, p["P"], math.prod(shape))  # P is that of the rows
        return D.view(*D.shape[:-1], stop - start, shape[1])

    def _product(self, p: Roles, made: Sequence["Part"], start: int, stop: int) -> Tensor:
        """Rows of s T_1 kron ... kron T_K."""
        few, own = rows_of(start, stop, math.prod(part.matrix[0] for part in made[1:]))
        T = [self._part(p, 1, made[0], few), *(self._part(p, k, part) for k, part in enumerate(made[1:], 2))]
        T[-1] = self.scaling * T[-1]
        D = reduce(kron, T)
        return D[..., own, :]

    def _part(self, p: Roles, k: int, part: "Part", rows: slice | None = None) -> Tensor:
        """T_k (..., o_k, i_k), or some of its rows."""
        o, i = part.matrix
        rows = rows or slice(0, o)
        if part.ranks is None:
            return p[f"C{k}"][..., rows, :]
        few, own = rows_of(rows.start * i, rows.stop * i, math.prod(part.modes[1:]))
        first, *others = [p[role] for role in self._modes(k)]
        modes = [first[..., few, :], *others]
        T = tucker(p[f"C{k}"], modes) if self.core else polyadic(modes)
        return T[..., own].view(*T.shape[:-1], -1, i)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        if self.low_rank:
            return super().sizes(out_features, in_features) | ({"C": self.rank**2} if self.core else {})
        sizes = dict.fromkeys(self.roles, 0)
        for k, part in enumerate(parts(self, out_features, in_features), 1):
            if part.ranks is None:
                sizes[f"C{k}"] = math.prod(part.matrix)
                continue
            sizes[f"C{k}"] = math.prod(part.ranks) if self.core else 0
            sizes |= {m: n * r for m, n, r in zip(self._modes(k), part.modes, part.ranks, strict=True)}
        return sizes

    def constants(self, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        if self.ratio == 1:
            return {}
        return {f"P{n}": shuffle(self.projection_seed, n) for n in {math.prod(shape) for shape in shapes}}

    def local(self, constants: Roles, out_features: int, in_features: int) -> dict[str, Tensor]:
        return {} if self.ratio == 1 else {"P": constants[f"P{out_features * in_features}"]}


@dataclass(frozen=True)
class OfGroup(SuperLoRA):
    """One layer of a group: rows index * out to (index + 1) * out of the update of the stacked weight."""

    index: int = 0
    count: int = 1

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.count * out_features, in_features

    def misfit(self, out_features: int, in_features: int) -> str | None:
        return super().misfit(*self.shape(out_features, in_features))

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        return super().init(*self.shape(out_features, in_features), generator)

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        out = p["B"].shape[-2] // self.count
        return super().lower({**p, "B": p["B"][..., self.index * out : (self.index + 1) * out, :]})

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        start = self.index * out_features
        return self._rows(p, self.shape(out_features, in_features), start, start + out_features)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return super().sizes(*self.shape(out_features, in_features))

    def local(self, constants: Roles, out_features: int, in_features: int) -> dict[str, Tensor]:
        size = out_features * in_features
        whole = super().local(constants, *self.shape(out_features, in_features))
        return {role: P[self.index * size : (self.index + 1) * size] for role, P in whole.items()}


class Part(NamedTuple):
    """The sizes of one Kronecker factor."""

    matrix: tuple[int, int]  # (o_k, i_k)
    modes: tuple[int, ...]  # n_1 ... n_M, the same number of values
    ranks: tuple[int, ...] | None  # r_1 ... r_M; None: kept whole


@lru_cache(maxsize=1024)
def parts(s: SuperLoRA, out_features: int, in_features: int) -> list[Part]:
    rows, columns = (math.ceil(side * math.sqrt(s.ratio)) for side in (out_features, in_features))
    made = []
    for matrix in zip(balanced(rows, s.split), balanced(columns, s.split), strict=True):
        modes = balanced(math.prod(matrix), s.order) if s.fold or s.order > 2 else matrix
        # a learned core can use no more terms than a mode has entries
        ranks = tuple(min(s.rank, n) if s.core else s.rank for n in modes)
        values = sum(n * r for n, r in zip(modes, ranks, strict=True)) + (math.prod(ranks) if s.core else 0)
        made.append(Part(matrix, modes, ranks if values < math.prod(matrix) else None))
    return made
