"""Single tokens: of an embedding W (out, V), or an output layer W (V, in), only the vectors of some tokens change.

W + D^T S for an embedding and W + S^T D for an output layer, S (k, V) with a one at each token and D (k, width)
learned, zero at the start: a low-rank product of which one side is fixed. PEFT's trainable_token_indices holds
W[tokens] + D.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from loralab.methods.base import Factors, Roles


@dataclass(frozen=True)
class Tokens(Factors):
    """The tokens of one layer. No recipe has these factors: a rank map gives them to a layer (see `LayerRank`)."""

    tokens: tuple[int, ...] = ()
    vocabulary: int = 0
    rows: bool = False

    kind: ClassVar[str] = "tokens"
    roles: ClassVar[tuple[str, ...]] = ("D",)
    learn: ClassVar[tuple[str, ...]] = ("D",)
    shared: ClassVar[tuple[str, ...]] = ("D",)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        size = out_features if self.rows else in_features
        if size == self.vocabulary:
            return None
        return f"tokens of a vocabulary of {self.vocabulary}: this layer has {size}"

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        return {"D": torch.zeros(len(self.tokens), in_features if self.rows else out_features)}  # (k, width)

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        D = p["D"]  # (k, width)
        S = F.one_hot(torch.tensor(self.tokens, device=D.device), self.vocabulary).to(D.dtype)  # (k, V)
        return (D, S.mT) if self.rows else (S, D.mT)

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"D": len(self.tokens) * (in_features if self.rows else out_features)}
