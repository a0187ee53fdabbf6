"""DyLoRA: one run trains every rank. Each step draws one rank b for all layers and uses the first b rows of A and
columns of B: y = W x + (alpha / b) B[:, :b] A[:b] x (Valipour et al., 2023; the scale is that of the authors' code).

Frozen DyLoRA uses the same forward, but only row b of A and column b of B learn in that step. The others keep their
bits, also under an optimizer with momentum or decay, because they are put back after the step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.errors import UserError
from loralab.methods.base import Factors, Roles
from loralab.methods.lora import LoRA

ENOUGH_DRAWS = 10  # steps of a rank below which a run says how few it has


@dataclass(frozen=True)
class DyLoRA(LoRA):
    minimum: int = 1
    """Smallest rank that is trained; ranks are drawn uniformly from minimum to rank."""
    frozen: bool = False
    """Train only the last row and column of the drawn rank."""

    kind: ClassVar[str] = "dylora"
    stepped: ClassVar[bool] = True

    def problems(self) -> list[str]:
        wrong = super().problems()
        if not wrong and not (type(self.minimum) is int and 1 <= self.minimum <= self.rank):
            wrong.append(f"minimum={self.minimum!r}: expected 1 to rank={self.rank}")
        return wrong

    def for_steps(self, total_steps: int) -> "DyLoRA":
        count = len(self.ranks)
        if count == 1:
            raise UserError(f"rank={self.rank} with minimum={self.minimum}: one rank to draw is plain lora; raise rank")
        if total_steps < count:
            raise UserError(
                f"a run of {total_steps} steps cannot train ranks {self.minimum} to {self.rank}, as dylora trains one "
                f"rank a step: train {count} steps or more, or raise minimum"
            )
        return self

    def notes(self, total_steps: int) -> list[str]:
        count = len(self.ranks)
        if total_steps >= ENOUGH_DRAWS * count:
            return []
        return [f"dylora: {total_steps} steps train each of {count} ranks about {total_steps / count:.1f} times"]

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        b = self.rank if drawn is None else drawn
        A, B = p["A"][..., :b, :], p["B"][..., :b]  # (..., b, in), (..., out, b)
        if self.frozen and drawn is not None:
            A = torch.cat([A[..., : b - 1, :].detach(), A[..., b - 1 :, :]], -2)
            B = torch.cat([B[..., : b - 1].detach(), B[..., b - 1 :]], -1)
        return A, B * (self.alpha / (math.sqrt(b) if self.stabilized else b))

    def draw(self, generator: Generator) -> int:
        return int(torch.randint(self.minimum, self.rank + 1, (), generator=generator))

    @property
    def ranks(self) -> Sequence[int]:
        return range(self.minimum, self.rank + 1)

    def before_step(self, layers: Mapping[str, Roles], drawn: Any, own: Mapping[str, Factors]) -> Any:
        if not self.frozen or drawn is None:
            return None
        return {path: (p["A"].detach().clone(), p["B"].detach().clone()) for path, p in layers.items()}

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, Roles], drawn: Any, before: Any, step: int) -> None:
        if before is None:
            return
        for path, p in layers.items():
            A, B = before[path]  # (r, in), (out, r)
            A[drawn - 1], B[:, drawn - 1] = p["A"][drawn - 1], p["B"][:, drawn - 1]
            p["A"].copy_(A)
            p["B"].copy_(B)
