"""Optimizer groups, among them those of LoRA+ (Hayou et al., 2024): B learns at lr * ratio, A at lr; and AdamW.

Paged AdamW moves its moments to the CPU when the GPU runs short of memory (QLoRA). The arithmetic is the same, so
results are too. On a CPU it does nothing. Not measured: written for CUDA.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from loralab.adapted import AdaptedModel
from loralab.errors import UserError

# ---- groups ----------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How an optimizer treats a tensor."""

    rate: str  # "B" learns at lr * ratio, "head" at its own rate, anything else at lr
    decays: bool  # whether weight decay applies


def is_vector(role: str, t: Tensor) -> bool:
    """Whether a tensor of a layer is a vector; the gains m of a stack of experts (n, out) are n of them."""
    return t.ndim == 1 or role == "m"


def by_role(key: str, role: str, t: Tensor) -> Kind:
    """Learn B faster; no weight decay on vectors."""
    return Kind(role, not is_vector(role, t))


def as_peft(key: str, role: str, t: Tensor) -> Kind:
    """Learn B and every vector faster, a gain and the bias of a head too; no weight decay on biases."""
    return Kind("B" if role == "B" or is_vector(role, t) else "A", key.rpartition(".")[2] != "bias")


GROUPINGS: dict[str, Callable[[str, str, Tensor], Kind]] = {"roles": by_role, "peft": as_peft}


def grouped(
    learned: Mapping[str, tuple[str, Tensor]],
    grouping: str,
    lr: float,
    ratio: float,
    head_lr: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The groups of `learned`, path.role -> (role, tensor); each group has one role.

    Raises UserError for an unknown grouping, and for a head's own rate where the grouping has none.
    """
    if grouping not in GROUPINGS:
        raise UserError(f"grouping={grouping!r}: choose one of {', '.join(GROUPINGS)}")
    wrong = {"lr": lr, "head_lr": head_lr, "weight_decay": weight_decay}
    if least := [f"{key}={value}" for key, value in wrong.items() if value is not None and value < 0]:
        raise UserError(f"{', '.join(least)}: expected 0 or more")
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

    `fused=True` does a step in one pass over memory, `None` leaves that to torch. Raises UserError if paging needs a
    package that is missing.
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


# ---- optimizers that would move nothing ------------------------------------------------------------------------------

WATCHED: "WeakSet[AdaptedModel]" = WeakSet()
CHECKED: "WeakSet[torch.optim.Optimizer]" = WeakSet()
REGISTERED: list[Any] = []  # the one hook of torch that checks optimizers


def watch(handle: AdaptedModel) -> None:
    """Refuse, at its first step, an optimizer of torch that holds tensors of this model of which none learns."""
    WATCHED.add(handle)
    if not REGISTERED:
        REGISTERED.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _check(optimizer)))


def _check(optimizer: torch.optim.Optimizer) -> None:
    if optimizer in CHECKED:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for handle in list(WATCHED):
        own = [(key, p) for key, p in handle.model.named_parameters() if id(p) in held]
        if own and not any(p.requires_grad for _, p in own):
            raise UserError(
                f"this optimizer would move nothing: it holds {len(own)} frozen tensors of the base ({own[0][0]}, ...) "
                "and none of an adapter. Was it made before attach? Make it after, from adapters.parameter_groups()"
            )
    CHECKED.add(optimizer)
