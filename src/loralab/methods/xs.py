"""LoRA-XS: y = W x + b + s B R A x, where only R (r, r) learns, s = alpha / r (Balazy et al., 2024).

A (r, in) = V_r^T and B (out, r) = U_r S_r come from the r largest singular values of W = U S V^T and are frozen. R
starts at zero; the paper draws it with a deviation of 1e-5. A file holds A and B, so that no other machine's SVD has to
give the same signs.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.methods.base import Roles
from loralab.methods.lora import LoRA


@dataclass(frozen=True)
class LoRAXS(LoRA):
    rank: int = 16
    """Rank r, far above LoRA's for as many values: a layer learns r^2, whatever its size."""

    kind: ClassVar[str] = "lora-xs"
    roles: ClassVar[tuple[str, ...]] = ("A", "B", "R")
    learn: ClassVar[tuple[str, ...]] = ("R",)
    shared: ClassVar[tuple[str, ...]] = ()

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """A (r, in) and B (out, r) are random here, and R (r, r) zero; `from_base` sets A and B."""
        p = super().init(out_features, in_features, generator)
        bound = 1 / math.sqrt(self.rank)
        B = torch.empty(out_features, self.rank).uniform_(-bound, bound, generator=generator)
        return {**p, "B": B, "R": torch.zeros(self.rank, self.rank)}

    def from_base(self, base: Any) -> dict[str, Tensor]:
        W = base.dense().detach().to("cpu", torch.float32)  # (out, in); every device gets the same start
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return {"A": Vh[: self.rank].contiguous(), "B": (U[:, : self.rank] * S[: self.rank]).contiguous()}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        return p["A"], p["B"] @ (p["R"] * self.scaling)  # (..., r, in), (..., out, r)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"R": self.rank**2}
