"""What this machine is, and what it computes fast."""

import platform
from typing import Any

import torch

UNITS = {
    "amx": "amx_tile",
    "avx512_bf16": "avx512_bf16",
}  # what a CPU may multiply bfloat16 with -> torch's word for it


def units() -> dict[str, bool]:
    """Which of `UNITS` this CPU has."""
    return {name: bool(getattr(torch.cpu, f"_is_{word}_supported", bool)()) for name, word in UNITS.items()}


def precision(dtype: str) -> torch.dtype:
    """What products run in for a --dtype: auto is bfloat16 where it is fast here, else float32."""
    fast = dtype == "bfloat16" or (dtype == "auto" and fast_bfloat16())
    return torch.bfloat16 if fast else torch.float32


def fast_bfloat16() -> bool:
    """Whether products in bfloat16 run in hardware: AMX or AVX512-BF16 on CPU, tensor cores on CUDA (not measured)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(units().values())


def hardware() -> dict[str, Any]:
    """What a run's files say of the machine."""
    cpu = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    return {"machine": platform.machine(), "cpu": cpu, "amx": units()["amx"], "threads": threads, "gpu": gpu}
