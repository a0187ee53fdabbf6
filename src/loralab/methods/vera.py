"""VeRA: y = W x + b + diag(b) B diag(d) A x. A (r, in) and B (out, r) are random, frozen and shared by all layers; only
the vectors d (r,) and b (out,) learn (Kopiczko et al., 2024).

Every layer uses the first columns of one A (r, largest in) and the first rows of one B (largest out, r). They come from
a generator defined here, so that a file needs only the seed: the top 24 bits of numpy's Philox counter, row by row.
`source="peft"` draws what PEFT draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from loralab.cache import constants
from loralab.methods.base import Factors, Roles, not_whole


@dataclass(frozen=True)
class VeRA(Factors):
    rank: int = 256
    """Rank r, far above LoRA's, since each rank costs one learned value a layer."""
    d_start: float = 0.1
    """Start of d; b starts at zero."""
    projection_seed: int = 0
    """Seed of the shared A and B."""
    source: Literal["philox-1", "peft"] = "philox-1"
    """Generator of the shared A and B."""

    kind: ClassVar[str] = "vera"
    roles: ClassVar[tuple[str, ...]] = ("d", "b")
    learn: ClassVar[tuple[str, ...]] = ("d", "b")

    def problems(self) -> list[str]:
        return [
            *not_whole("rank", self.rank, 1),
            *not_whole("projection_seed", self.projection_seed, 0),
            *([] if self.source in SOURCES else [f"source={self.source!r}: choose one of {', '.join(SOURCES)}"]),
        ]

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        return {"d": torch.full((self.rank,), self.d_start), "b": torch.zeros(out_features)}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        return p["d"].unsqueeze(-1) * p["A"], p["b"].unsqueeze(-1) * p["B"]  # (..., r, in), (..., out, r)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"d": self.rank, "b": out_features}

    def constants(self, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        outs, ins = zip(*shapes, strict=True)
        return SOURCES[self.source](self.projection_seed, self.rank, max(outs), max(ins))  # type: ignore[no-any-return]

    def local(self, constants: Roles, out_features: int, in_features: int) -> dict[str, Tensor]:
        return {"A": constants["A"][:, :in_features], "B": constants["B"][:out_features]}  # (r, in), (out, r)


@constants
def _philox(seed: int, rank: int, most_out: int, most_in: int) -> dict[str, Tensor]:
    """A (r, most_in) and B (most_out, r) from Philox's words; the rule must never change, as files hold the seed."""
    stream = np.random.Philox(key=seed)

    def draw(rows: int, columns: int) -> Tensor:
        bits = stream.random_raw(rows * columns) >> np.uint64(40)  # 24 bits: exact in float32
        unit = torch.from_numpy(bits.astype(np.float32) * np.float32(2**-23) - np.float32(1))  # [-1, 1)
        return unit.reshape(rows, columns) * math.sqrt(6 / columns)  # kaiming: bound sqrt(6 / fan_in)

    return {"A": draw(rank, most_in), "B": draw(most_out, rank)}


@constants
def _peft(seed: int, rank: int, most_out: int, most_in: int) -> dict[str, Tensor]:
    """A (r, most_in) and B (most_out, r) as PEFT draws them with torch's generator."""
    generator = Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return {"A": draw(rank, most_in), "B": draw(most_out, rank)}


SOURCES = {"philox-1": _philox, "peft": _peft}
