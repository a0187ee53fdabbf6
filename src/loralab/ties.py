"""Weights that a transformers model has in several places, and what it must know once they are no longer one."""

from typing import Any

import torch
from torch import Tensor, nn

from loralab.read_past import names_in

TIE = "tie_word_embeddings"  # the flag of a config


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def untie(model: nn.Module) -> list[str]:
    """Let a transformers model know of weights that are no longer one, so that it saves and loads each of them.

    Where one is apart, all of them get tensors of their own, as there is one flag in the config for them all. Returns
    the names of those that were tied until now.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for one, other in tied.items():  # equal after a merge into both: still one
        if parameters[one] is not parameters[other] and _equal(parameters[one], parameters[other]):
            path, _, last = one.rpartition(".")
            setattr(model.get_submodule(path), last, parameters[other])
            parameters[one] = parameters[other]
    apart = [one for one, other in tied.items() if parameters[one] is not parameters[other]]
    if not apart:
        return []
    seen: set[int] = set()
    for key in dict.fromkeys([*tied.values(), *tied]):
        p = parameters[key]
        if id(p) in seen:
            path, _, last = key.rpartition(".")
            setattr(model.get_submodule(path), last, nn.Parameter(p.detach().clone(), p.requires_grad))
        seen.add(id(p))
    tied.clear()
    kinds_there: set[Any] = {type(module) for module in model.modules()}
    if any(TIE in names_in(kind) for kind in kinds_there):  # else the forward would be another one
        return apart
    config: Any = model.config
    kept = config.to_dict()
    again = type(config).from_dict({**kept, TIE: False}).to_dict()
    if again == {**kept, TIE: False}:  # else the flag says something else too, or nothing (T5)
        setattr(config, TIE, False)
    return apart
