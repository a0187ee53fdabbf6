"""What only a model tells of a folder of PEFT: which parameters it adapts, what in it is of the base, single tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from loralab.adapted import AdaptedModel, base_tensor
from loralab.errors import UserError
from loralab.experts import AdaptedExperts
from loralab.files import AdapterFile
from loralab.heads import under
from loralab.install import token_layers
from loralab.layer import Adapted
from loralab.methods.base import ends_in
from loralab.peft_format import INSIDE, divide, own_ranks
from loralab.rankmap import LayerRank, RankMap
from loralab.recipe import check
from loralab.schema import listed


def placed(handle: AdaptedModel, file: AdapterFile) -> AdapterFile:
    """The file as it is for this model. Raises UserError for a model that it is not for."""
    if file.parameters:
        file = _of_parameters(file, lambda path: _own_parameters(handle.model, path))
    if file.of_base:
        file = _with_base(handle, file)
    return _with_tokens(handle, file) if file.vectors else file


# ---- tensors of the base --------------------------------------------------------------------------------------------


def _with_base(handle: AdaptedModel, file: AdapterFile) -> AdapterFile:
    """The file in which what PEFT loads into the base is part of the adapter: biases that learn, modules of its own.

    An embedding or output layer that the base has just so is left out: PEFT saves it with an adapter on it.
    """
    biases = {key: t for key, t in file.of_base.items() if key.endswith(".bias")}
    heads, tensors = list(file.heads), dict(file.tensors)
    for key, t in file.of_base.items():
        path, own = key.rpartition(".")[0], _base(handle, key)
        if own.shape != t.shape:
            raise UserError(
                f"the folder puts {listed([key])} of {tuple(t.shape)} in the base, and here it is {tuple(own.shape)}: "
                "resize the model first (resize_token_embeddings)"
            )
        if key in biases or torch.equal(own.detach().to(t), t):
            continue
        if path in file.paths:
            raise UserError(
                f"the folder has an adapter on {path} and puts its own {key} in the base, which is not that of this "
                "model: load that base, or merge the adapter with PEFT instead"
            )
        tensors[key] = t
        heads += [path] if path not in heads else []
    file = replace(file, heads=heads, tensors=tensors, of_base={})
    if not biases:
        return file
    learned = [key for key in handle.learned if key.rpartition(".")[2] == "bias" and not under(key, heads)]
    tensors |= {key: biases[key] if key in biases else _base(handle, key).detach().clone() for key in learned}
    r = check(replace(file.recipe, train=(*file.recipe.learn, "bias")))
    return replace(file, recipe=r, tensors=tensors)


def _base(handle: AdaptedModel, key: str) -> Tensor:
    """A tensor of the base. Raises UserError for a model without it."""
    try:
        return base_tensor(handle.model, key)
    except AttributeError as error:
        raise UserError(f"the folder puts {listed([key])} in the base, and the model has no such tensor") from error


# ---- single tokens --------------------------------------------------------------------------------------------------


def _with_tokens(handle: AdaptedModel, file: AdapterFile) -> AdapterFile:
    """The file with its single tokens as layers of the rank map; PEFT holds their vectors W[tokens] + D."""
    r, tensors, rows = file.recipe, dict(file.tensors), dict[str, LayerRank]()
    rank = getattr(r.factors, "rank", 1)
    layers = {path: LayerRank(rank) for path in file.paths} if r.ranks is None else dict(r.ranks.layers)
    for path, (tokens, vectors) in file.vectors.items():
        W = _base(handle, f"{path}.weight").detach()  # (V, width)
        if W.ndim != 2 or W.shape[1:] != vectors.shape[1:] or not 0 <= min(tokens) <= max(tokens) < len(W):
            raise UserError(
                f"the folder has vectors {tuple(vectors.shape)} of tokens up to {max(tokens)} for {listed([path])}, "
                f"whose table here is {tuple(W.shape)}: resize the model first (resize_token_embeddings)"
            )
        rows |= token_layers(handle, path, tokens, len(W))
        order = torch.tensor(tokens).argsort()
        tensors[f"{path}.D"] = vectors[order] - W[sorted(tokens)].to(vectors)
    if both := [path for path in rows if path in layers]:
        raise UserError(f"the folder has an adapter on {both[0]} and single tokens of it: merge it with PEFT instead")
    r = check(replace(r, ranks=RankMap(layers | rows)))
    return replace(file, recipe=r, coverage={**file.coverage, "tokens": list(rows)}, tensors=tensors, vectors={})


# ---- parameters -----------------------------------------------------------------------------------------------------


def _own_parameters(model: nn.Module, path: str) -> dict[str, bool]:
    """Name of each parameter of a module itself, in their order -> whether it is a stack of matrices."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return {}
    plain = module.original[0] if isinstance(module, AdaptedExperts | Adapted) else module
    return {name: p.ndim == 3 for name, p in plain.named_parameters(recurse=False)}


def _of_parameters(file: AdapterFile, own: Callable[[str], Mapping[str, bool]]) -> AdapterFile:
    """The file with the names of the parameters that PEFT adapts, for which it wraps their module once for each.

    `own` gives the parameters of a module itself, in their order, and which are stacks: the last one is outermost.
    Raises UserError for a module that has others.
    """
    moved: dict[str, str] = {}  # stored path -> that of the layer
    called = {path: path for path in file.paths}  # stored path -> what patterns of ranks call it
    for holder, paths in _holders(file).items():
        there = own(holder)
        names = [name for name in there if _is_target(f"{holder}.{name}", file.parameters)]
        if not names and file.tensors[f"{paths[0]}.A"].ndim == 2:
            continue  # a layer of target_modules
        if len(names) != len(paths):
            raise UserError(
                f"{holder} has {len(names)} of the parameters in target_parameters, and the folder has "
                f"{len(paths)} adapters for it"
            )
        for path, name in zip(sorted(paths, key=len), reversed(names), strict=True):
            moved[path] = f"{holder}.{name}" if there[name] or name != "weight" else holder
            called[path] = f"{holder}.{name}"
    tensors = {}
    for key, tensor in file.tensors.items():
        path, _, role = key.rpartition(".")
        tensors[f"{moved[path]}.{role}" if path in moved else key] = tensor
    r, paths = file.recipe, [moved.get(path, path) for path in file.paths]
    if file.patterns is not None:  # now that the parameters have names
        found = own_ranks(*file.patterns, getattr(r.factors, "rank", 1), list(called.values()))
        layers = {moved.get(path, path): found[name] for path, name in called.items()}
        for path, layer in layers.items():
            divide(path, layer.rank, tensors)
        r = check(replace(r, ranks=RankMap(layers)))
    coverage = {path: [path] for path in paths}
    return replace(file, recipe=r, coverage=coverage, tensors=tensors, parameters=(), patterns=None)


def _holders(file: AdapterFile) -> dict[str, list[str]]:
    """Module -> the paths under which the file has adapters for it."""
    found: dict[str, list[str]] = {}
    for path in file.paths if file.parameters else ():
        holder = path
        while holder.endswith(INSIDE):
            holder = holder.removesuffix(INSIDE)
        found.setdefault(holder, []).append(path)
    return found


def _is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether a parameter is named by target_parameters, as PEFT matches."""
    return any(ends_in(name, target) for target in targets)
