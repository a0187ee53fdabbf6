"""int2: blocks of 64 values, each divided by its root mean square and rounded to one of four levels; 2 + 32/64 bits.

The levels are those of the two-bit quantizer with the least squared error for a normal variable (Max, 1960): each level
is the mean of the values rounded to it. The error of a normal weight is 34 % of its norm, against 9 % with NF4, so this
is a store for methods that correct a poor base. The absmax rule of NF4 would waste the outer levels on the few largest
values. Any size fits: the last block is padded with zeros, which do not count in its root mean square.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from loralab.stores.quantized import Codec, Kept, from_blocks, in_blocks

BLOCK = 64
LEVELS = (-1.5104176, -0.4527800, 0.4527800, 1.5104176)
EDGE = 0.9815988  # halfway between the outer two
SHIFTS = (0, 2, 4, 6)  # first bit of each of the four codes of a byte


def encode(W: Tensor) -> Kept:
    """W (out, in) -> codes (blocks * 16,) with four values a byte, and scale (blocks,)."""
    V = in_blocks(W, BLOCK)  # (blocks, 64)
    count = torch.full((len(V),), float(BLOCK), device=W.device)
    count[-1] -= V.numel() - W.numel()
    scale = (V.square().sum(1) / count).sqrt()  # (blocks,)
    edges = torch.tensor([-EDGE, 0.0, EDGE], device=W.device)
    codes = torch.bucketize(V / scale.clamp_min(1e-38).unsqueeze(1), edges).to(torch.uint8)  # (blocks, 64)
    shifts = torch.tensor(SHIFTS, device=W.device, dtype=torch.uint8)
    packed = (codes.view(-1, 4) << shifts).sum(1, dtype=torch.uint8)
    return {"codes": packed, "scale": scale}


def decode(kept: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of `encode`, to rounding: W of that shape and dtype."""
    codes, scale = kept["codes"], kept["scale"]
    shifts = torch.tensor(SHIFTS, device=codes.device, dtype=torch.uint8)
    every_byte = torch.arange(256, device=codes.device, dtype=torch.uint8).unsqueeze(1)  # (256, 1)
    table = torch.tensor(LEVELS, device=codes.device)[((every_byte >> shifts) & 3).int()]  # (256, 4)
    V = F.embedding(codes.int(), table).view(-1, BLOCK) * scale.unsqueeze(1)  # (blocks, 64)
    return from_blocks(V, shape).to(dtype)


INT2 = Codec(encode, decode)
