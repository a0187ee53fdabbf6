"""int8: W_ij ~ scale_i * q_ij with q in -127..127 and scale_i = max_j |W_ij| / 127, a symmetric scale per row.

The row-wise absmax rule of LLM.int8() (Dettmers et al., 2022), for the weight alone: 8 + 32/in bits a value, any size.
"""

import torch
from torch import Tensor

from loralab.stores.quantized import Codec, Kept


def encode(W: Tensor) -> Kept:
    """W (out, in) -> codes (out, in) and scale (out,)."""
    scale = W.abs().amax(1) / 127  # (out,)
    codes = (W / scale.clamp_min(1e-38).unsqueeze(1)).round().clamp(-127, 127)
    return {"codes": codes.to(torch.int8), "scale": scale}


def decode(kept: Kept, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of `encode`, to rounding: W (out, in) in that dtype."""
    return (kept["codes"] * kept["scale"].unsqueeze(1)).to(dtype)


INT8 = Codec(encode, decode)
