"""Products of tensors, how sizes are divided among them, and how their numbers are spread (see superlora.py)."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor

from loralab.cache import constants


@lru_cache(maxsize=1024)
def balanced(number: int, count: int) -> tuple[int, ...]:
    """`count` whole numbers with that product, rising, each as near below the root as divides; a prime is 1 ... p."""
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
    for A in modes:  # the first axis goes, its mode comes last; after M turns the order is the one at the start
        T = (T.unflatten(-1, (A.shape[-1], -1)).mT @ A.mT).flatten(-2)
    return T


def polyadic(modes: Sequence[Tensor]) -> Tensor:
    """`tucker` with an identity for a core: the sum over r of outer products of columns r."""
    T = modes[0]  # (..., n, r)
    for A in modes[1:-1]:
        T = (T[..., :, None, :] * A[..., None, :, :]).flatten(-3, -2)
    return (T @ modes[-1].mT).flatten(-2)


def rows_of(start: int, stop: int, step: int) -> tuple[slice, slice]:
    """Which rows of `step` things hold things start to stop, and where these are among the things of those rows."""
    first = start // step
    return slice(first, -(-stop // step)), slice(start - first * step, stop - first * step)


def spread(v: Tensor, P: Tensor, count: int) -> Tensor:
    """F: (..., n) -> (..., count) numbers in the order P, or those of them that P names."""
    turns = math.ceil(count / (2 * v.shape[-1]))
    return torch.cat([v, -v] * turns, -1)[..., :count].index_select(-1, P)


@constants
def shuffle(seed: int, count: int) -> Tensor:
    """An order of `count` things, decided by integers alone: the argsort of Philox's 64-bit words."""
    words = np.random.Philox(key=seed).random_raw(count)
    return torch.from_numpy(words.argsort(kind="stable").astype(np.int32))


def uniform(deviation: float, shape: Sequence[int], generator: Generator) -> Tensor:
    bound = math.sqrt(3) * deviation
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def identity(ranks: Sequence[int]) -> Tensor:
    """Ones where all indices agree, zeros elsewhere."""
    C = torch.zeros(*ranks)
    C[(torch.arange(min(ranks)),) * len(ranks)] = 1
    return C
