"""What a run's memory is made of, counted from its tensors, and the peak that the process really reached."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STATUS = Path("/proc/self/status")


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the storages behind tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


@contextmanager
def saved_activations(model: nn.Module, on: bool = True) -> Iterator[dict[int, int]]:
    """Collects storage -> bytes of what autograd keeps for the backward pass, parameters and buffers left out."""
    if not on:
        yield {}
        return
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def ledger(
    weights: Iterable[Tensor], learned: Sequence[Tensor], optimizer: torch.optim.Optimizer, activations: int
) -> dict[str, int]:
    """Bytes by purpose; `activations` are those of one step."""
    return {
        "weights": tensor_bytes(weights),
        "gradients": sum(p.numel() * p.element_size() for p in learned),
        "optimizer": tensor_bytes(t for state in optimizer.state.values() for t in state.values()),
        "activations": activations,
    }


class Peak:
    """Peak memory above what the process held when this was made: of the GPU where there is one, else resident."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():  # not measured
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):  # another libc, or a /proc that may not be written
                ctypes.CDLL(None).malloc_trim(0)  # memory of an earlier run goes back, so that it is not counted here
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = _resident("VmRSS")

    @property
    def bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
        return max(0, peak - self.before)


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) in bytes; where there is no /proc, the peak since the process began."""
    if not STATUS.exists():
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
