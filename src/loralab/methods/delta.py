"""Delta-LoRA: W follows the low-rank product, W <- W + follow (alpha / r) (B' A' - B A) after `wait` steps
(Zi et al., 2023).

The steps telescope to W + follow s (B A - Bk Ak), where (Ak, Bk) are the factors after `wait` steps, so W is never
written: the update is [A; A; Ak] and [s B, follow s B, -follow s Bk]. The middle pair has no gradient, as W is a
constant to autograd. During the wait (Ak, Bk) are copies of (A, B), and the difference is zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.errors import UserError
from loralab.methods.base import Roles, not_whole
from loralab.methods.lora import LoRA

LONGEST_WAIT = 500  # the paper's K, for runs of many thousand steps
SHARE_OF_RUN = 10  # a run of 200 to 5,000 steps waits a tenth of them, as 500 would be all or most of it


@dataclass(frozen=True)
class DeltaLoRA(LoRA):
    follow: float = 2.0
    """How far W follows the product (the paper's lambda)."""
    wait: int | None = None
    """Optimizer steps before W follows (the paper's K): by default a tenth of the run, at most the paper's 500. In a
    loop of your own, whose length is unknown, the default is 0: W follows from the first step on."""

    kind: ClassVar[str] = "delta-lora"
    roles: ClassVar[tuple[str, ...]] = ("A", "B", "Ak", "Bk", "step")
    stepped: ClassVar[bool] = True
    counter: ClassVar[str] = "step"
    drops: ClassVar[bool] = False  # W, which follows B A, never sees dropped inputs
    revision: ClassVar[int] = 2  # 1: wait=500 whatever the length of the run

    def problems(self) -> list[str]:
        return super().problems() + ([] if self.wait is None else not_whole("wait", self.wait, 0))

    def for_steps(self, total_steps: int) -> "DeltaLoRA":
        if self.wait is None:
            return replace(self, wait=min(LONGEST_WAIT, total_steps // SHARE_OF_RUN))
        if self.wait >= total_steps:
            raise UserError(
                f"wait={self.wait} with a run of {total_steps} steps: W would never follow, so delta-lora would be "
                f"plain lora; expected 0 to {total_steps - 1}, or none for a tenth of the run"
            )
        return self

    def notes(self, total_steps: int) -> list[str]:
        if self.wait is None or self.wait <= total_steps // 2:
            return []
        return [f"delta-lora: wait={self.wait} makes the first {self.wait} of {total_steps} steps plain lora"]

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        p = super().init(out_features, in_features, generator)
        return {**p, "Ak": p["A"].clone(), "Bk": p["B"].clone(), "step": torch.zeros(1, dtype=torch.int64)}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        A, B, s = p["A"], p["B"], self.scaling
        up = [s * B, self.follow * s * B.detach(), -self.follow * s * p["Bk"]]
        return torch.cat([A, A.detach(), p["Ak"]], -2), torch.cat(up, -1)  # (..., 3r, in), (..., out, 3r)

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, Roles], drawn: Any, before: Any, step: int) -> None:
        if step <= (self.wait or 0):
            for p in layers.values():
                p["Ak"].copy_(p["A"])
                p["Bk"].copy_(p["B"])
