"""MiSS: y = W x + b + D^T S x; S (r, in) adds up the inputs j, j + r, j + 2 r, ..., and D (r, out) learns (2409.15371).

Every block of r columns of the update is the same matrix D^T, so only r * out values learn, and no scaling is needed.
D starts at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.methods.base import Factors, Roles, not_whole


@dataclass(frozen=True)
class MiSS(Factors):
    rank: int = 8
    """Rows r of D, and columns of a block of the update; the paper's tables use more, up to 64."""

    kind: ClassVar[str] = "miss"
    roles: ClassVar[tuple[str, ...]] = ("D",)
    learn: ClassVar[tuple[str, ...]] = ("D",)

    def problems(self) -> list[str]:
        return not_whole("rank", self.rank, 1)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        if self.rank <= in_features:
            return None
        return f"rank {self.rank}: a {out_features} x {in_features} weight allows 1 to {in_features}"

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        return {"D": torch.zeros(self.rank, out_features)}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        return p["S"].to(p["D"].dtype), p["D"].mT  # (r, in), (..., out, r)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"D": self.rank * out_features}

    def constants(self, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        widest = max(columns for _, columns in shapes)
        return {"S": torch.eye(self.rank).repeat(1, -(-widest // self.rank))}  # (r, widest or more)

    def local(self, constants: Roles, out_features: int, in_features: int) -> dict[str, Tensor]:
        return {"S": constants["S"][:, :in_features]}  # (r, in)
