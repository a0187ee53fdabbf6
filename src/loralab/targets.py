"""Which layers an adapter goes on: a preset, a list of layer names, or a regular expression.

A preset is a set of parts (q, k, v, o, mlp); a row of LAYERS says what an architecture calls each part. Names are
matched by whole components of a module's path. GPT-2 keeps q, k and v in one layer, so any of them means that layer.

Only linear layers can be adapted. The experts of a mixture are parameters of three dimensions and no layers: what no
target reaches is counted, and told of where it is much and the targets mean it.
"""

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from loralab.errors import UserError, hint
from loralab.heads import under
from loralab.layer import Adapted
from loralab.stores import LINEAR

Targets = str | Sequence[str]

PRESETS: dict[str, tuple[str, ...]] = {
    "attention-q": ("q",),
    "attention-k": ("k",),
    "attention-v": ("v",),
    "attention-qk": ("q", "k"),
    "attention-qv": ("q", "v"),
    "attention-qkv": ("q", "k", "v"),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("mlp",),
}
ALL = "all-linear"  # every linear layer of the backbone, whatever it is called
MUCH = 0.01  # share of a model's values: below it, what no target reaches is listed and not warned of

_BERT = {
    "q": ("attention.self.query",),
    "k": ("attention.self.key",),
    "v": ("attention.self.value",),
    "o": ("attention.output.dense",),
    "mlp": ("intermediate.dense", "layer.*.output.dense"),
}
_DEBERTA = {
    **_BERT,
    "q": ("attention.self.query_proj",),
    "k": ("attention.self.key_proj",),
    "v": ("attention.self.value_proj",),
}
_MPNET = {
    **_BERT,
    "q": ("attention.attn.q",),
    "k": ("attention.attn.k",),
    "v": ("attention.attn.v",),
    "o": ("attention.attn.o",),
}
_DISTILBERT = {
    "q": ("attention.q_lin",),
    "k": ("attention.k_lin",),
    "v": ("attention.v_lin",),
    "o": ("attention.out_lin",),
    "mlp": ("ffn.lin1", "ffn.lin2"),
}
_GPT2 = {
    "q": ("attn.c_attn",),
    "k": ("attn.c_attn",),
    "v": ("attn.c_attn",),
    "o": ("attn.c_proj",),
    "mlp": ("mlp.c_fc", "mlp.c_proj"),
}
_LLAMA = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
LAYERS: dict[str, dict[str, tuple[str, ...]]] = {  # config.model_type -> part -> path endings, * is one component
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta-v2": _DEBERTA,
    "mpnet": _MPNET,
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "smollm3": _LLAMA,
}

READ_PAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they read the .weight of layers inside themselves
READ_PAST_LINEAR = nn.modules.linear.NonDynamicallyQuantizableLinear  # what MultiheadAttention calls its out_proj


class ReachNote(UserWarning):
    """Weights that the targets of an adapter mean are no linear layers, so that they are not adapted."""


