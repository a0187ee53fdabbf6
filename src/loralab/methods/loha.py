"""LoHa: y = W x + b + s (B1 A1 * B2 A2) x, * by element, s = alpha / r; A1, A2 (r, in), B1, B2 (out, r).

The product by element of two matrices of rank r has rank up to r^2 (FedPara: Hyeon-Woo et al., 2022): its rows of A are
those of A1 times those of A2, its columns of B those of B1 times those of B2. B2 starts at zero, as in PEFT.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor, empty, zeros

from loralab.methods.base import Roles
from loralab.methods.lora import LoRA


@dataclass(frozen=True)
class LoHa(LoRA):
    rank: int = 4
    """Rank r of the two factors; that of the update is r^2."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""

    kind: ClassVar[str] = "loha"
    roles: ClassVar[tuple[str, ...]] = ("A1", "B1", "A2", "B2")
    learn: ClassVar[tuple[str, ...]] = ("A1", "B1", "A2", "B2")
    shared: ClassVar[tuple[str, ...]] = ()

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """Uniform in +-1/sqrt(columns), as kaiming_uniform_(a=sqrt(5)) of PEFT; B2 zero."""

        def drawn(rows: int, columns: int) -> Tensor:
            bound = 1 / math.sqrt(columns)
            return empty(rows, columns).uniform_(-bound, bound, generator=generator)

        r = self.rank
        return {
            "A1": drawn(r, in_features),
            "B1": drawn(out_features, r),
            "A2": drawn(r, in_features),
            "B2": zeros(out_features, r),
        }

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        A = (p["A1"].unsqueeze(-2) * p["A2"].unsqueeze(-3)).flatten(-3, -2)  # (..., r * r, in)
        B = (p["B1"].unsqueeze(-1) * p["B2"].unsqueeze(-2)).flatten(-2)  # (..., out, r * r)
        return A, B * self.scaling

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        rows, columns = self.rank * out_features, self.rank * in_features
        return {"A1": columns, "B1": rows, "A2": columns, "B2": rows}
