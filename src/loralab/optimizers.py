"""Optimizer groups, among them those of LoRA+ (Hayou et al., 2024): B learns at lr * ratio, A at lr; and AdamW.

Paged AdamW keeps its moments in memory that moves to the CPU when the GPU runs short (QLoRA). The arithmetic is the
same, so results are too. On a CPU there is nothing to page. Not measured: written for CUDA.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralab.errors import UserError


class Kind(NamedTuple):
    """What a tensor is to an optimizer."""

    rate: str  # "B" learns at lr * ratio, "head" at its own rate, anything else at lr
    decays: bool


def by_role(key: str, role: str, t: Tensor) -> Kind:
    """B alone is boosted; vectors do not decay."""
    return Kind(role, t.ndim > 1)


def as_peft(key: str, role: str, t: Tensor) -> Kind:
    """Every vector is boosted as B is, a gain and the bias of a head too; only biases do not decay."""
    return Kind("B" if role == "B" or t.ndim == 1 else "A", key.rpartition(".")[2] != "bias")


GROUPINGS: dict[str, Callable[[str, str, Tensor], Kind]] = {"roles": by_role, "peft": as_peft}


def grouped(
    learned: Mapping[str, tuple[str, Tensor]],
    grouping: str,
    lr: float,
    ratio: float,
    head_lr: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The groups of `learned`, path.role -> (role, tensor); each group has one role."""
    if grouping not in GROUPINGS:
        raise UserError(f"grouping={grouping!r}: choose one of {', '.join(GROUPINGS)}")
    if grouping == "peft" and head_lr is not None:
        raise UserError(f"head_lr={head_lr} with grouping='peft': there a head has no rate of its own; leave it out")
    rates = {"B": lr * ratio, "head": lr if head_lr is None else head_lr}
    groups: dict[tuple[str, Kind], dict[str, Any]] = {}
    for key, (role, t) in learned.items():
        kind = GROUPINGS[grouping](key, role, t)
        decay = weight_decay * kind.decays
        fresh = {"params": [], "lr": rates.get(kind.rate, lr), "weight_decay": decay, "role": role}
        groups.setdefault((role, kind), fresh)["params"].append(t)
    return list(groups.values())


def adamw(groups: Sequence[dict[str, Any]], paged: bool = False, fused: bool | None = None) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; `paged=True` pages its moments where all parameters lie on CUDA.

    `fused=True` does a step in one pass over memory, `None` leaves that to torch.
    """
    if not paged:
        return torch.optim.AdamW(groups, fused=fused)
    devices = sorted({p.device.type for group in groups for p in group["params"]})
    if devices != ["cuda"]:
        warnings.warn(f"paged=True does nothing on {', '.join(devices)}: plain AdamW, same results", stacklevel=2)
        return torch.optim.AdamW(groups, fused=fused)
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError as error:
        raise UserError("paged=True needs bitsandbytes: pip install loralab[quant]") from error
    paging: torch.optim.Optimizer = PagedAdamW32bit(groups)
    return paging
