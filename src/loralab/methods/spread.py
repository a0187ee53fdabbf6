"""F of SuperLoRA: the fixed linear maps that make the N numbers of an update from n numbers v (Chen et al., 2024).

shuffle    v, -v, v, -v, ... cut to N, in a random order; each number of v has equally many places
fastfood   blocks of (d / n)^0.5 H G P H S, cut to N: S random signs, P a random order, G normal, H the Hadamard matrix
           of d = 2^l >= n over d^0.5, v filled up with zeros (Le et al., 2013). Each of v is a part of every weight

All is decided by whole numbers of numpy's Philox counter, so that a file needs only the seed: a normal number is the
sum of twelve uniform ones of 16 bits.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loralab.cache import constants

MOST = 2**31 - 1  # numbers that F can make; their order is kept in 32 bits each


class Spread(NamedTuple):
    """One F."""

    constants: Callable[[int, int, int], dict[str, Tensor]]  # (seed, n, N) -> letter -> frozen tensor
    key: Callable[[int, int], str]  # (n, N) -> what decides these tensors but for the seed
    # (v (..., n), these tensors, the numbers that are wanted, N) -> (..., how many are wanted)
    project: Callable[[Tensor, Mapping[str, Tensor], slice, int], Tensor]


# ---- shuffle ---------------------------------------------------------------------------------------------------------


def project(v: Tensor, P: Tensor, count: int) -> Tensor:
    """v (..., n) -> v, -v, v, ... cut to `count` numbers and taken in the order P (..., len(P))."""
    turns = math.ceil(count / (2 * v.shape[-1]))
    return torch.cat([v, -v] * turns, -1)[..., :count].index_select(-1, P)


@constants
def shuffle(seed: int, count: int) -> Tensor:
    """An order (count,) of `count` numbers, decided by integers alone: the argsort of Philox's 64-bit words."""
    words = np.random.Philox(key=seed).random_raw(count)
    return torch.from_numpy(words.argsort(kind="stable").astype(np.int32))


# ---- fastfood --------------------------------------------------------------------------------------------------------


def power_of_two(n: int) -> int:
    """The power of two d that is n or the next above it."""
    return 1 << (n - 1).bit_length()


@constants
def fastfood_constants(seed: int, n: int, count: int) -> dict[str, Tensor]:
    """S, P and G of each block (blocks, d), from one stream of words: all of S, then of P, then of G."""
    d = power_of_two(n)
    blocks = math.ceil(count / d)
    stream = np.random.Philox(key=seed)
    signs = (stream.random_raw(blocks * d) >> np.uint64(63)).astype(np.float32) * 2 - 1
    order = stream.random_raw(blocks * d).reshape(blocks, d).argsort(axis=1, kind="stable")
    words = stream.random_raw(3 * blocks * d)[:, None] >> np.array([0, 16, 32, 48], np.uint64)  # (words, 4)
    parts = (words & np.uint64(65535)).reshape(-1, 12)  # 12 numbers of 16 bits for each
    normal = (parts.sum(1, dtype=np.int64) - 12 * 65535 / 2) / 65536
    made = {"S": signs, "P": order.astype(np.int32), "G": normal.astype(np.float32)}
    return {name: torch.from_numpy(values.reshape(blocks, d)) for name, values in made.items()}


def fastfood(v: Tensor, S: Tensor, P: Tensor, G: Tensor) -> Tensor:
    """(..., n) -> (..., blocks d)."""
    n, d = v.shape[-1], S.shape[-1]
    x = torch.nn.functional.pad(v, (0, d - n)).unsqueeze(-2) * S  # (..., blocks, d)
    x = hadamard(x)
    x = x.gather(-1, P.long().expand(x.shape)) * G
    return (math.sqrt(d / n) * hadamard(x)).flatten(-2)


def hadamard(x: Tensor) -> Tensor:
    """H x / d^0.5 (..., d) for d a power of two, in log2(d) rounds of sums and differences."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        a, b = x.reshape(*shape[:-1], -1, 2, half).unbind(-2)  # (..., d / (2 half), half)
        x = torch.stack([a + b, a - b], -2)
        half *= 2
    return x.reshape(shape) / math.sqrt(shape[-1])


SPREADS: dict[str, Spread] = {
    "shuffle": Spread(
        lambda seed, n, count: {"P": shuffle(seed, count)},
        lambda n, count: str(count),
        lambda v, p, wanted, count: project(v, p["P"][wanted], count),
    ),
    "fastfood": Spread(
        fastfood_constants,
        lambda n, count: f"{count}-{power_of_two(n)}",
        lambda v, p, wanted, count: fastfood(v, p["S"], p["P"], p["G"])[..., wanted],
    ),
}
