"""Delta-LoRA: W follows the low-rank product, W <- W + follow (alpha / r) (B' A' - B A) after `wait` steps
(Zi et al., 2023).

The steps telescope to W + follow s (B A - Bk Ak), (Ak, Bk) the factors after `wait` steps, so W is never touched: the
update is [A; A; Ak] and [s B, follow s B, -follow s Bk], the middle pair without gradient, as W is a constant to
autograd. Until then the snapshot is the factors themselves and the difference is zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.methods.base import Roles
from loralab.methods.lora import LoRA


@dataclass(frozen=True)
class DeltaLoRA(LoRA):
    follow: float = 2.0
    """How far W follows the product (the paper's lambda)."""
    wait: int = 500
    """Optimizer steps before W follows (the paper's K)."""

    kind: ClassVar[str] = "delta-lora"
    roles: ClassVar[tuple[str, ...]] = ("A", "B", "Ak", "Bk", "step")
    stepped: ClassVar[bool] = True
    drops: ClassVar[bool] = False  # W, which follows B A, never sees dropped inputs

    def problems(self) -> list[str]:
        return [*super().problems(), *([] if self.wait >= 0 else [f"wait={self.wait!r}: expected 0 or more"])]

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        p = super().init(out_features, in_features, generator)
        return {**p, "Ak": p["A"].clone(), "Bk": p["B"].clone(), "step": torch.zeros((), dtype=torch.int64)}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        A, B, s = p["A"], p["B"], self.scaling
        up = [s * B, self.follow * s * B.detach(), -self.follow * s * p["Bk"]]
        return torch.cat([A, A.detach(), p["Ak"]], -2), torch.cat(up, -1)

    def after_step(self, layers: Mapping[str, Roles], drawn: Any, kept: Any) -> None:
        with torch.no_grad():
            for p in layers.values():
                p["step"] += 1
                if int(p["step"]) <= self.wait:
                    p["Ak"].copy_(p["A"])
                    p["Bk"].copy_(p["B"])
