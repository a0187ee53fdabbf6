"""The training step: the loss of every row, and one optimizer step. Every loop of the project takes this one.

The loss of a run's step is the mean over its rows; however the rows are divided among passes and processes, the sum of
their parts is that mean (see loop.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,): cross-entropy for int64 labels, squared error for float labels; logits (rows, outputs)."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def forward_loss(model: nn.Module, batch: Mapping[str, Tensor], labels: Tensor, autocast: bool = False) -> Tensor:
    """The mean loss of a batch, labels (rows,)."""
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
    """Clip the gradients of what is learned (`clip` 0 does not), step the optimizer and the schedule, drop them."""
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
    """One optimizer step of one run on one batch, labels (rows,); the mean loss, without its graph."""
    loss = forward_loss(model, batch, labels, autocast)
    loss.backward()
    apply_gradients(optimizer, learned, clip)
    return loss.detach()
