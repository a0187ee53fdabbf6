"""The layers of a model that a block can take the place of. An architecture is a row of encoders.py or decoders.py."""

from torch import nn

from loralab.fast import decoders, encoders
from loralab.fast.block import Find

LAYERS: dict[str, Find] = {**encoders.LAYERS, **decoders.LAYERS}  # class of a layer -> how to find its parts


def refused(model: nn.Module) -> str | None:
    """Why layers of a kind that is known are not computed in a block; None if there are none."""
    names = {type(m).__name__ for m in model.modules()}
    return next((f"a {name} computes itself: {why}" for name, why in encoders.REFUSED.items() if name in names), None)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that a `Block` can take the place of."""
    ours = [m for m in model.modules() if type(m).__module__.startswith("transformers.models.")]
    return [m for m in ours if type(m).__name__ in LAYERS]
