"""What the inputs x of a layer span: the eigenvectors of the sum of x x^T (in, in) over tokens, which are the right
singular vectors of all inputs stacked (n, in), found without keeping them. The eva start begins there (Paischer et al.,
2024).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.methods.starts import InputDirections
from loralab.recipe import Recipe


def look(
    handle: AdaptedModel, recipe: Recipe, paths: Sequence[str], batches: Iterable[Mapping[str, Any]] | None
) -> dict[str, InputDirections]:
    """What a start must see of the base before a layer is touched; raises UserError if it cannot."""
    start = recipe.start
    if start == "loftq" and (gone := [path for path in paths if path in handle.layers]):
        kept = handle.layers[gone[0]].store
        raise UserError(
            f"start='loftq': {gone[0]} is kept {kept} already, its own weight is gone; attach loftq before the others"
        )
    if start != "eva":
        return {}
    if batches is None:
        raise UserError(f"start={start!r} looks at data: pass batches=[...], each what model(**batch) takes")
    with handle.use(None):
        return observe(handle.model, batches, {path: recipe.at(path).factors.rank for path in paths})  # type: ignore


@torch.no_grad()
def observe(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], ranks: Mapping[str, int]
) -> dict[str, InputDirections]:
    """What the inputs of layers span, without padding, from forward passes over `batches`; `ranks`: path -> rank.

    A batch is what `model(**batch)` takes; its attention_mask tells the padding. Nothing in the model changes. The SVD
    is of the inputs as they are, not less their mean. The shares can decide how a budget of ranks is spread.
    """
    grams: dict[str, Tensor] = {}  # (in, in): sums of x x^T
    counts = dict.fromkeys(ranks, 0)
    mask: list[Tensor | None] = [None]

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = _tokens(inputs[0], mask[0])  # (n, in)
            gram = (x.T @ x).double()  # sums over many batches keep their digits
            grams[path] = grams[path] + gram if path in grams else gram
            counts[path] += len(x)

        return hook

    training = {m: m.training for m in model.modules()}
    hooks = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in ranks]
    device = next(model.parameters()).device
    try:
        model.eval()
        for batch in batches:
            on = {key: t.to(device) if isinstance(t, Tensor) else t for key, t in batch.items()}
            mask[0] = on.get("attention_mask")
            model(**on)
    finally:
        for handle in hooks:
            handle.remove()
        for module, was in training.items():
            module.training = was
    if few := [path for path, rank in ranks.items() if counts[path] < rank]:
        told = f"rank {ranks[few[0]]} for {few[0]} needs as many tokens to look at, it saw {counts[few[0]]}"
        raise UserError(f"{told} ({len(few)} of {len(ranks)} layers saw too few): pass more batches")
    return {path: _span(grams[path], rank) for path, rank in ranks.items()}


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (n, in) of a layer's input that are no padding; a mask of another shape speaks of other rows."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.bool()].float()
    return x.reshape(-1, x.shape[-1]).float()


def _span(gram: Tensor, rank: int) -> InputDirections:
    squares, V = torch.linalg.eigh(gram.cpu())  # rising
    squares, V = squares.flip(0).clamp_min(0), V.flip(1).T
    sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    return InputDirections((V * sign)[:rank].float(), (squares / squares.sum()).float())
