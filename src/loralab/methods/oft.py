"""OFT: y = W R^T x + b, R block-diagonal and orthogonal, R_i = (I + Q_i)(I - Q_i)^-1 by Cayley (Qiu et al., 2023).

Q_i (k, k) is skew-symmetric, and its k (k - 1) / 2 numbers above the diagonal learn. They start at zero, where R is the
identity. So the angles between rows of W stay as they are. As an update it is D = W (R^T - I), which sees W, and
R^T - I = -2 (I + Q)^-1 Q is computed as it stands, so that a small Q loses no digits.

`terms` makes PEFT's Neumann series in the place of the inverse: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), which is nearly
orthogonal for small Q.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from loralab.methods.base import Factors, Roles, nearest_divisor, not_whole


@dataclass(frozen=True)
class OFT(Factors):
    block: int = 32
    """Side k of the blocks of R; an input that it does not divide gets the nearest side that does, as in PEFT."""
    one_block: bool = False
    """All blocks of a layer are one and the same rotation."""
    terms: int = 0
    """Terms of the Neumann series in the place of the inverse, 3 or more; 0 is the exact rotation."""

    kind: ClassVar[str] = "oft"
    roles: ClassVar[tuple[str, ...]] = ("Q",)
    learn: ClassVar[tuple[str, ...]] = ("Q",)
    low_rank: ClassVar[bool] = False
    sees_weight: ClassVar[bool] = True

    def problems(self) -> list[str]:
        wrong = [*not_whole("block", self.block, 2), *not_whole("terms", self.terms, 0)]
        return wrong if wrong or self.terms not in (1, 2) else [f"terms={self.terms}: expected 0, or 3 and more"]

    def misfit(self, out_features: int, in_features: int) -> str | None:
        return None if in_features > 1 else f"block {self.block}: an input of {in_features} value cannot be rotated"

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        k = nearest_divisor(in_features, self.block, 2)
        return {
            "Q": torch.zeros(1 if self.one_block else in_features // k, k * (k - 1) // 2)
        }  # (blocks, k (k - 1) / 2)

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        k = nearest_divisor(in_features, self.block, 2)
        wide = torch.promote_types(p["Q"].dtype, torch.float32)  # torch solves nothing in fewer bits
        turn = self._turn(skew(p["Q"].to(wide), k)).to(p["Q"].dtype)  # (..., blocks, k, k)
        W = p["W"].to(turn.dtype).unflatten(-1, (-1, k)).movedim(-2, -3)  # (blocks, out, k)
        D: Tensor = (W @ turn).movedim(-3, -2).flatten(-2)  # (..., out, in)
        return D

    def _turn(self, Q: Tensor) -> Tensor:
        """R^T - I (..., k, k) of skew matrices Q."""
        if not self.terms:
            eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
            exact: Tensor = -2 * torch.linalg.solve(eye + Q, Q)
            return exact
        power = Q.mT
        turn = 2 * power
        for exponent in range(2, self.terms):
            power = power @ Q.mT
            turn = turn + (power if exponent == self.terms - 1 else 2 * power)
        return turn

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        k = nearest_divisor(in_features, self.block, 2)
        return {"Q": (1 if self.one_block else in_features // k) * (k * (k - 1) // 2)}


def skew(values: Tensor, k: int) -> Tensor:
    """The numbers above the diagonals (..., k (k - 1) / 2), row by row, as skew-symmetric matrices (..., k, k)."""
    rows, columns = torch.triu_indices(k, k, 1, device=values.device)
    upper = values.new_zeros(*values.shape[:-1], k, k)
    upper[..., rows, columns] = values
    return upper - upper.mT
