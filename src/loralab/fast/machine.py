"""What this machine is, and how fast it multiplies."""

import platform
import time
from functools import cache
from typing import Any

import torch

UNITS = {"amx": "amx_tile", "avx512_bf16": "avx512_bf16"}  # units of a CPU for bfloat16 -> torch's name

SIZE = 2048  # of the square product that the rate is taken with: large enough that nothing else counts
TRIES = 3

SMALL = 512  # of the product that decides whether bfloat16 pays: a few milliseconds
PAYS = 1.2  # times the rate of float32, and bfloat16 is worth its rounding


def units() -> dict[str, bool]:
    """Name -> whether this CPU has that unit."""
    return {name: bool(getattr(torch.cpu, f"_is_{word}_supported", bool)()) for name, word in UNITS.items()}


def precision(dtype: str, gpu: bool | None = None) -> torch.dtype:
    """The dtype of products for a setting: auto is bfloat16 where it is fast here, else float32."""
    fast = dtype == "bfloat16" or (dtype == "auto" and fast_bfloat16(gpu))
    return torch.bfloat16 if fast else torch.float32


def fast_bfloat16(gpu: bool | None = None) -> bool:
    """Whether products in bfloat16 are faster than in float32: on CUDA with tensor cores, on a CPU with AMX.

    A CPU with AVX512-BF16 alone is measured, once a process: on an AMD EPYC bfloat16 is several times as fast, on an
    Intel Xeon whose AMX is switched off half as fast. `gpu` says which is used; None: the GPU if there is one.
    """
    if torch.cuda.is_available() if gpu is None else gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = units()
    return has["amx"] or (has["avx512_bf16"] and _bfloat16_pays())


@cache
def _bfloat16_pays() -> bool:
    narrow, wide = (rate(dtype, SMALL, "cpu") for dtype in (torch.bfloat16, torch.float32))
    return narrow > PAYS * wide


def hardware(gpu: bool | None = None) -> dict[str, Any]:
    """The machine, as run files record it; without the GPU where it is not used."""
    cpu = torch.backends.cpu.get_cpu_capability()
    name = torch.cuda.get_device_name() if gpu is not False and torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    return {"machine": platform.machine(), "cpu": cpu, "amx": units()["amx"], "threads": threads, "gpu": name}


def rate(dtype: torch.dtype, size: int = SIZE, on: str | None = None) -> float:
    """Operations a second of a large matrix product on `on` (None: the GPU if there is one), the fastest of a few."""
    on = on or ("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(on, dtype)
    y, out = x.clone(), torch.empty_like(x)
    torch.mm(x, y, out=out)
    best = float("inf")
    for _ in range(TRIES):
        started = time.perf_counter()
        torch.mm(x, y, out=out)
        if on == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
