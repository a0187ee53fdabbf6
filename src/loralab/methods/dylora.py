"""DyLoRA: one run trains every rank. Each step draws one rank b for all layers and uses the first b rows of A and
columns of B: y = W x + (alpha / b) B[:, :b] A[:b] x (Valipour et al., 2023; the scale is that of the authors' code).

Frozen DyLoRA uses the same forward, but only row b of A and column b of B learn in that step; the others keep their
bits, also under an optimizer with momentum or decay, because they are put back after the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.methods.base import Roles
from loralab.methods.lora import LoRA


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
        if not wrong and not 1 <= self.minimum <= self.rank:
            wrong.append(f"minimum={self.minimum!r}: expected 1 to rank={self.rank}")
        return wrong

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        b = self.rank if drawn is None else drawn
        A, B = p["A"][..., :b, :], p["B"][..., :b]
        if self.frozen and drawn is not None:
            A = torch.cat([A[..., : b - 1, :].detach(), A[..., b - 1 :, :]], -2)
            B = torch.cat([B[..., : b - 1].detach(), B[..., b - 1 :]], -1)
        return A, B * (self.alpha / b)

    def draw(self, generator: Generator) -> int:
        return int(torch.randint(self.minimum, self.rank + 1, (), generator=generator))

    @property
    def ranks(self) -> Sequence[int]:
        return range(self.minimum, self.rank + 1)

    def before_step(self, layers: Mapping[str, Roles], drawn: Any) -> Any:
        if not self.frozen or drawn is None:
            return None
        return {path: (p["A"].detach().clone(), p["B"].detach().clone()) for path, p in layers.items()}

    def after_step(self, layers: Mapping[str, Roles], drawn: Any, kept: Any) -> None:
        if kept is None:
            return
        with torch.no_grad():
            for path, p in layers.items():
                A, B = kept[path]
                A[drawn - 1], B[:, drawn - 1] = p["A"][drawn - 1], p["B"][:, drawn - 1]
                p["A"].copy_(A)
                p["B"].copy_(B)
