"""The head of a model: which modules it is, its labels, and the copy of it that an adapter gets."""

import copy
from collections.abc import Sequence

import torch
from torch import Generator, nn


def head_of(model: nn.Module) -> list[str]:
    """Paths of the modules outside a transformers model's backbone that have parameters of their own."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if backbone is None or backbone is model:
        return []
    shared = {id(p) for p in backbone.parameters()}
    rest = [(name, list(child.parameters())) for name, child in model.named_children() if child is not backbone]
    return [name for name, own in rest if own and not any(id(p) in shared for p in own)]


def under(key: str, paths: Sequence[str]) -> bool:
    """Whether a tensor or module of that name lies in one of the modules."""
    return any(key == path or key.startswith(path + ".") for path in paths)


def labels_of(model: nn.Module) -> tuple[str, ...]:
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(names[i]) for i in sorted(names))


def own_copy(head: nn.Module, old: int, new: int, generator: Generator) -> nn.Module:
    """A copy of a head that learns; with another number of labels its outputs are freshly drawn."""
    own = copy.deepcopy(head)
    if new != old:
        _resize(own, old, new, generator)
    return own.requires_grad_(True)


def _resize(head: nn.Module, old: int, new: int, generator: Generator) -> None:
    """Gives the output layer of a head another number of outputs, freshly drawn (normal, 0.02; bias zero)."""
    outputs = [m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == old]
    if outputs:
        layer = outputs[-1]
        weight = torch.empty(new, layer.in_features).normal_(0, 0.02, generator=generator)
        layer.weight = nn.Parameter(weight.to(layer.weight))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(new).to(layer.weight))
        layer.out_features = new
