"""The ranks that AdaLoRA's falling budget left to every layer, as a map for another run."""

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.methods.adalora import AdaLoRA, kept_gates
from loralab.rankmap import RankMap


def kept_map(adapters: AdaptedModel, name: str | None = None) -> RankMap:
    """Layer -> number of its open gates; a layer without one has rank 0, so a run with the map leaves it out.

    Raises UserError for an adapter of another method, and for one that was not trained.
    """
    name = adapters.only(name)
    spec = adapters.spec(name)
    if not isinstance(spec.recipe.factors, AdaLoRA):
        raise UserError(f"adapter {name!r} has no gates that a budget closes: train one of method adalora")
    gates = kept_gates({path: adapters.layers[path].roles(name) for path in spec.paths})
    if not any(map(any, gates.values())):
        raise UserError(f"adapter {name!r}: all gates are closed, as they are before the first step; train it")
    return RankMap({path: sum(kept) for path, kept in gates.items()})