@dataclass(frozen=True)
class Coverage:
    """Which layers a target matched: pattern -> paths, and the linear layers left alone."""

    matched: dict[str, list[str]]
    left: list[str]
    unreached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Matrices that are no linear layer's, which no target reaches: path of the parameter -> shape."""
    size: int = 0
    """Values of the whole model."""

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers."""
        return list(dict.fromkeys(path for paths in self.matched.values() for path in paths))

    @property
    def unreached_values(self) -> int:
        """How many values no target reaches."""
        return sum(map(prod, self.unreached.values()))

    def keep(self, paths: Container[str]) -> "Coverage":
        """Without the matched layers that are not in `paths`, which count as left alone."""
        matched = {pattern: [p for p in found if p in paths] for pattern, found in self.matched.items()}
        left = [*self.left, *(path for path in self.paths if path not in paths)]
        return replace(self, matched={pattern: found for pattern, found in matched.items() if found}, left=left)

    def note(self) -> str | None:
        """What no target reaches, in words; None if there is nothing."""
        if not self.unreached:
            return None
        kinds: dict[str, list[str]] = {}
        for path, shape in self.unreached.items():
            kinds.setdefault(f"{len(shape)}-D weights of no plain linear layer", []).append(path)
        what = "; ".join(f"{kind}: {summary(paths)}" for kind, paths in kinds.items())
        share = self.unreached_values / self.size
        return f"not adapted, whatever the targets: {self.unreached_values:,} values, {share:.1%} of the model ({what})"

    def __str__(self) -> str:
        rows = [f"{pattern}: {summary(paths)}" for pattern, paths in self.matched.items()]
        note = self.note()
        return "; ".join([*rows, f"left alone: {summary(self.left) or 'none'}", *([] if note is None else [note])])


def cover(model: nn.Module, targets: Targets, outside: Sequence[str] = ()) -> Coverage:
    """The layers of `model` that `targets` means; layers under a path in `outside` (the head) are never adapted.

    A layer that the model has under several paths counts once, under its first path, and matches by any of them.
    Raises UserError when a pattern matches nothing, and for a layer that cannot be adapted (see `obstacle`).
    """
    linear = {
        path: paths
        for path, (module, paths) in _modules(model).items()
        if isinstance(module, (*LINEAR, Adapted)) and not any(under(p, outside) for p in paths)
    }
    exact = [p for p in linear if type(model.get_submodule(p)) in (*LINEAR, Adapted, READ_PAST_LINEAR)]
    odd = [p for p in linear if parametrize.is_parametrized(model.get_submodule(p))]
    patterns, matched = _patterns(model, targets), {}
    for pattern, test in patterns.items():
        meant = [p for p in (*exact, *odd) if any(test.fullmatch(path) for path in linear[p])]
        for path in meant:
            if (problem := _read_past(model, path) or obstacle(model.get_submodule(path))) is not None:
                raise UserError(f"targets match {path}, but {problem}")
        matched[pattern] = meant
    unreached, size = _unreached(model, outside), sum(p.numel() for p in model.parameters())
    if nothing := [pattern for pattern, paths in matched.items() if not paths]:
        test = patterns[nothing[0]]
        if in_head := [path for path, _ in model.named_modules() if test.fullmatch(path) and under(path, outside)]:
            raise UserError(f"targets: {in_head[0]} is in the head, which is not adapted: head=True trains it")
        if found := meant_in_vain(Coverage({nothing[0]: []}, [], unreached, size), model, targets, 0.0):
            raise UserError(f"targets {nothing[0]!r}: {found}")
        near = hint(nothing[0], [*PRESETS, ALL, *exact], cutoff=0.75)
        raise UserError(
            f"targets {', '.join(map(repr, nothing))} match no linear layer{near}; presets: "
            f"{', '.join([*PRESETS, ALL])}; layers here: {summary(exact) or 'none'}"
        )
    chosen = set(Coverage(matched, []).paths)
    return Coverage(matched, [path for path in exact if path not in chosen], unreached, size)


def meant_in_vain(coverage: Coverage, model: nn.Module, targets: Targets, least: float = MUCH) -> str | None:
    """A note of what no target reaches and these mean, by its path or that of its module; `least` is a share."""
    tests = [test for pattern, test in _patterns(model, targets).items() if pattern in coverage.matched]
    meant = {
        path: shape
        for path, shape in coverage.unreached.items()
        if any(test.fullmatch(place) for test in tests for place in (path, path.rpartition(".")[0]))
    }
    coverage = replace(coverage, unreached=meant)
    return coverage.note() if coverage.unreached_values >= least * coverage.size else None


def _unreached(model: nn.Module, outside: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each matrix, or stack of them, that no layer of a kind that can be adapted has."""
    known = (*LINEAR, Adapted, READ_PAST_LINEAR, nn.Embedding)  # a table that is looked up is no matrix of a product
    layers = [module for module in model.modules() if type(module) in known]
    reached = {id(p) for layer in layers for p in layer.parameters()}
    return {
        path: tuple(p.shape)
        for path, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in reached and not under(path, outside)
    }


