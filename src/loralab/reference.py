"""A frozen copy of an adapted model that shares its base: the reference policy of DPO and its like."""

import copy
from typing import Any

from torch import Tensor, nn

from loralab.adapted import AdaptedModel
from loralab.layer import Adapted


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
    return copy.deepcopy(handle.model, shared).requires_grad_(False).eval()
