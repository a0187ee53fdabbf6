"""LoRA: y = W x + s B A x, A (r, in) random, B (out, r) zero, s = alpha / r (Hu et al., 2021).

rsLoRA is the same with s = alpha / sqrt(r), which keeps the update's size steady as r grows (Kalajdzievski, 2023).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor, empty, zeros

from loralab.methods.base import Factors, Roles, not_whole


@dataclass(frozen=True)
class LoRA(Factors):
    rank: int = 8
    """Rank r of the update; small ranks often suffice."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank; 16 at rank 8 is what the paper's GLUE scripts use."""
    stabilized: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) instead."""

    kind: ClassVar[str] = "lora"
    roles: ClassVar[tuple[str, ...]] = ("A", "B")
    learn: ClassVar[tuple[str, ...]] = ("A", "B")
    shared: ClassVar[tuple[str, ...]] = ("A", "B")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilized else self.rank)

    def problems(self) -> list[str]:
        wrong = not_whole("rank", self.rank, 1)
        return wrong if 0 < self.alpha < math.inf else [*wrong, f"alpha={self.alpha!r}: expected above 0"]

    def misfit(self, out_features: int, in_features: int) -> str | None:
        most = min(out_features, in_features)
        if self.rank <= most:
            return None
        return f"rank {self.rank}: a {out_features} x {in_features} weight allows 1 to {most}"

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """A (r, in) uniform in +-1/sqrt(in), as kaiming_uniform_(a=sqrt(5)) of the authors' code; B (out, r) zero."""
        bound = 1 / math.sqrt(in_features)
        A = empty(self.rank, in_features).uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": zeros(out_features, self.rank)}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        return p["A"], p["B"] * self.scaling

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"A": self.rank * in_features, "B": self.rank * out_features}
