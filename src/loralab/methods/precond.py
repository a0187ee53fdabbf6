"""LoRA-FA with a preconditioned gradient: g_B <- (1/s^2) g_B (A A^T + delta I)^-1 before the optimizer's step.

This is the variant of PEFT's LoraFAOptimizer. A is frozen, so the r x r matrix is constant. It acts on each row of g_B
by itself: where FSDP divides tensors by rows, A alone has to be put together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loralab.errors import UserError
from loralab.methods.base import Factors, Roles, whole
from loralab.methods.lora import LoRA


@dataclass(frozen=True)
class PreconditionedLoRA(LoRA):
    delta: float = 1e-8
    """Added to the diagonal of A A^T before it is inverted."""

    kind: ClassVar[str] = "lora-fa-precond"
    learn: ClassVar[tuple[str, ...]] = ("B",)
    stepped: ClassVar[bool] = True
    one_alpha: ClassVar[bool] = True  # s of a layer divides the gradient of its B

    def problems(self) -> list[str]:
        return super().problems() + ([] if self.delta >= 0 else [f"delta={self.delta!r}: expected 0 or more"])

    def before_step(self, layers: Mapping[str, Roles], drawn: Any, own: Mapping[str, Factors]) -> None:
        for path, p in {id(p["B"]): (path, p) for path, p in layers.items()}.values():  # of layers that share B, one
            if p["B"].grad is not None:
                A, g = p["A"].detach(), p["B"].grad.detach()
                A = whole(A)  # (r, in)
                A = A.to(torch.promote_types(A.dtype, torch.float32))  # torch solves nothing in fewer bits
                g = g.to_local() if hasattr(g, "to_local") else g  # (out, r), or the rows that are here
                if g.shape[-1] != len(A):
                    raise UserError(f"{self.kind}: B is divided by columns, {tuple(g.shape)}: let FSDP divide its rows")
                gram = A @ A.mT + self.delta * torch.eye(len(A), dtype=A.dtype, device=A.device)  # (r, r)
                g.copy_(torch.linalg.solve(gram, g.to(A.dtype), left=False) / own[path].scaling ** 2)  # type: ignore[attr-defined]
