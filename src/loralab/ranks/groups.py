"""Groups: layers of one kind and one shape share, whatever a share is to the method; no training, no data.

For SuperLoRA (Chen et al., 2024) a share is a group that spans its layers, for LoRA one pair (A, B) in all of them.
"""

import re
from collections.abc import Callable, Mapping

from torch import nn

from loralab.errors import UserError
from loralab.heads import head_of
from loralab.rankmap import LayerRank, RankMap
from loralab.targets import Targets, cover, shape_of


def kind(path: str) -> str:
    """The path with its numbers folded: layers of one kind differ in their block only."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def groups(
    model: nn.Module,
    targets: Targets = "all-linear",
    rank: int = 8,
    span: int | None = None,
    by: Callable[[str], str] = kind,
) -> RankMap:
    """The map of a model that is not adapted yet: each group holds at most `span` layers of one kind and shape."""
    if span is not None and span < 2:
        raise UserError(f"span={span}: expected how many layers a group may have, 2 or more")
    paths = cover(model, targets, head_of(model)).paths
    shares = alike({path: shape_of(model.get_submodule(path)) for path in paths}, span, by)
    return RankMap({path: LayerRank(rank, shares.get(path)) for path in paths})


def alike(
    sizes: Mapping[str, tuple[int, int]], span: int | None = None, by: Callable[[str], str] = kind
) -> dict[str, str]:
    """Path -> the share of layers of its kind and its (out, in), at most `span` of them; what is alone has none."""
    found: dict[str, list[str]] = {}
    for path, (out, into) in sizes.items():
        found.setdefault(f"{by(path)} {out}x{into}", []).append(path)
    shares: dict[str, str] = {}
    for share, paths in found.items():
        size = span or len(paths)
        cuts = [paths[i : i + size] for i in range(0, len(paths), size)]
        for number, cut in enumerate(cuts):
            name = share if len(cuts) == 1 else f"{share} {number}"
            shares |= dict.fromkeys(cut, name) if len(cut) > 1 else {}
    return shares
