"""AdamW, and its paged form: the moments lie in memory that moves to the CPU when the GPU runs short (QLoRA).

The arithmetic is the same, so results are too. On a CPU there is nothing to page. Not measured: written for CUDA.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from loralab.errors import UserError


def adamw(groups: Sequence[dict[str, Any]], paged: bool = False) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; `paged=True` pages its moments where all parameters lie on CUDA."""
    if not paged:
        return torch.optim.AdamW(groups)
    devices = sorted({p.device.type for group in groups for p in group["params"]})
    if devices != ["cuda"]:
        warnings.warn(f"paged=True does nothing on {', '.join(devices)}: plain AdamW, same results", stacklevel=2)
        return torch.optim.AdamW(groups)
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError as error:
        raise UserError("paged=True needs bitsandbytes: pip install loralab[quant]") from error
    paging: torch.optim.Optimizer = PagedAdamW32bit(groups)
    return paging
