"""NF4: blocks of 64 values, each divided by its largest magnitude and rounded to one of 16 quantiles of a normal.

W ~ absmax * code[q] takes 4 + 32/64 = 4.5 bits a value. With double quantization the absmax values, less their mean,
are kept in 8 bits with one float32 for each 256 of them: 4 + 8/64 + 32/(64*256) = 4.127 bits (Dettmers et al., 2023).
Any size fits: the last block is padded with zeros, which do not change its absmax.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.stores.quantized import Codec, Kept, from_blocks, in_blocks

BLOCK, ABSMAX_BLOCK = 64, 256
AT_ONCE = 4096  # blocks a call; on CPU bitsandbytes makes temporaries of 16 times the input


def library() -> Any:
    """bitsandbytes.functional. Raises UserError if bitsandbytes is not installed."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise UserError("stores nf4 and nf4-dq need bitsandbytes: pip install loralab[quant]") from error
    return bnb


def encode(W: Tensor, double: bool) -> Kept:
    """W (out, in) -> packed codes and absmax (blocks,), the latter in 8 bits if `double`."""
    bnb = library()
    quantize = partial(bnb.quantize_4bit, blocksize=BLOCK, quant_type="nf4")
    quantized = [quantize(blocks) for blocks in in_blocks(W, BLOCK).split(AT_ONCE)]
    codes = torch.cat([codes for codes, _ in quantized])  # two values a byte
    absmax = torch.cat([state.absmax for _, state in quantized])  # (blocks,)
    if not double:
        return {"codes": codes, "absmax": absmax}
    mean = absmax.mean()
    small, state = bnb.quantize_blockwise(absmax - mean, blocksize=ABSMAX_BLOCK)
    return {"codes": codes, "absmax_codes": small, "absmax_scale": state.absmax, "absmax_mean": mean}


def decode(kept: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of `encode`, to rounding: W of that shape and dtype."""
    bnb, codes = library(), kept["codes"]
    if "absmax" in kept:
        absmax = kept["absmax"]  # (blocks,)
    else:
        scale = kept["absmax_scale"]
        absmax = bnb.dequantize_blockwise(kept["absmax_codes"], absmax=scale, blocksize=ABSMAX_BLOCK)  # (blocks,)
        absmax += kept["absmax_mean"]
    narrow = torch.float32 if dtype == torch.float64 else dtype  # bitsandbytes knows no float64
    state = bnb.QuantState(absmax, (len(absmax), BLOCK), blocksize=BLOCK, quant_type="nf4", dtype=narrow)
    return from_blocks(bnb.dequantize_4bit(codes, state), shape).to(dtype)


NF4 = Codec(partial(encode, double=False), decode)
NF4_DQ = Codec(partial(encode, double=True), decode)
