"""What layers with rotary positions have in common: the rotation, what their call gives, and what they do not take."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

LONGEST = 512  # tokens of a row: what is kept of the scores grows with their square, and torch's attention keeps none


class RotaryModules:
    """The part of a layer's modules that deals with positions and the mask."""

    attention: Any  # holds the probability of dropout, and is on while it trains
    reads: ClassVar[tuple[str, ...]] = ("position_embeddings",)  # arguments of a call beside the input and the mask

    @property
    def attention_p(self) -> float:
        """The probability that attention dropout has now."""
        return float(self.attention.attention_dropout) if self.attention.training else 0.0

    def given(self, told: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """What a call gives beside the mask: cos and sin (b or 1, t, head)."""
        return tuple(told.get("position_embeddings") or (None, None))

    def misfit(self, x: Tensor, mask: Tensor | None, given: tuple[Tensor | None, ...]) -> str | None:
        """Why these inputs are not computed in one, None if they are: x (b, t, d), mask (b or 1, heads or 1, t, t)."""
        t = x.shape[1]
        if given[0] is None:
            return "no rotary embeddings are given"
        if t > LONGEST:
            return f"rows of {t} tokens: above {LONGEST} torch's attention, which keeps no scores, takes less"
        if mask is not None and (mask.ndim != 4 or mask.shape[-2] not in (1, t)):
            return f"a mask of shape {tuple(mask.shape)} is given"
        return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + [-x2, x1] sin for x (b, t, heads, dh) = [x1, x2] and cos, sin (b or 1, t, 1, dh)."""
    a, z = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((-z, a), -1), sin)


def rotate_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of x in `rotate`."""
    a, z = (dy * sin).chunk(2, -1)
    return torch.addcmul(torch.cat((z, -a), -1), dy, cos)
