"""What the inputs x of a layer span: the eigenvectors of the sum of x x^T (in, in) over tokens.

They are the right singular vectors of all inputs stacked (n, in), found without keeping the inputs. The eva start
begins with them (Paischer et al., 2024).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import UserError
from loralab.methods.starts import InputDirections

Batches = Iterable[Mapping[str, Any]]  # each is what `model(**batch)` takes; its attention_mask tells the padding


@torch.no_grad()
def observe(model: nn.Module, batches: Batches, ranks: Mapping[str, int]) -> dict[str, InputDirections]:
    """Path -> the directions that the inputs of that layer span, without padding, from forward passes over `batches`.

    `ranks`: path -> how many directions. Nothing in the model changes. The SVD is of the inputs as they are, their mean
    is not subtracted. The shares can decide how a budget of ranks is divided.
    Raises UserError if a layer sees fewer tokens than its rank.
    """
    grams: dict[str, Tensor] = {}  # (in, in): sums of x x^T
    counts = dict.fromkeys(ranks, 0)

    def add(path: str, x: Tensor) -> None:
        x = x.float()
        gram = (x.T @ x).double()  # (in, in); sums over many batches keep their digits
        grams[path] = grams[path] + gram if path in grams else gram
        counts[path] += len(x)

    with evaluating(model):
        each_input(model, on_device(model, batches), {path: model.get_submodule(path) for path in ranks}, add)
    if few := [path for path, rank in ranks.items() if counts[path] < rank]:
        raise UserError(
            f"rank {ranks[few[0]]} for {few[0]} needs as many tokens to look at, it saw {counts[few[0]]} "
            f"({len(few)} of {len(ranks)} layers saw too few): pass more batches"
        )
    return {path: _span(grams[path], rank) for path, rank in ranks.items()}


def on_device(model: nn.Module, batches: Batches) -> Iterator[dict[str, Any]]:
    """The batches with their tensors on the device of a model."""
    device = next(model.parameters()).device
    for batch in batches:
        yield {key: t.to(device) if isinstance(t, Tensor) else t for key, t in batch.items()}


def each_input(
    model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> None:
    """Call `see(path, x)` with the real tokens x (n, in) of every input of the `layers`, over forward passes."""
    mask: list[Tensor | None] = [None]

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(path, real_tokens(inputs[0], mask[0]))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (n, in) of a layer's input that are tokens of the batch and no padding; mask (rows, t).

    A pooler's (rows, in) has no padding; an input of other rows (relative positions, say) is no token at all.
    """
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat
    if len(flat) == mask.numel():
        return flat[mask.bool().flatten()]
    return flat if len(x) == len(mask) else flat[:0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _span(gram: Tensor, rank: int) -> InputDirections:
    squares, V = torch.linalg.eigh(gram.cpu())  # (in,) rising, (in, in)
    squares, V = squares.flip(0).clamp_min(0), V.flip(1).T
    sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()  # (in, 1): the largest entry is positive
    return InputDirections((V * sign)[:rank].float(), (squares / squares.sum()).float())
