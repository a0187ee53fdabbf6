"""What layers that are computed in one, of encoders and decoders, have in common."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loralab.active import Stream
from loralab.errors import UserError
from loralab.fast.masks import mask as dropout_mask

SHORT = 48  # tokens up to which softmax by exp and sum beats torch's, whose rows are then too short for vectors


class LayerCall(NamedTuple):
    """One forward of one layer: its modules, and what holds for this forward alone."""

    modules: Any  # what function.py says: those of an encoder or a decoder
    products: Any  # of its linear layers, each a JoinedLinear
    dropout: tuple[float, ...]  # probabilities now
    streams: Sequence[Stream]
    read: "ReadWeights | None"  # what the backward pass reads again, None where no gradient is wanted

    @property
    def wants_gradient(self) -> bool:
        """Whether there will be a backward pass."""
        return self.read is not None


class ReadWeights:
    """The frozen weights of modules as a forward pass read them; the backward pass reads them again.

    Buffers are looked at for their place alone: DistributedDataParallel writes them anew, as they are, at each forward.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.weights = [
            (module, key, held, t.detach(), None if held is module._buffers or t.is_inference() else t._version)
            for module in modules
            for held in (module._parameters, module._buffers)
            for key, t in held.items()
            if t is not None and key != "bias"
        ]

    def check(self) -> None:
        """Raise UserError where a weight was edited or replaced since."""
        for module, key, held, seen, version in self.weights:
            now = held.get(key)
            if now is None or _place(now) != _place(seen) or (version is not None and now._version != version):
                raise UserError(
                    f"{key} of a {type(module).__name__} was changed between the forward and the backward pass: the "
                    'gradient would be another; change it after backward, or call adapters.fast(speed="off")'
                )


def _place(t: Tensor) -> tuple[Any, Any]:
    return t.untyped_storage()._cdata, t.storage_offset()


def autocasts(device: str) -> bool:
    """Whether autocast is on for that type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Turn autocast off where it is on: tensors have the dtype they are to be computed in."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def refuse_more_than_a_gradient(grad: Tensor) -> None:
    """Raise UserError in a backward pass that is to be differentiated again, or that takes a batch of gradients.

    `once_differentiable` raises when a second derivative comes back to it. Where `torch.autograd.grad` asks for it
    there is no way through it, and a product with the Hessian was zero, or a part of it.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    if torch.is_grad_enabled() or batched:
        asked = "is_grads_batched or vectorize" if batched else "create_graph"
        raise UserError(
            f"{asked}=True: the fast path gives one gradient and no second derivative; call "
            'adapters.fast(speed="off") first'
        )


def add_mask(s: Tensor, mask: Tensor | None) -> Tensor:
    """s + mask, in place, for scores s (b, heads, t, t); a boolean mask is true where attention may look.

    It is added too: `masked_fill_` on the scores takes up to six times as long where a mask is the same for all heads.
    """
    if mask is None:
        return s
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=s.dtype).masked_fill_(~mask, torch.finfo(s.dtype).min)
    return s.add_(mask)


def softmax(s: Tensor) -> Tensor:
    """Softmax over the last axis, in place where rows are short."""
    if s.shape[-1] > SHORT or s.device.type != "cpu":
        return torch.softmax(s, -1)
    s = s.sub_(s.amax(-1, keepdim=True)).exp_()
    return s.mul_(s.sum(-1, keepdim=True).reciprocal_())


def blank_rows(s: Tensor, mask: Tensor | None) -> Tensor:
    """Zero, in place, the weights s (b, heads, t, t) of tokens that may look nowhere, as torch's attention gives them.

    `mask`, which broadcasts to s, is true where attention may look, or is added to scores.
    """
    if mask is None or isinstance(s, FakeTensor):
        return s
    seen = mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask.amax(-1, keepdim=True) > -math.inf
    return s if s.device.type == "cpu" and seen.all() else s.masked_fill_(~seen, 0)


def dropout_of(x: Tensor, p: float, streams: Sequence[Stream]) -> Tensor | None:
    """The dropout mask of x (rows, ...); None where nothing is dropped."""
    return dropout_mask(x, p, streams) if p else None
