"""The head of a model: which modules it is, its labels, and the copy of it that an adapter gets."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, nn

from loralab.layer import Adapted, plain_modules, seen_as

NARROW = (torch.float16, torch.bfloat16)  # too few digits for what an optimizer adds in a step


def head_of(model: nn.Module) -> list[str]:
    """Paths of the modules outside a transformers model's backbone that have parameters of their own."""
    outside = outside_backbone(model)
    if not outside:
        return []
    backbone = model.get_submodule(str(model.base_model_prefix))
    shared = {id(p) for p in _plain_parameters(backbone)}
    parameters = {name: _plain_parameters(model.get_submodule(name)) for name in outside}
    return [name for name, own in parameters.items() if own and not any(id(p) in shared for p in own)]


def _plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module, those of adapters left out."""
    found: list[nn.Parameter] = []
    for _, inside in plain_modules(module):
        found += inside.base.parameters() if isinstance(inside, Adapted) else inside.parameters(recurse=False)
    return found


def outside_backbone(model: nn.Module) -> list[str]:
    """Names of the modules beside a transformers model's backbone; none where there is no backbone inside."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if backbone is None or backbone is model:
        return []
    return [name for name, child in model.named_children() if child is not backbone]


def output_layer(model: nn.Module) -> str | None:
    """The path of a language model's output layer, where it is one linear layer with a weight of its own."""
    find = getattr(model, "get_output_embeddings", None)
    output = find() if find is not None else None
    if output is None:
        return None
    return next((path for path, module in plain_modules(model) if module is seen_as(output)), None)


def under(key: str, paths: Sequence[str]) -> bool:
    """Whether a tensor or module of that name lies in one of the modules."""
    return any(key == path or key.startswith(path + ".") for path in paths)


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's labels as its config has them; none for a model without."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(names[i]) for i in sorted(names))


@dataclass(frozen=True)
class Labels:
    """What a transformers model says of its labels, as it was before any adapter."""

    names: tuple[str, ...]
    problem_type: str | None

    @classmethod
    def of(cls, model: nn.Module) -> "Labels":
        """Those of the model now."""
        return cls(labels_of(model), getattr(getattr(model, "config", None), "problem_type", None))

    def set(self, model: nn.Module, names: Sequence[str]) -> None:
        """Give the model's config, and the loss that transformers computes by it, these labels."""
        config: Any = getattr(model, "config", None)
        if not names or not self.names or labels_of(model) == tuple(names):
            return
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        if isinstance(getattr(model, "num_labels", None), int):
            model.num_labels = len(names)  # type: ignore[assignment]
        # transformers fills in the type at the first loss, from the number of labels
        same = len(names) == len(self.names) or self.problem_type == "multi_label_classification"
        config.problem_type = self.problem_type if same else None


def own_copy(head: nn.Module, old: int, new: int, generator: Generator) -> nn.Module:
    """A copy of a head that learns, float32 at least; with another number of labels its outputs are freshly drawn."""
    own = copy.deepcopy(head)
    for t in (*own.parameters(), *own.buffers()):
        if t.dtype in NARROW:
            t.data = t.data.float()
    if new != old:
        _resize(own, old, new, generator)
    return own.requires_grad_(True)


def _resize(head: nn.Module, old: int, new: int, generator: Generator) -> None:
    """Give the output layer of a head another number of outputs, freshly drawn (normal, 0.02; bias zero)."""
    outputs = [m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == old]
    if outputs:
        layer = outputs[-1]
        weight = torch.empty(new, layer.in_features).normal_(0, 0.02, generator=generator)  # (new, in)
        layer.weight = nn.Parameter(weight.to(layer.weight))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(new).to(layer.weight))  # (new,)
        layer.out_features = new
