"""Groups: layers of one kind and one shape share factors; needs no training and no data.

For SuperLoRA (Chen et al., 2024) a share is a group that spans its layers, for LoRA it is one pair (A, B) for all.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from loralab.coverage import folded
from loralab.errors import UserError
from loralab.experts import AdaptedStack
from loralab.heads import head_of
from loralab.kinds.stack import Stack
from loralab.layer import is_linear
from loralab.rankmap import LayerRank, RankMap
from loralab.targets import Targets, cover, layer_at, shape_of


def groups(
    model: nn.Module,
    targets: Targets = "all-linear",
    rank: int = 8,
    span: int | None = None,
    by: Callable[[str], str] = folded,
    exclude: Sequence[str] = (),
) -> RankMap:
    """The map of a model that is not adapted yet: each group holds at most `span` layers of one kind and shape.

    Raises UserError for a span below 2 and for stacks of experts.
    """
    if span is not None and span < 2:
        raise UserError(f"span={span}: expected how many layers a group may have, 2 or more")
    paths = cover(model, targets, head_of(model), exclude).paths
    layers = {path: layer_at(model, path) for path in paths}
    check_matrices(layers, "groups")
    shares = alike({path: shape_of(layer) for path, layer in layers.items()}, span, by)
    return RankMap({path: LayerRank(rank, shares.get(path)) for path in paths})


def check_matrices(layers: Mapping[str, nn.Module], policy: str) -> None:
    """Raise UserError for stacks of experts, whose A and B are no matrices."""
    _refuse([path for path, layer in layers.items() if isinstance(layer, Stack | AdaptedStack)], policy)


def check_linear(layers: Mapping[str, nn.Module], policy: str) -> None:
    """Raise UserError for what is no linear layer, where a policy looks at vectors that go through, or at a store."""
    _refuse([path for path, layer in layers.items() if not is_linear(layer)], policy)


def _refuse(paths: list[str], policy: str) -> None:
    if paths:
        raise UserError(f"{policy} does not rank layers like {paths[0]} ({len(paths)} of them): exclude them")


def alike(
    sizes: Mapping[str, tuple[int, int]], span: int | None = None, by: Callable[[str], str] = folded
) -> dict[str, str]:
    """Path -> share, of at most `span` layers of one kind and one (out, in); a layer that is alone has none."""
    kinds: dict[str, list[str]] = {}
    for path, (out_features, in_features) in sizes.items():
        kinds.setdefault(f"{by(path)} {out_features}x{in_features}", []).append(path)
    shares: dict[str, str] = {}
    for share, paths in kinds.items():
        size = span or len(paths)
        cuts = [paths[i : i + size] for i in range(0, len(paths), size)]
        for number, cut in enumerate(cuts):
            name = share if len(cuts) == 1 else f"{share} {number}"
            shares |= dict.fromkeys(cut, name) if len(cut) > 1 else {}
    return shares
