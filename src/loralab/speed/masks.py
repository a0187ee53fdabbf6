"""Dropout masks from packed random words: one 64-bit word decides eight values, each by one of its bytes.

torch draws one random number for each value on CPU, which takes longer than the products of a small encoder. A byte
keeps its value if it is below k, where k is 256 (1 - p) rounded up or down at random for each mask, so that p is met on
the average over masks; what is kept is scaled by 256 / k, so that a mask has mean 1 whichever k it got. Each mask takes
its seed from torch's own generator: `torch.manual_seed` repeats a run, and a checkpoint of torch's state resumes it.
"""

import numpy as np
import torch
from torch import Tensor


def mask(like: Tensor, p: float) -> Tensor:
    """A tensor of the shape and dtype of `like` (on CPU): 1 / (1 - p) with probability 1 - p, else 0."""
    seed, fraction = torch.randint(2**32, (2,)).tolist()
    below = int(256 * (1 - p) + fraction / 2**32)  # k
    half = -(-like.numel() // 8) * 4
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, half // 4, dtype=np.uint64)
    drawn = torch.empty(2, half, dtype=torch.int16)  # compared by the high byte of each: first the high, then the low
    drawn[0] = torch.from_numpy(words.view(np.int16))
    torch.bitwise_left_shift(drawn[0], 8, out=drawn[1])
    drawn.lt_((below - 128) * 256)  # 1 where the value is kept
    drawn = drawn.view(-1)[: like.numel()].view(like.shape)
    scale = torch.tensor(256 / below, dtype=like.dtype)
    if like.element_size() == 2:  # the bits of the scale, times 0 or 1: no pass over the values for a cast
        return drawn.mul_(int(scale.view(torch.int16))).view(like.dtype)
    return drawn.to(like.dtype).mul_(scale)


class Dropped(torch.autograd.Function):
    """x * mask, keeping the mask alone."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:  # type: ignore[no-untyped-def]
        m = mask(x, p)
        ctx.save_for_backward(m)
        return x * m

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return grads[0] * ctx.saved_tensors[0], None


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """What `torch.nn.functional.dropout` does."""
    if not training or p == 0:
        return x
    return Dropped.apply(x, p)  # type: ignore[no-untyped-call, no-any-return]
