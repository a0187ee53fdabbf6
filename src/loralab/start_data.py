"""What a start looks at before a layer is touched: the inputs or the gradients of layers, on batches of data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.gradients import Loss, own_loss, weight_gradients
from loralab.inputs import Batches, observe
from loralab.methods.starts import InputDirections, looks_at
from loralab.recipe import Recipe
from loralab.targets import layer_at, shape_of

Seen = Mapping[str, InputDirections | Tensor]  # path -> what a start looked at


def start_data(
    handle: AdaptedModel,
    recipe: Recipe,
    paths: Sequence[str],
    batches: Batches | None,
    loss: Loss | None,
    plain: nn.Module | None = None,
) -> Seen:
    """Path -> what the start of a recipe needs to see of a layer; empty for a start that needs nothing.

    It looks through `plain`, the model as it was before any adapter, if it is given: gradients depend on its head.
    Raises UserError, before a layer is touched, if the start cannot see what it needs: batches, or the weight itself;
    and in torch.inference_mode().
    """
    if torch.is_inference_mode_enabled():
        raise UserError("this is torch.inference_mode(), where tensors are made that cannot learn: attach before it")
    start = recipe.start
    if start == "loftq" and (stored := [path for path in paths if path in handle.layers]):
        store = handle.layers[stored[0]].store
        raise UserError(
            f"start='loftq': {stored[0]} is kept {store} already, its own weight is gone; "
            "attach loftq before the others"
        )
    what = looks_at(start)
    if what is None:
        return {}
    if batches is None:
        raise UserError(f"start={start!r} looks at data: pass batches=[...], each what model(**batch) takes")
    own = {path: recipe.at(path) for path in paths}
    ranks: dict[str, int] = {path: r.factors.rank for path, r in own.items() if r.start == start}  # type: ignore
    with handle.use(None):
        return LOOKS[what](handle.model if plain is None else plain, batches, ranks, loss)


def _inputs(model: nn.Module, batches: Batches, ranks: Mapping[str, int], _: Loss | None) -> Seen:
    return observe(model, batches, ranks)


def _gradients(model: nn.Module, batches: Batches, ranks: Mapping[str, int], loss: Loss | None) -> Seen:
    for path, rank in ranks.items():
        sides = shape_of(layer_at(model, path))
        if 2 * rank > min(sides):
            raise UserError(
                f"rank {rank} for {path}: the start takes {2 * rank} directions of its gradient, which has "
                f"{min(sides)}; give a lower rank"
            )
    return weight_gradients(model, batches, list(ranks), loss or own_loss)


LOOKS: dict[str, Callable[[nn.Module, Any, Mapping[str, int], Loss | None], Seen]] = {
    "inputs": _inputs,
    "gradients": _gradients,
}
