"""A fully fine-tuned model minus its base, as a LoRA: the best update of a rank for each layer, and its error.

D = W' - W (out, in) of each adapted layer is cut to rank r by SVD; the error of a layer is |D - B A| / |D|. What else
changed, such as biases, norms and embeddings, is no part of the adapter and is listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import base_tensor
from loralab.adapters import Adapters, attach
from loralab.algebra import best, whole_rank
from loralab.errors import UserError
from loralab.fitting import fill
from loralab.heads import head_of, labels_of, under
from loralab.schema import listed
from loralab.targets import ALL, Targets


@dataclass(frozen=True)
class Extracted:
    """An adapter on the base, and what it lacks of the tuned model."""

    adapters: Adapters
    layers: Mapping[str, float]  # path -> relative error
    left: Mapping[str, float]  # name of another tensor that changed -> |difference| / |its value in the base|


@torch.no_grad()
def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: int,
    targets: Targets = ALL,
    exclude: Sequence[str] = (),
    name: str = "full",
) -> Extracted:
    """Put the difference of two models of one shape on `base` as a LoRA of scaling 1; a head comes along whole.

    Raises UserError for models whose tensors differ in name or shape, and as `attach` does.
    """
    before = {key: p.detach() for key, p in base.named_parameters()}
    after = {key: p.detach() for key, p in tuned.named_parameters()}
    shapes = [{key: t.shape for key, t in tensors.items()} for tensors in (before, after)]
    if odd := sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()}):
        raise UserError(f"these models differ in {listed(odd, 4)} ({len(odd)} tensors): they are not of one base")
    changed = [key for key, p in before.items() if not torch.equal(p, after[key])]
    heads = [path for path in head_of(base) if any(under(key, [path]) for key in changed)]
    given: dict[str, Any] = {"name": name, "rank": rank, "alpha": float(rank), "targets": targets, "exclude": exclude}
    labels = labels_of(tuned) if heads else ()
    handle = attach(base, "lora", head=heads, labels=labels, **given)
    plain = attach(tuned, "lora", **given)
    errors: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for path, layer in handle.layers.items():
        W, V = layer.base.dense().double(), plain.layers[path].base.dense().double()  # (..., out, in)
        D = V - W
        at = handle.spec(name).recipe.at(path).factors
        u = best(whole_rank(D), at.rank)  # type: ignore[union-attr]
        tensors |= {f"{path}.A": u.A, f"{path}.B": u.B / at.scaling}  # type: ignore[union-attr]
        errors[path] = float((D - u.matrix()).norm() / D.norm().clamp_min(1e-300))
    plain.detach()
    taken = {id(base_tensor(base, f"{path}.weight")) for path in handle.layers}
    own = {key for key, p in before.items() if id(base_tensor(base, key)) in taken or under(key, heads)}
    tensors |= {key: after[key] for key in before if under(key, heads)}
    fill(handle.state(name), tensors)
    left = {key: _change(before[key], after[key]) for key in changed if key not in own}
    return Extracted(handle, errors, left)


def _change(one: Tensor, other: Tensor) -> float:
    return float((other.double() - one.double()).norm() / one.double().norm().clamp_min(1e-300))
