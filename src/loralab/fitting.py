"""Whether an adapter file fits a model, and filling its tensors in."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

from loralab import files
from loralab.adapted import AdaptedModel, AdapterSpec, base_tensor
from loralab.experts import open_stack
from loralab.files import AdapterFile
from loralab.heads import own_copy, under
from loralab.layer import plain_modules
from loralab.schema import listed
from loralab.targets import layer_at, shape_of


def misfits(handle: AdaptedModel, file: AdapterFile) -> list[str]:
    """Layers and heads of a file that the model does not have."""
    heads = list(handle.heads)  # adapters have copies of each as a whole, so that no file fits what is inside
    there = {path for path, _ in plain_modules(handle.model) if not under(path, heads) or path in heads}
    missing = [path for path in [*file.paths, *file.heads] if path not in there and not open_stack(handle.model, path)]
    if missing:
        return [f"the model has no {listed(missing, 4)} ({len(missing)} missing)"]
    biased = [path for path in file.unbiased if getattr(layer_at(handle.model, path), "bias", None) is not None]
    why = (
        f"PEFT scales the bias of {listed(biased, 4)} too, which is not done here: merge the adapter with PEFT instead"
    )
    return [why] if biased else []


def expected(handle: AdaptedModel, spec: AdapterSpec, computed: Sequence[str]) -> dict[str, Tensor]:
    """Key -> a tensor of the shape and dtype that a file must hold for it; roles that are `computed` are left out."""
    found: dict[str, Tensor] = {}
    for path, roles in files.held_roles(spec.recipe, spec.paths).items():
        layer = layer_at(handle.model, path)
        shapes = files.layer_shapes(spec.recipe, path, *shape_of(layer), getattr(layer, "count", None))
        found |= {f"{path}.{role}": shapes[role] for role in roles if role in shapes and role not in computed}
    found |= {key: base_tensor(handle.model, key) for key in spec.base_names}
    old = len(handle.labels.names)
    for path in spec.heads:
        head = handle.heads[path].base if path in handle.heads else handle.model.get_submodule(path)
        with torch.device("meta"):
            blank = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in head.parameters()}
            own = own_copy(copy.deepcopy(head, dict(blank)), old, len(spec.labels) or old, Generator())
        found |= {f"{path}.{key}": p for key, p in own.named_parameters()}
    return found


def unlike(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Why the tensors of a file are not those that a model expects, one phrase each."""
    problems = []
    if missing := [key for key in wanted if key not in tensors]:
        problems.append(f"missing tensors: {listed(missing)}")
    if extra := [key for key in tensors if key not in wanted]:
        problems.append(f"unexpected tensors: {listed(extra)}")
    odd = (files.unlike(key, tensors[key], one) for key, one in wanted.items() if key in tensors)
    return problems + [problem for problem in odd if problem is not None][:10]


def fill(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into those of a model, which are known to be alike."""
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)
