"""The training step: the loss of a batch, and one optimizer step. Every training loop of the project uses it.

The loss of a step is the sum of its rows' losses over what they weigh: the mean over rows for a classification, over
learned tokens for a language model. Where the rows are divided among passes and processes (loop.py), the parts add up
to it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import DDP_IGNORES
from loralab.objectives import Batch, Objective, by_row


class Forward(nn.Module):
    """A model as an objective runs it, as one module, so that wrappers as DistributedDataParallel see the whole."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, forward
        self.train(model.training)  # a module begins in train mode, whatever is in it
        setattr(self, DDP_IGNORES, [f"model.{key}" for key in getattr(model, DDP_IGNORES, ())])

    def forward(self, batch: Batch) -> Tensor:
        """Return outputs (sequences, ...)."""
        return self.run(self.model, batch)


def targets(batch: Batch, labels: Tensor) -> Tensor:
    """Return the labels that a loss is of: those of tokens (sequences, t) where the batch has them, else of rows."""
    return batch.get("labels", labels)


def forward_loss(
    model: nn.Module, objective: Objective, batch: Batch, labels: Tensor, weight: float, autocast: bool = False
) -> Tensor:
    """Return the loss of a batch, labels (rows, ...), whose rows weigh `weight` together."""
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=autocast):
        outputs = objective.forward(model, batch)  # (sequences, ...)
    return objective.loss(by_row(outputs, len(labels)), targets(batch, labels)).sum() / weight


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
    objective: Objective,
    batch: Batch,
    labels: Tensor,
    weight: float,
    optimizer: torch.optim.Optimizer,
    learned: Sequence[Tensor],
    clip: float = 1.0,
    autocast: bool = False,
) -> Tensor:
    """Take one optimizer step on one batch, labels (rows, ...); return its loss, without the graph."""
    loss = forward_loss(model, objective, batch, labels, weight, autocast)
    loss.backward()
    apply_gradients(optimizer, learned, clip)
    return loss.detach()
