"""The memory of a run: counted from its tensors, by layer and purpose, and the peak that the process reached.

Each storage counts once, for the first tensor that has it. The purposes are weights (all that the model holds),
gradients, optimizer, and activations: what autograd keeps for the backward pass.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import HANDLE
from loralab.layer import Adapted

STATUS = Path("/proc/self/status")
REST = "outside the layers"  # masks, the loss
PURPOSES = ("weights", "gradients", "optimizer", "activations")
Layers = dict[str, dict[str, int]]  # layer -> purpose -> bytes


def tensor_bytes(tensors: Any) -> int:
    """Return the bytes of the storages behind tensors, each storage once."""
    return sum({_key(t): _size(t) for t in tensors if isinstance(t, Tensor)}.values())


def _key(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)  # fake tensors have one too


def _size(t: Tensor) -> int:
    return t.untyped_storage().nbytes()


def layer_of(path: str, model: nn.Module) -> str:
    """Return the layer that a path belongs to: bert.encoder.layer.3, or outside numbered layers bert.embeddings."""
    names = path.split(".")
    number = next((i for i, name in enumerate(names) if name.isdecimal()), None)
    if number is not None:
        return ".".join(names[: number + 1])
    return ".".join(names[: 2 if names[0] == getattr(model, "base_model_prefix", None) else 1])


def held(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (path, tensor) of all that a model holds: parameters, buffers, constants and memories of methods."""
    handle = getattr(model, HANDLE, None)
    return [*model.named_parameters(), *model.named_buffers(), *_of_methods(model, handle.specs if handle else ())]


def of_adapter(model: nn.Module, name: str, without: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """Return (path, tensor) of what a model holds for one adapter, `without` the tensors that other adapters learn."""
    others = {id(t) for t in without}
    everything = [*model.named_parameters(), *model.named_buffers(), *_of_methods(model, {name})]
    return [(path, t) for path, t in everything if id(t) not in others]


def _of_methods(model: nn.Module, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) of constants and of what methods remember from step to step (AdaLoRA's means)."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            yield from ((path, t) for name, group in module.constants.items() if name in names for t in group.values())
    handle = getattr(model, HANDLE, None)
    memories = handle.steps.memories if handle else {}
    for name, layers in memories.items():
        if name in names:
            yield from ((path, t) for path, memory in layers.items() for t in memory.values())


@contextmanager
def saved_by_layer(model: nn.Module, on: bool = True) -> Iterator[dict[str, int]]:
    """Collect layer -> bytes that autograd keeps for the backward pass, without what the model holds."""
    saved: dict[str, int] = {}
    if not on:
        yield saved
        return
    counted = {_key(t) for _, t in held(model)}
    within: list[str] = [REST]

    def pack(t: Tensor) -> Tensor:
        if _key(t) not in counted:
            counted.add(_key(t))
            saved[within[-1]] = saved.get(within[-1], 0) + _size(t)
        return t

    names = {layer_of(path, model) for path, _ in model.named_parameters()}
    modules = [(name, module) for name, module in model.named_modules() if name in names]
    hooks = [hook for name, module in modules for hook in _stacked(module, name, within)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield saved
    finally:
        for hook in hooks:
            hook.remove()


def _stacked(module: nn.Module, name: str, within: list[str]) -> tuple[Any, Any]:
    """Register hooks that put `name` on the stack `within` while the module is computed."""

    def enter(*_: Any) -> None:
        within.append(name)

    def leave(*_: Any) -> None:
        within.pop()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)


def by_layer(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    learned: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    activations: Mapping[str, int],
) -> Layers:
    """Return layer -> purpose -> bytes of the (path, tensor) in `tensors`; gradients are as large as what learns."""
    out: Layers = {}
    counted: set[int] = set()
    learns = {id(t) for t in learned}

    def of(path: str) -> dict[str, int]:
        return out.setdefault(layer_of(path, model), dict.fromkeys(PURPOSES, 0))

    def add(path: str, purpose: str, t: Tensor) -> None:
        if _key(t) not in counted:
            counted.add(_key(t))
            of(path)[purpose] += _size(t)

    for path, t in tensors:
        add(path, "weights", t)
        if id(t) in learns:
            of(path)["gradients"] += t.numel() * t.element_size()
            for state in optimizer.state.get(t, {}).values():
                if isinstance(state, Tensor):
                    add(path, "optimizer", state)
    for name, size in activations.items():
        out.setdefault(name, dict.fromkeys(PURPOSES, 0))["activations"] += size
    return out


def ledger(layers: Layers) -> dict[str, int]:
    """Return bytes by purpose, summed over all layers."""
    return {purpose: sum(layer[purpose] for layer in layers.values()) for purpose in PURPOSES}


class Peak:
    """The peak memory above what the process held when this was made: of the GPU if there is one, else resident."""

    def __init__(self, gpu: bool | None = None) -> None:
        trim()
        self.gpu = torch.cuda.is_available() if gpu is None else gpu
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        if sys.platform == "linux":
            with suppress(OSError):  # a /proc that may not be written
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = _resident("VmRSS")

    @property
    def bytes(self) -> int:
        """The peak above what there was before."""
        return max(0, self.reached - self.before)

    @property
    def reached(self) -> int:
        """The peak itself."""
        return torch.cuda.max_memory_allocated() if self.gpu else _resident("VmHWM")


def trim() -> None:
    """Return free memory to the system and the GPU. Allocators keep it, and the next run would be charged for it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) in bytes; without /proc the peak since the process began."""
    if not STATUS.exists():
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
