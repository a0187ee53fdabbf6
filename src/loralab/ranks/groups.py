"""Groups: layers of one kind and one shape share factors; needs no training and no data.

For SuperLoRA (Chen et al., 2024) a share is a group that spans its layers, for LoRA it is one pair (A, B) for all.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from loralab.coverage import folded
from loralab.errors import UserError
from loralab.heads import head_of
from loralab.rankmap import LayerRank, RankMap
from loralab.targets import Targets, cover, shape_of


def groups(
    model: nn.Module,
    targets: Targets = "all-linear",
    rank: int = 8,
    span: int | None = None,
    by: Callable[[str], str] = folded,
    exclude: Sequence[str] = (),
) -> RankMap:
    """The map of a model that is not adapted yet: each group holds at most `span` layers of one kind and shape.

    Raises UserError for a span below 2.
    """
    if span is not None and span < 2:
        raise UserError(f"span={span}: expected how many layers a group may have, 2 or more")
    paths = cover(model, targets, head_of(model), exclude).paths
    shares = alike({path: shape_of(model.get_submodule(path)) for path in paths}, span, by)
    return RankMap({path: LayerRank(rank, shares.get(path)) for path in paths})


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
