"""IA3: y = diag(l) W x + b, one learned factor l (out,) for each output (Liu et al., 2022).

Layers that `inputs` names have their inputs scaled instead, y = W diag(l) x + b with l (in,), as the paper does before
the second layer of a feed-forward block. l starts at one. As an update it is D = diag(l - 1) W or W diag(l - 1), which
sees W. The layers of the paper have no bias; one that is there is not scaled here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.methods.base import Factors, Roles, ends_in


@dataclass(frozen=True)
class IA3(Factors):
    inputs: tuple[str, ...] = ()
    """Layers whose inputs are scaled, by the ends of their paths; of all others the outputs are."""

    kind: ClassVar[str] = "ia3"
    roles: ClassVar[tuple[str, ...]] = ("l",)
    learn: ClassVar[tuple[str, ...]] = ("l",)
    low_rank: ClassVar[bool] = False
    sees_weight: ClassVar[bool] = True
    gains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.inputs, str | list):
            object.__setattr__(self, "inputs", (self.inputs,) if isinstance(self.inputs, str) else tuple(self.inputs))

    def on(self, path: str) -> "IA3":
        return OfInput(self.inputs) if any(ends_in(path, name) for name in self.inputs) else self

    def strangers(self, paths: Sequence[str]) -> list[str]:
        return [
            f"inputs={name!r} is the end of no path that is adapted" for name in self.inputs
            if not any(ends_in(path, name) for path in paths)
        ]  # fmt: skip

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        return {"l": torch.ones(self.sizes(out_features, in_features)["l"])}

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        return (p["l"] - 1).unsqueeze(-1) * p["W"].to(p["l"].dtype)  # (..., out, in)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"l": out_features}


@dataclass(frozen=True)
class OfInput(IA3):
    """A layer whose inputs are scaled."""

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        return p["W"].to(p["l"].dtype) * (p["l"] - 1).unsqueeze(-2)  # (..., out, in)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"l": in_features}
