"""LoRA-drop: layers with a large update keep their own (A, B), all others share one pair per kind of layer (Zhou et
al., 2024).

g = mean over real tokens of |dW x|^2, with dW the update of a layer and x its input; the importance is g / sum of g.
The layers of largest importance that together have the part `keep` of it keep their own pairs.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.inputs import Batches, each_input, evaluating
from loralab.rankmap import LayerRank, RankMap
from loralab.ranks.groups import alike, check_linear
from loralab.update import Dense, Update


def importance(adapters: AdaptedModel, name: str, batches: Batches) -> dict[str, float]:
    """Path -> part of the layer in the squared output of all updates, in evaluation, over tokens that are no padding.

    A batch is what `model(**batch)` takes; its attention_mask marks the padding. Raises UserError if a layer gets no
    token, and if all updates are zero or one is not finite.
    """
    paths = adapters.spec(name).paths
    check_linear({path: adapters.layers[path] for path in paths}, "LoRA-drop")
    sums, counts = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0)
    updates = {path: adapters.layers[path].lower(name) for path in paths}  # nothing learns meanwhile

    def add(path: str, x: Tensor) -> None:
        sums[path] += float(update_of(x, adapters.layers[path].base, updates[path]).double().square().sum())
        counts[path] += len(x)

    with torch.no_grad(), evaluating(adapters.model), adapters.use(name):
        each_input(adapters.model, batches, {path: adapters.layers[path] for path in paths}, add)
    if unseen := [path for path in paths if not counts[path]]:
        raise UserError(f"no token went through {unseen[0]} ({len(unseen)} of {len(paths)} layers): pass batches")
    means = {path: sums[path] / counts[path] for path in paths}
    if not math.isfinite(sum(means.values())):
        raise UserError(f"the update of adapter {name!r} is not finite: train it with a lower learning rate")
    if not sum(means.values()) > 0:
        raise UserError(f"the update of adapter {name!r} is zero in every layer: train it before it is scored")
    return {path: mean / sum(means.values()) for path, mean in means.items()}


def update_of(x: Tensor, base: Any, u: Update | Dense) -> Tensor:
    """dW x = (W' - W) x (n, out), with W' the merged weight: the part of the output that the adapter adds."""
    y = u.times(x)  # (n, out)
    if u.gain is None:
        return y
    g = u.gain.to(x.dtype)
    added: Tensor = g * y + (g - 1) * base.linear(x)
    return added


def parent(path: str) -> str:
    """The path of the module that holds a layer: q, k and v of one transformer block have the same."""
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
    """The map of LoRA-drop from the `scores` of `importance` and the `sizes` of `shapes`.

    Layers of one group keep their own pairs together, or share together. Raises UserError unless 0 <= keep <= 1.
    """
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
