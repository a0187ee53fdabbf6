"""The training step: the loss of every row, and one optimizer step. Every training loop of the project uses it.

The loss of a step is the mean over its rows. Where the rows are divided among passes and processes (loop.py), the parts
add up to that mean.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,): cross-entropy for int64 labels, squared error for float labels; logits (rows, outputs)."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def forward_loss(model: nn.Module, batch: Mapping[str, Tensor], labels: Tensor, autocast: bool = False) -> Tensor:
    """Return the mean loss of a batch, labels (rows,)."""
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=autocast):
        logits = model(**batch).logits  # (rows, outputs)
    return row_losses(logits.float(), labels).mean()


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    learned: Sequence[Tensor],
    clip: float,
    clip_norm: Callable[..., Any] = nn.utils.clip_grad_norm_,
    schedule: Any = None,
) -> None:
    """Clip the gradients of `learned` (unless `clip` is 0), step the optimizer and the schedule, drop the gradients."""
    if clip:
        clip_norm(learned, clip)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    optimizer.zero_grad(set_to_none=True)


def step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    learned: Sequence[Tensor],
    clip: float = 1.0,
    autocast: bool = False,
) -> Tensor:
    """Take one optimizer step on one batch, labels (rows,); return the mean loss, without its graph."""
    loss = forward_loss(model, batch, labels, autocast)
    loss.backward()
    apply_gradients(optimizer, learned, clip)
    return loss.detach()
