"""error-spectrum: ranks go to the layers with the largest rounding error of a store; this project's own policy.

E = W - kept(W) of every layer. A layer gets one rank for each of its singular values of E among the `rank * layers`
largest of all layers together. By Eckart and Young no other division of the budget lets low-rank corrections remove
more of the squared error, the sum of |E|^2. It is not RA-LoRA, of which too little is public.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.rankmap import RankMap
from loralab.ranks.groups import check_linear
from loralab.stores import keep


def error_map(layers: Mapping[str, Any], store: str, rank: int = 8, least: int = 0) -> RankMap:
    """The map for a store; its ranks sum to `rank` times the number of layers, and every layer gets at least `least`.

    `layers` maps path -> nn.Linear or Conv1D that is not adapted yet. A rank has more values in a larger layer, so the
    adapter may have somewhat more or fewer values than one with `rank` everywhere. Raises UserError for a store that
    keeps every bit.
    """
    check_linear(layers, "error-spectrum")
    spectra = {path: error_spectrum(layer, store) for path, layer in layers.items()}
    return allocate(spectra, rank * len(layers), least)


def error_spectrum(layer: Any, store: str) -> Tensor:
    """Singular values (min(out, in),) of W - kept(W), falling, in float64."""
    W = keep(layer).dense().detach()
    kept = keep(layer, store).dense().detach()
    values: Tensor = torch.linalg.svdvals(W.double() - kept.to(W.device).double())  # (min(out, in),)
    return values


def allocate(spectra: Mapping[str, Tensor], budget: int, least: int = 0) -> RankMap:
    """The map that gives each layer one rank for each of its values among the `budget` largest of all layers."""
    if not any(values.any() for values in spectra.values()):
        raise UserError("the store keeps every bit of these layers, so there is no error to measure: use another store")
    room = sum(len(values) for values in spectra.values())
    if not least * len(spectra) <= budget <= room:
        raise UserError(f"a budget of {budget} ranks: {len(spectra)} layers take {least * len(spectra)} to {room}")
    ranks = {path: min(least, len(values)) for path, values in spectra.items()}
    rest = [(float(v), path) for path, values in spectra.items() for v in values[ranks[path] :]]
    rest.sort(key=lambda pair: -pair[0])  # stable: ties go to the earlier layer
    for _, path in rest[: budget - sum(ranks.values())]:
        ranks[path] += 1
    return RankMap(ranks)