def _modules(model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
    """First path of a module -> the module and all paths that lead to it."""
    first: dict[int, str] = {}
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        _, paths = found.setdefault(first.setdefault(id(module), path), (module, []))
        paths.append(path)
    return found


def paths_to(model: nn.Module, module: nn.Module) -> list[str]:
    """All paths under which a model has a module."""
    return [path for path, m in model.named_modules(remove_duplicate=False) if m is module]


def _patterns(model: nn.Module, targets: Targets) -> dict[str, re.Pattern[str]]:
    """pattern as given -> what a layer's path must match in full."""
    if targets == ALL:
        return {ALL: re.compile(".*")}
    if isinstance(targets, str) and targets in PRESETS:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in LAYERS:
            raise UserError(
                f"targets {targets!r}: no preset for model type {kind!r} (known: {', '.join(LAYERS)}); "
                f"use {ALL!r}, a list of layer names or a regular expression"
            )
        endings = dict.fromkeys(ending for part in PRESETS[targets] for ending in LAYERS[kind][part])
        return {ending: _ending(ending) for ending in endings}
    if isinstance(targets, str):
        try:
            return {targets: re.compile(targets)}
        except re.error as error:
            raise UserError(f"targets {targets!r}: no preset, and no regular expression either ({error})") from error
    if not targets:
        raise UserError(f"targets is an empty list: name layers, or use one of {', '.join([*PRESETS, ALL])}")
    return {name: _ending(name) for name in targets}


def _ending(name: str) -> re.Pattern[str]:
    """A path that ends in the whole components of `name`."""
    return re.compile(r"(?:.*\.)?" + r"[^.]+".join(map(re.escape, name.split("*"))))


def _read_past(model: nn.Module, path: str) -> str | None:
    """Why an adapter on a layer would do nothing: a module around it reads its weight itself."""
    for parent in ["", *(path[:i] for i, char in enumerate(path) if char == ".")]:
        module = model.get_submodule(parent)
        if isinstance(module, READ_PAST):
            return (
                f"{type(module).__name__} at {parent or 'the top'} reads its weight past the module, so an adapter "
                "there would do nothing: leave it out of targets"
            )
    return None


def obstacle(module: nn.Module) -> str | None:
    """Why a module, with what is inside, cannot be adapted or copied as it is, and what to do; None if it can."""
    for inner in module.modules():
        if isinstance(inner, Adapted):
            continue
        if parametrize.is_parametrized(inner):
            names = ", ".join(inner.parametrizations)  # type: ignore[arg-type]
            return (
                f"its {names} is computed by a parametrization: first make it a plain parameter, with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if computed := [n for n in ("weight", "bias") if isinstance(inner.__dict__.get(n), Tensor)]:
            return (
                f"its {computed[0]} is no parameter but computed at every call (weight_norm, spectral_norm, pruning): "
                "first make it one, with torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove"
            )
        if (problem := _away(inner)) is not None:
            return problem
    return None


def _away(module: nn.Module) -> str | None:
    """Why the weights of a module cannot be read: they are elsewhere, and brought in for a moment at every call."""
    hooks = [hook := getattr(module, "_hf_hook", None), *getattr(hook, "hooks", ())]
    meta = any(t.is_meta and not isinstance(t, FakeTensor) for t in module.parameters(recurse=False))
    if meta or any(getattr(hook, "offload", False) for hook in hooks):
        return (
            "its weight is not in memory (the meta device, or offloaded by accelerate): load the model without "
            "offloading this layer, in fewer bits if it is too large, or leave it out of targets"
        )
    return None


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of an nn.Linear, a Conv1D or an adapted layer."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


# ---- paths -----------------------------------------------------------------------------------------------------------


def folded(path: str) -> str:
    """A path with its numbers as *: encoder.layer.3.attention.self.query -> encoder.layer.*.attention.self.query."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def summary(paths: Sequence[str]) -> str:
    """Folded paths with counts: encoder.layer.*.attention.self.query (12), ..."""
    return ", ".join(f"{path} ({count})" for path, count in Counter(map(folded, paths)).items())


def kind(path: str) -> str:
    """What a layer is in its block: encoder.layer.3.attention.self.query -> attention.self.query."""
    return folded(path).rpartition("*.")[2]
