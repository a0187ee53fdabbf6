"""LoRA-drop: layers whose update says much keep their own (A, B), all others share one pair per kind of layer (Zhou et
al., 2024).

g = mean over real tokens of |dW x|^2, dW the update of a layer and x its input; the importance is g / sum of g. The
layers that come first, largest importance first, until `keep` of it is reached, keep their own.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.rankmap import LayerRank, RankMap
from loralab.ranks.groups import alike
from loralab.update import Dense, Update

Batches = Iterable[Mapping[str, Any]]


def importance(adapters: AdaptedModel, name: str, batches: Batches) -> dict[str, float]:
    """Path -> share of the layer in the squared output of all updates, in evaluation, over tokens that are no padding.

    A batch is what `model(**batch)` takes; its attention_mask tells the padding.
    """
    paths = adapters.spec(name).paths
    sums, counts = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)
    mask: list[Tensor | None] = [None]

    def watch(path: str) -> Callable[..., None]:
        layer = adapters.layers[path]
        u = layer.lower(name)  # nothing learns meanwhile

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = real_tokens(inputs[0], mask[0])  # (n, in)
            sums[path] += float(update_of(x, layer.base, u).double().square().sum())
            counts[path] += len(x)

        return hook

    with torch.no_grad(), evaluating(adapters.model), adapters.use(name):
        hooks = [adapters.layers[path].register_forward_pre_hook(watch(path)) for path in paths]
        try:
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                adapters.model(**batch)
        finally:
            for handle in hooks:
                handle.remove()
    if unseen := [path for path in paths if not counts[path]]:
        raise UserError(f"no token went through {unseen[0]} ({len(unseen)} of {len(paths)} layers): pass batches")
    means = {path: sums[path] / counts[path] for path in paths}
    if not math.isfinite(sum(means.values())):
        raise UserError(f"the update of adapter {name!r} is not finite: train it with a lower learning rate")
    if not sum(means.values()) > 0:
        raise UserError(f"the update of adapter {name!r} is zero in every layer: train it before it is scored")
    return {path: mean / sum(means.values()) for path, mean in means.items()}


def update_of(x: Tensor, base: Any, u: Update | Dense) -> Tensor:
    """dW x = (W' - W) x (n, out), with W' the merged weight: what the adapter adds, without what the base gives."""
    y = u.times(x)
    if u.gain is None:
        return y
    g = u.gain.to(x.dtype)
    added: Tensor = g * y + (g - 1) * base.linear(x)
    return added


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (n, in) of a layer's input that are tokens of the batch and no padding.

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
    """Evaluation mode for a while; every module then is as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def parent(path: str) -> str:
    """The module a layer is in: q, k and v of one transformer block have one."""
    return path.rpartition(".")[0]


def shapes(adapters: AdaptedModel, name: str) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of the layers of an adapter."""
    layers = {path: adapters.layers[path] for path in adapters.spec(name).paths}
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def drop_map(
    scores: Mapping[str, float],
    sizes: Mapping[str, tuple[int, int]],
    rank: int = 8,
    keep: float = 0.9,
    group: Callable[[str], str] = parent,
) -> RankMap:
    """The map of LoRA-drop: `scores` from `importance`, `sizes` from `shapes`; layers of one group stay together."""
    if not 0 <= keep <= 1:
        raise UserError(f"keep={keep}: expected a part of the importance, 0 to 1")
    grouped: dict[str, float] = {}
    for path, score in scores.items():
        grouped[group(path)] = grouped.get(group(path), 0.0) + score
    total, reached, kept = sum(grouped.values()), 0.0, set()
    for name in sorted(grouped, key=lambda name: -grouped[name]):
        if reached >= keep * total * (1 - 1e-9):  # sums of shares miss 1 by rounding
            break
        reached += grouped[name]
        kept.add(name)
    shares = alike({path: sizes[path] for path in scores if group(path) not in kept})
    return RankMap({path: LayerRank(rank, shares.get(path)) for path in scores})
