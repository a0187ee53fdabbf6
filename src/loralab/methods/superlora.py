"""SuperLoRA: y = W x + b + s F(T_1 kron ... kron T_K) x, T_k = C_k x_1 A_k1 ... x_M A_kM (Chen et al., 2024).

s = alpha / r. K = 1, M = 2, no core and no F is LoRA, and lowers to the same A and B. K = 2 is LoKr, K > 2 LoNKr,
M > 2 with a core LoRTA. T_k is (o_k, i_k): the o_k multiply to the rows and the i_k to the columns of the weight. Where
M > 2, T_k is folded to M balanced modes. A_km is (n_m, r). If T_k has no more values than its A_km and core would have,
it is kept whole, as C_k (o_k, i_k).

A group may span layers (a share of a rank map). Its factors are those of the stacked weights (L out, in), and each of
the L layers takes its rows of the update. Or a layer has G groups: its rows in G equal parts, each with factors of its
own, and roles have an axis of G in front.

F makes out * in numbers from the share rho that is factored, and is linear; spread.py has the two there are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from loralab.methods.base import Roles, nearest_divisor, not_whole
from loralab.methods.lora import LoRA
from loralab.methods.spread import MOST, SPREADS


@dataclass(frozen=True)
class SuperLoRA(LoRA):
    split: int = 1
    """Number K of Kronecker factors; more of them means fewer values and more structure."""
    order: int = 2
    """Number M of modes of each factor: 2 for a matrix, more for a tensor folded from it."""
    core: bool = False
    """Learn the core, which mixes the rank terms; without, it is the identity."""
    fold: bool = False
    """Fold to balanced modes at order 2 too; higher orders are always folded."""
    ratio: float = 1.0
    """Share rho of the weight's numbers that are factored; below 1 the projection F makes the whole weight of them."""
    groups: int = 1
    """Number G of groups of a layer; rows that it does not divide get the nearest number that does."""
    projection: Literal["shuffle", "fastfood"] = "shuffle"
    """F: numbers repeated in a random order, or each mixed into every weight by two Hadamard transforms."""
    projection_seed: int = 0
    """Seed of F, which exists only at a ratio below 1."""
    source: Literal["philox-1"] = "philox-1"
    """Generator of F."""

    kind: ClassVar[str] = "superlora"

    @property
    def low_rank(self) -> bool:  # type: ignore[override]
        return (self.split, self.order, self.fold, self.ratio, self.groups) == (1, 2, False, 1, 1)

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
        """The roles of the mode matrices of T_k."""
        return [f"A{k}{m}" for m in range(1, self.order + 1)]

    def problems(self) -> list[str]:
        wrong = super().problems()
        for name, value, least in (("split", self.split, 1), ("order", self.order, 2)):
            if type(value) is not int or not least <= value <= 9:  # one digit each in the name of a role
                wrong.append(f"{name}={value!r}: expected a whole number, {least} to 9")
        if not 0 < self.ratio <= 1:
            wrong.append(f"ratio={self.ratio!r}: expected above 0, at most 1")
        wrong += not_whole("projection_seed", self.projection_seed, 0)
        if self.projection_seed and self.ratio == 1:
            wrong.append(f"projection_seed={self.projection_seed} with ratio=1: there is no projection F to seed")
        if self.projection not in SPREADS:
            wrong.append(f"projection={self.projection!r}: choose one of {', '.join(SPREADS)}")
        elif self.projection != "shuffle" and self.ratio == 1:
            wrong.append(f"projection={self.projection!r} with ratio=1: there is no projection F")
        wrong += not_whole("groups", self.groups, 1)
        if self.fold and self.order != 2:
            wrong.append(f"fold={self.fold} with order={self.order}: orders above 2 are always folded")
        return wrong

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features // self._parts(out_features), in_features

    def _parts(self, out_features: int) -> int:
        """Number of groups that a layer of so many rows has."""
        return 1 if self.groups == 1 else nearest_divisor(out_features, self.groups, 1)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a layer is too large for F, or too small for the low-rank form; other forms take any size and rank."""
        if self.ratio < 1 and math.prod(SuperLoRA.shape(self, out_features, in_features)) > MOST:
            numbers = f"the {out_features} x {in_features} numbers"
            return f"ratio={self.ratio}: F counts to {MOST}, fewer than {numbers}; take fewer layers a group"
        return super().misfit(out_features, in_features) if self.low_rank else None

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """Cores start as identities, one tensor of the last factor as zero, the others uniform.

        The uniform ones have a size that makes their product as large as LoRA's A.
        """
        if self.low_rank:
            p = super().init(out_features, in_features, generator)
            return p | ({"C": torch.eye(self.rank)} if self.core else {})
        if self.groups == 1:
            return self._init(out_features, in_features, generator)
        size = self.shape(out_features, in_features)
        each = [self._init(*size, generator) for _ in range(self._parts(out_features))]
        return {role: torch.stack([p[role] for p in each]) for role in each[0]}  # (G, ...)

    def _init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """Role -> starting tensor of one group of that size."""
        p, factors = {}, kronecker_factors(self, out_features, in_features)
        random = self.split - (factors[-1].ranks is None)  # factors that have a random tensor
        deviation = (3 * in_features) ** (-0.5 / max(random, 1))  # of T_k; LoRA's A has (3 in)^-0.5
        for k, factor in enumerate(factors, 1):
            last = k == self.split
            if factor.ranks is None:
                p[f"C{k}"] = torch.zeros(factor.matrix) if last else uniform(deviation, factor.matrix, generator)
                continue
            if self.core:
                p[f"C{k}"] = identity(factor.ranks)
            # T_k is a sum of min(ranks) products of M entries, or of M - 1 beside the one that is zero
            terms = min(factor.ranks) ** 0.5
            size = deviation ** (1 / (self.order - 1)) if last else (deviation / terms) ** (1 / self.order)
            for role, shape in zip(self._modes(k), zip(factor.modes, factor.ranks, strict=True), strict=True):
                p[role] = torch.zeros(shape) if last and role[-1] == "1" else uniform(size, shape, generator)
        return p

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        A, B = super().lower(p)
        return A, B @ p["C"] if self.core else B  # (..., r, in), (..., out, r)

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        rows, columns = SuperLoRA.shape(self, out_features, in_features)
        D = self._rows(p, (rows, columns), 0, rows)
        return D if self.groups == 1 else D.flatten(-3, -2)  # of (..., G, out / G, in)

    def _rows(self, p: Roles, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        """Rows start to stop of the update (..., out, in) of a weight of that shape.

        With a projection all of the factored matrix is made, since its numbers go to any row.
        """
        factors = kronecker_factors(self, *shape)
        if self.ratio == 1:
            return self._product(p, factors, start, stop)
        v = self._product(p, factors, 0, math.prod(f.matrix[0] for f in factors)).flatten(-2)  # (..., n)
        D = SPREADS[self.projection].project(v, p, slice(start * shape[1], stop * shape[1]), math.prod(shape))
        return D.view(*D.shape[:-1], stop - start, shape[1])

    def _product(self, p: Roles, factors: Sequence["KroneckerFactor"], start: int, stop: int) -> Tensor:
        """Rows start to stop of s T_1 kron ... kron T_K."""
        few, own = rows_of(start, stop, math.prod(f.matrix[0] for f in factors[1:]))
        T = [self._factor(p, 1, factors[0], few), *(self._factor(p, k, f) for k, f in enumerate(factors[1:], 2))]
        T[-1] = self.scaling * T[-1]
        D = reduce(kron, T)  # (..., rows, in)
        return D[..., own, :]

    def _factor(self, p: Roles, k: int, factor: "KroneckerFactor", rows: slice | None = None) -> Tensor:
        """T_k (..., o_k, i_k), or some of its rows."""
        o, i = factor.matrix
        rows = rows or slice(0, o)
        if factor.ranks is None:
            return p[f"C{k}"][..., rows, :]
        few, own = rows_of(rows.start * i, rows.stop * i, math.prod(factor.modes[1:]))
        first, *others = [p[role] for role in self._modes(k)]
        modes = [first[..., few, :], *others]
        T = tucker(p[f"C{k}"], modes) if self.core else polyadic(modes)  # flat
        return T[..., own].view(*T.shape[:-1], -1, i)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        if self.low_rank:
            return super().sizes(out_features, in_features) | ({"C": self.rank**2} if self.core else {})
        count = SuperLoRA._parts(self, out_features)
        sizes = dict.fromkeys(self.roles, 0)
        for k, factor in enumerate(kronecker_factors(self, out_features // count, in_features), 1):
            if factor.ranks is None:
                sizes[f"C{k}"] = math.prod(factor.matrix)
                continue
            sizes[f"C{k}"] = math.prod(factor.ranks) if self.core else 0
            sizes |= {role: n * r for role, n, r in zip(self._modes(k), factor.modes, factor.ranks, strict=True)}
        return {role: count * size for role, size in sizes.items()}

    def constants(self, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        made = [self._made(shape) for shape in set(shapes)] if self.ratio < 1 else []
        return {name + key: t for key, tensors in made for name, t in tensors().items()}

    def local(self, constants: Roles, out_features: int, in_features: int) -> dict[str, Tensor]:
        if self.ratio == 1:
            return {}
        key, _ = self._made(self.shape(out_features, in_features))
        return {name.removesuffix(key): t for name, t in constants.items() if name[1:] == key}

    def _made(self, shape: tuple[int, int]) -> tuple[str, Callable[[], dict[str, Tensor]]]:
        """What follows the letter in the names of the constants of a group of that shape, and what makes them."""
        spread, count = SPREADS[self.projection], math.prod(shape)
        n = math.prod(math.prod(factor.matrix) for factor in kronecker_factors(self, *shape))
        return spread.key(n, count), partial(spread.constants, self.projection_seed, n, count)


@dataclass(frozen=True)
class OfGroup(SuperLoRA):
    """One layer of a group: rows index * out to (index + 1) * out of the update of the stacked weight."""

    index: int = 0
    count: int = 1

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.count * out_features, in_features

    def misfit(self, out_features: int, in_features: int) -> str | None:
        if self.groups > 1:
            return f"groups={self.groups} in layers of a share: a group is a part of a layer, or several layers"
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


class KroneckerFactor(NamedTuple):
    """The sizes of one Kronecker factor T_k."""

    matrix: tuple[int, int]  # (o_k, i_k)
    modes: tuple[int, ...]  # n_1 ... n_M, with the product o_k i_k
    ranks: tuple[int, ...] | None  # r_1 ... r_M; None: kept whole


@lru_cache(maxsize=1024)
def kronecker_factors(s: SuperLoRA, out_features: int, in_features: int) -> list[KroneckerFactor]:
    """The sizes of the factors of a weight (out, in)."""
    rows, columns = (math.ceil(side * math.sqrt(s.ratio)) for side in (out_features, in_features))
    factors = []
    for matrix in zip(balanced(rows, s.split), balanced(columns, s.split), strict=True):
        modes = balanced(math.prod(matrix), s.order) if s.fold or s.order > 2 else matrix
        # a learned core can use no more terms than a mode has entries
        ranks = tuple(min(s.rank, n) if s.core else s.rank for n in modes)
        values = sum(n * r for n, r in zip(modes, ranks, strict=True)) + (math.prod(ranks) if s.core else 0)
        factors.append(KroneckerFactor(matrix, modes, ranks if values < math.prod(matrix) else None))
    return factors


# ---- products of tensors ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def balanced(number: int, count: int) -> tuple[int, ...]:
    """`count` rising whole numbers with that product, as near each other as it divides; a prime p gives 1 and p."""
    if count == 1:
        return (number,)
    divisor = next(d for d in range(round(number ** (1 / count)) + 1, 0, -1) if number % d == 0 and d**count <= number)
    return tuple(sorted((divisor, *balanced(number // divisor, count - 1))))


def kron(S: Tensor, T: Tensor) -> Tensor:
    """(..., a, b) and (..., c, d) -> (..., a c, b d)."""
    return (S[..., :, None, :, None] * T[..., None, :, None, :]).flatten(-4, -3).flatten(-2)


def tucker(C: Tensor, modes: Sequence[Tensor]) -> Tensor:
    """C (..., r_1, ..., r_M) x_1 A_1 (..., n_1, r_1) ... x_M A_M, flat: (..., n_1 * ... * n_M)."""
    T = C.flatten(-len(modes))
    for A in modes:  # each turn moves the first axis to the end, so after M turns the order is the first one
        T = (T.unflatten(-1, (A.shape[-1], -1)).mT @ A.mT).flatten(-2)
    return T


def polyadic(modes: Sequence[Tensor]) -> Tensor:
    """`tucker` with an identity for a core: the sum over r of outer products of columns r."""
    T = modes[0]  # (..., n, r)
    for A in modes[1:-1]:
        T = (T[..., :, None, :] * A[..., None, :, :]).flatten(-3, -2)
    return (T @ modes[-1].mT).flatten(-2)


def rows_of(start: int, stop: int, step: int) -> tuple[slice, slice]:
    """(rows of `step` items that hold items start to stop, the place of these items within those rows)."""
    first = start // step
    return slice(first, -(-stop // step)), slice(start - first * step, stop - first * step)


def uniform(deviation: float, shape: Sequence[int], generator: Generator) -> Tensor:
    """Uniform values about zero with that standard deviation."""
    bound = math.sqrt(3) * deviation
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def identity(ranks: Sequence[int]) -> Tensor:
    """A tensor of that shape with ones where all indices agree, zeros elsewhere."""
    C = torch.zeros(*ranks)
    C[(torch.arange(min(ranks)),) * len(ranks)] = 1
    return C
