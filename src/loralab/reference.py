"""A frozen copy of an adapted model that shares its base: the reference policy of DPO and its like."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.layer import Adapted

ROUNDED = 0.01  # by how much of itself a frozen value may change: `fast` and `to` round to bfloat16


def frozen_copy(handle: AdaptedModel) -> nn.Module:
    """The model as it answers now, in eval mode: what learns is copied, the frozen base is the very same tensors."""
    shared: dict[int, Any] = {id(p): p for p in handle.model.parameters() if not p.requires_grad}
    for name in handle.specs:  # an adapter that is frozen now may learn later
        for t in handle.state(name).values():
            shared.pop(id(t), None)
    for layer in [m for m in handle.model.modules() if isinstance(m, Adapted)]:  # a quantized weight is buffers
        shared |= {id(b): b for b in layer.base.buffers()}
    held = [t for m in handle.model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    shared |= {id(t): t.detach().clone() for t in held}  # a state of the last forward pass
    frozen: nn.Module = copy.deepcopy(handle.model, shared).requires_grad_(False).eval()
    watched = next((p for p in sorted(filter(_plain, shared.values()), key=Tensor.numel) if p.any()), None)
    if watched is not None:
        frozen.register_forward_pre_hook(_unchanged(watched))
    return frozen


def _plain(p: Any) -> bool:
    """Whether a tensor is a parameter whose values are all here, as numbers."""
    return type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta


def _unchanged(p: Tensor) -> Callable[..., None]:
    """A hook that raises UserError once a shared tensor was written to by what averages a reference with its policy.

    It would write r (1 - a) + p a into r, and as r is p, scale the base of both by 1 - a^2.
    """
    before = p.detach().clone()

    def check(*_: Any) -> None:
        if not torch.allclose(p.detach(), before.to(p), rtol=ROUNDED, atol=0.0):
            raise UserError(
                "the base that this reference shares with its policy was written to, so both are changed: load the "
                "base anew, and give no adapters.reference() to what averages it with the policy (TRL's sync_ref_model)"
            )

    hook: Callable[..., None] = torch.compiler.disable(check)
    return hook
