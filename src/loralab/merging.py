"""What a merge may be in, and what it warns of."""

import torch

from loralab.errors import UserError

MERGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TieNote(UserWarning):
    """Weights that were one are two in a merged model."""


def merge_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of a name or dtype; raises UserError for what an update cannot be merged into."""
    found = MERGE_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in MERGE_DTYPES.values():
        raise UserError(
            f"merge into {dtype}: choose one of {', '.join(MERGE_DTYPES)}; fewer bits would round most of the update "
            "away, so keep the adapter beside a quantized base, or quantize the merged model anew and measure it"
        )
    return found
