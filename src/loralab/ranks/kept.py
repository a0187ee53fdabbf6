"""The ranks that AdaLoRA's falling budget left to every layer, as a map for another run."""

from typing import TYPE_CHECKING

from loralab.errors import UserError
from loralab.factors.adalora import AdaLoRA, kept_gates
from loralab.ranks import RankMap

if TYPE_CHECKING:
    from loralab.attach import Adapters


def kept_map(adapters: "Adapters", name: str | None = None) -> RankMap:
    """Layer -> number of its gates that are open; a layer that lost all of them is left out of a run with the map."""
    name = adapters.only(name)
    entry = adapters.entry(name)
    if not isinstance(entry.recipe.factors, AdaLoRA):
        raise UserError(f"adapter {name!r} has no gates that a budget closes: train one of method adalora")
    gates = kept_gates({path: adapters.layers[path].roles(name) for path in entry.paths})
    if not any(map(any, gates.values())):
        raise UserError(f"adapter {name!r}: all gates are closed, as they are before the first step; train it")
    return RankMap({path: sum(kept) for path, kept in gates.items()})
