"""What this machine computes fast."""

import torch


def fast_bfloat16() -> bool:
    """Whether products in bfloat16 run in hardware: AMX or AVX512-BF16 on CPU, tensor cores on CUDA (not measured)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
