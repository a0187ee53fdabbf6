"""What the merged weights of a model may be kept in, and what each choice costs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab.bases import keep
from loralab.errors import UserError

if TYPE_CHECKING:
    from loralab.attach import Adapters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of a name or dtype; raises UserError for what an update cannot be merged into."""
    kept = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kept is None or kept not in DTYPES.values():
        raise UserError(
            f"merge into {dtype}: choose one of {', '.join(DTYPES)}; fewer bits would round most of the update away, "
            "so keep the adapter beside a quantized base, or quantize the merged model anew and measure it"
        )
    return kept


@torch.no_grad()
def merge_errors(handle: "Adapters", name: str | None, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Route -> largest difference of an output from the adapted model's on `batch`, in evaluation mode.

    Routes are the dtypes of `merge`; over a quantized base also its store, which no merge takes: the merged weight
    quantized again, for comparison.
    """
    name = handle.only(name)
    training = handle.model.training
    with handle.use(name):
        expected = _output(handle.model.eval(), batch)
    handle.model.train(training)
    errors = {}
    for route in DTYPES:
        errors[route] = _distance(handle.merge(name, route), batch, expected)
    stores = {path: layer.store for path, layer in handle.layers.items() if layer.store not in (None, *DTYPES)}
    if stores:
        plain = handle.merge(name, "float32")
        for path, store in stores.items():
            plain.set_submodule(path, keep(plain.get_submodule(path), store))
        errors[f"{' and '.join(sorted(set(map(str, stores.values()))))}, quantized again"] = _distance(
            plain, batch, expected
        )
    return errors


def _distance(plain: nn.Module, batch: Mapping[str, Tensor], expected: Tensor) -> float:
    return float((_output(plain.eval(), batch) - expected).abs().max())


def _output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    out: Any = model(**batch)
    return (out if isinstance(out, Tensor) else out[0]).float()
