"""The gradient of a loss by the weight W (out, in) of frozen layers: the sum of dL/dy x^T over tokens.

It is collected by hooks, so no weight has to require a gradient, and a weight kept in few bits has one too. The lora-ga
start begins with it (Wang et al., 2024).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import UserError
from loralab.inputs import evaluating, on_device

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]  # (model, batch) -> a number


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a model of transformers computes of a batch with labels. Raises UserError where there is none."""
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise UserError(
            "a start looks at gradients, and the model gives no loss of its batches: put labels into them, or pass "
            "loss=, a function of model and batch"
        )
    return loss


def weight_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], paths: Sequence[str], loss: Loss = own_loss
) -> dict[str, Tensor]:
    """Path -> the gradient (out, in) of the summed losses by the weight of that layer, without dropout.

    Nothing in the model changes. Raises UserError for layers that the loss does not depend on.
    """
    found: dict[str, Tensor] = {}
    learned = [p for p in model.parameters() if p.requires_grad]

    def watch(path: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = inputs[0].detach()
            if not y.requires_grad:  # nothing before it does: the graph begins here
                y = y.detach().requires_grad_().clone()

            def add(dy: Tensor) -> None:
                gradient = dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()  # (out, in)
                found[path] = found[path] + gradient if path in found else gradient

            y.register_hook(add)
            return y

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    for p in learned:
        p.requires_grad_(False)  # else backward would leave a gradient in it
    try:
        with evaluating(model), torch.enable_grad():
            for batch in on_device(model, batches):
                loss(model, batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for p in learned:
            p.requires_grad_(True)
    if none := [path for path in paths if path not in found or not found[path].any()]:
        raise UserError(
            f"{none[0]} has no gradient on these batches ({len(none)} of {len(paths)} layers have none), so there is "
            "nothing to start from: exclude it, or pass other batches"
        )
    return found
