"""Dropout masks from packed random words: one 64-bit word decides eight values, each by one of its bytes.

torch draws one random number for each value on CPU, which takes longer than the products of a small encoder. A byte
keeps its value if it is below k, where k is 256 (1 - p) rounded up or down at random for each mask, so that p is met on
the average over masks. What is kept is scaled by 256 / k, so that a mask has mean 1 whichever k it got. Each mask takes
its seed from torch's own generator: `torch.manual_seed` repeats a run, and a checkpoint of torch's state resumes it.

Where runs share a batch, each has a stream of its own and gets the masks that it would get alone. On another device
than the CPU torch draws the masks, from one generator a device that each mask seeds.
"""

import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from loralab.active import Stream

TOKENS = {3: (1,), 4: (2, 3)}  # axes of tokens by the number of axes: (rows, t, d) and (rows, heads, t, t)


def has_own_streams(streams: Sequence[Stream]) -> bool:
    """Whether random numbers come from generators of the runs, not from torch's own."""
    return any(stream.generator is not torch.default_generator for stream in streams)


def mask(like: Tensor, p: float, streams: Sequence[Stream] = ()) -> Tensor:
    """A tensor of the shape and dtype of `like`: 1 / (1 - p) with probability 1 - p, else 0.

    With several `streams`, `like` is (rows, d), (rows, t, d) or (rows, heads, t, t), its rows in as many equal parts.
    """
    if len(streams) < 2:
        return _drawn(like, like.shape, p, _seeds(streams[0].generator if streams else None, like))
    parts = like.view(len(streams), -1, *like.shape[1:])  # (K, b, ...)
    whole = torch.empty_like(parts, memory_format=torch.contiguous_format)
    if like.device.type not in ("cpu", "meta") and p < 1 and not isinstance(like, FakeTensor):
        return _in_place(whole, p, streams).view_as(like)
    drawn: dict[Any, Tensor] = {}  # runs of one seed and one order of rows have the same masks
    for stream, part in zip(streams, whole, strict=True):
        shape, seeds = _unpadded(part.shape, stream, streams), _seeds(stream.generator, like)
        if (shape, seeds) not in drawn:
            drawn[shape, seeds] = _drawn(like, shape, p, seeds)
        if shape != part.shape:
            part.fill_(1)
        part[tuple(map(slice, shape))] = drawn[shape, seeds]
    return whole.view_as(like)


def _in_place(whole: Tensor, p: float, streams: Sequence[Stream]) -> Tensor:
    """Fill `whole` (K, b, ...) with a mask for each stream, on another device than the CPU: a kernel for each, as few
    as can be, because a step waits there for the kernels to be asked for."""
    whole.fill_(1 - p)  # what pads becomes 1
    for stream, part in zip(streams, whole, strict=True):
        own = part[tuple(map(slice, _unpadded(part.shape, stream, streams)))]
        own.bernoulli_(1 - p, generator=_seeded(whole.device, _seeds(stream.generator, whole)[0]))
    return whole.div_(1 - p)


def _unpadded(part: Sequence[int], stream: Stream, streams: Sequence[Stream]) -> tuple[int, ...]:
    """The shape of a run's part without the rows and tokens that pad it."""
    padded = max(s.tokens for s in streams)
    axes = [axis for axis in TOKENS.get(len(part), ()) if part[axis] == padded]
    return (stream.rows, *(stream.tokens if axis in axes else n for axis, n in enumerate(part[1:], 1)))


def _seeds(generator: torch.Generator | None, like: Tensor) -> tuple[int, int]:
    """A seed, and 32 bits that round k up or down; always from a CPU generator, so no device waits for them."""
    if isinstance(like, FakeTensor):  # of an estimate: it has a size and no data
        return 0, 0
    seed, fraction = torch.randint(2**32, (2,), generator=generator, device="cpu").tolist()
    return seed, fraction


def _drawn(like: Tensor, shape: Sequence[int], p: float, seeds: tuple[int, int]) -> Tensor:
    """A mask of that shape, in the dtype and on the device of `like`."""
    seed, fraction = seeds
    if p >= 1:
        return like.new_zeros(shape)
    if like.device.type != "cpu" or 256 * (1 - p) < 1:  # a byte cannot keep fewer than one of 256
        return _drawn_by_torch(like, shape, p, seed)
    below = int(256 * (1 - p) + fraction / 2**32)  # k
    count = math.prod(shape)
    half = -(-count // 8) * 4
    # compared by the high byte of each: first the high, then the low
    bits = torch.empty(2, half, dtype=torch.int16, device="cpu")
    bits[0] = _words(seed, half, like)
    torch.bitwise_left_shift(bits[0], 8, out=bits[1])
    bits.le_((below - 128) * 256 - 1)  # 1 where the value is kept
    bits = bits.view(-1)[:count].view(shape)
    scale = torch.tensor(256 / below, dtype=like.dtype, device="cpu")
    if like.element_size() == 2:  # the bits of the scale, times 0 or 1: no pass over the values for a cast
        return bits.mul_(int(scale.view(torch.int16))).view(like.dtype)
    return bits.to(like.dtype).mul_(scale)


@lru_cache(maxsize=64)  # threads come and go
def _generator(device: torch.device, thread: int) -> torch.Generator:
    """The one generator of a device in a thread, seeded anew for each mask: to make one costs more than to draw."""
    return torch.Generator(device)


def _drawn_by_torch(like: Tensor, shape: Sequence[int], p: float, seed: int) -> Tensor:
    """A mask of that shape by torch's own numbers."""
    return like.new_empty(shape).bernoulli_(1 - p, generator=_seeded(like.device, seed)).div_(1 - p)


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return _generator(device, threading.get_ident()).manual_seed(seed)


def _words(seed: int, count: int, like: Tensor) -> Tensor:
    """Random int16 (count,); count is a multiple of 4."""
    if isinstance(like, FakeTensor):
        return torch.empty(count, dtype=torch.int16)
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, count // 4, dtype=np.uint64)
    return torch.from_numpy(words.view(np.int16))


class Dropped(torch.autograd.Function):
    """x * mask, keeping the mask alone."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, streams: Sequence[Stream]) -> Tensor:  # type: ignore[no-untyped-def]
        m = mask(x, p, streams)
        ctx.save_for_backward(m)
        return x * m

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        return grads[0] * ctx.saved_tensors[0], None, None


def dropout(x: Tensor, p: float = 0.5, training: bool = True, streams: Sequence[Stream] = ()) -> Tensor:
    """What `torch.nn.functional.dropout` does, with masks of this file where they are faster or runs share a batch."""
    if not training or p == 0:
        return x
    torch_draws_fast = x.device.type != "cpu" and not has_own_streams(streams)
    follows = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if torch_draws_fast or torch.compiler.is_compiling() or follows:
        return F.dropout(x, p)
    return Dropped.apply(x, p, streams)  # type: ignore[no-untyped-call, no-any-return]
