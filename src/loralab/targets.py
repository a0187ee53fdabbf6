"""Which layers an adapter goes on: a preset, a list of layer names, or a regular expression.

A preset is a set of parts (q, k, v, o, mlp); presets.py says which layers they are. Names are matched by whole
components of a module's path. Layers of every kind (kinds/) can be named; `all-linear` means the linear layers of the
backbone. What `exclude` names, layers or modules around them, is left alone.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from loralab import kinds
from loralab.coverage import Coverage, summary
from loralab.errors import UserError, hint
from loralab.experts import open_stack
from loralab.heads import under
from loralab.layer import Adapted, plain_modules, seen_as
from loralab.presets import PRESETS, layers_of
from loralab.reach import Part, parts, tied_to
from loralab.read_past import names_in
from loralab.schema import listed

Targets = str | Sequence[str]
ALL = "all-linear"  # every linear layer of the backbone, whatever it is called
MUCH = 0.01  # share of a model's values: below it, what no target reaches is listed and not warned of


class ReachNote(UserWarning):
    """Weights that the targets of an adapter mean are not adapted."""


def cover(
    model: nn.Module,
    targets: Targets,
    outside: Sequence[str] = (),
    exclude: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> Coverage:
    """The layers of `model` that `targets` means and `exclude` does not.

    Layers under a path in `outside` (the head) are never adapted and not counted, those under one in `beside` (what is
    beside the backbone) only by name. A layer that the model has under several paths counts once, under its first
    path, and matches by any of them.
    Raises UserError when a pattern matches nothing, for a named layer that cannot be adapted, and if none is left.
    """
    found = parts(model, outside)
    layers = {part.path: part for part in found if part.is_layer}
    paths = all_paths(model)
    paths.update({p: [p, p.rpartition(".")[0]] for p, part in layers.items() if part.kind == kinds.EXPERTS.name})
    patterns = _patterns(model, targets)
    named = targets != ALL  # what is named must be adapted, or is refused
    matched = {
        pattern: [p for p, part in layers.items() if _meant(part, named, beside) and _matches(test, paths[p])]
        for pattern, test in patterns.items()
    }
    coverage = Coverage(matched, _linear(layers, ()), tuple(found))
    if nothing := [pattern for pattern, hits in matched.items() if not hits]:
        raise UserError(_no_match(model, nothing, patterns[nothing[0]], coverage, targets, outside))
    gone = _excluded(exclude, layers, paths)
    hits = dict.fromkeys(p for found in matched.values() for p in found if p not in gone)
    for path in hits:
        if (problem := layers[path].obstacle) is not None and (named or layers[path].mendable):
            raise UserError(f"targets match {path}, but {problem}")
    chosen = [path for path in hits if layers[path].obstacle is None]
    if not chosen:
        reasons = (
            "; ".join(dict.fromkeys(layers[p].obstacle or "" for p in hits)) or f"exclude={list(exclude)} leaves none"
        )
        raise UserError(f"targets {targets!r}: no layer is left to adapt ({reasons})")
    return replace(
        coverage.keep(chosen, "excluded"),
        left=_linear(layers, chosen),
        why=dict.fromkeys(gone, "excluded") | _beside(layers, beside, chosen),
    )


def meant_in_vain(coverage: Coverage, model: nn.Module, targets: Targets, least: float = MUCH) -> str | None:
    """A note of what the targets mean and do not reach, by its path or that of its module; `least` is a share.

    With all-linear also where less than half of the values of linear layers is adapted, whatever the reason.
    """
    tests = [test for pattern, test in _patterns(model, targets).items() if pattern in coverage.matched]
    meant = {path for path in coverage.unreached for test in tests if _matches(test, [path, path.rpartition(".")[0]])}
    rest = replace(coverage, parts=tuple(p for p in coverage.parts if p.obstacle is None or p.path in meant))
    note = rest.note() if rest.unreached_values >= least * coverage.size else None
    return note or (coverage.little() if targets == ALL else _never_called(coverage, model))


def _never_called(coverage: Coverage, model: nn.Module) -> str | None:
    """A note of an adapted table that only others are made of, as `shared` of T5 is of `embed_tokens`."""
    tables = {part.path for part in coverage.parts if part.kind == kinds.EMBEDDING.name}
    for path in tables.intersection(coverage.paths):
        above, _, name = path.rpartition(".")
        holder: Any = type(model.get_submodule(above))
        if name in names_in(holder):
            continue
        if twins := [p for p in tied_to(model, path) if p in tables and p not in coverage.paths]:
            return (
                f"{path} does nothing by itself, as {holder.__name__} looks nothing up in it: the layers that do so "
                f"have its table and are left as they are; name {listed(twins, 4)}"
            )
    return None


def _meant(part: Part, named: bool, beside: Sequence[str]) -> bool:
    """Whether a pattern may mean a layer: by name any layer of its own, else the linear layers of the backbone."""
    return named or (part.kind == kinds.LINEAR.name and not under(part.path, beside))


def _matches(test: re.Pattern[str], paths: Sequence[str]) -> bool:
    return any(test.fullmatch(path) for path in paths)


def _linear(layers: dict[str, Part], chosen: Sequence[str]) -> list[str]:
    """The linear layers that can be adapted and are not among the chosen."""
    taken = set(chosen)
    return [p for p, part in layers.items() if part.kind == kinds.LINEAR.name and p not in taken and not part.obstacle]


def _beside(layers: dict[str, Part], beside: Sequence[str], chosen: Sequence[str]) -> dict[str, str]:
    own = (p for p, part in layers.items() if under(p, beside) and p not in chosen and part.shared is None)
    return dict.fromkeys(own, "beside the backbone, adapted only by name")


def _excluded(exclude: Sequence[str], layers: dict[str, Part], paths: dict[str, list[str]]) -> set[str]:
    """The layers that `exclude` names, itself or by a module around them. Raises UserError for a name of nothing."""
    gone: set[str] = set()
    for name in exclude:
        test = _ending(name)
        hits = {p for p in layers if _matches(test, [above for path in paths[p] for above in _above(path)])}
        if not hits:
            near = hint(name, [part for p in layers for part in p.split(".")], cutoff=0.75)
            raise UserError(f"exclude {name!r} matches no layer{near}; layers here: {summary(list(layers)) or 'none'}")
        gone |= hits
    return gone


def _above(path: str) -> list[str]:
    """A path and those of the modules around it."""
    names = path.split(".")
    return [".".join(names[: count + 1]) for count in range(len(names))]


def _no_match(
    model: nn.Module,
    nothing: Sequence[str],
    test: re.Pattern[str],
    coverage: Coverage,
    targets: Targets,
    outside: Sequence[str],
) -> str:
    """Why a pattern matches nothing, in words."""
    if nothing[0] == ALL:
        there = coverage.note() or summary([part.path for part in coverage.parts if part.is_layer]) or "no layers"
        return f"targets {ALL!r}: no linear layer in the backbone of {type(model).__name__}, which has {there}"
    if in_head := [path for path, _ in plain_modules(model) if test.fullmatch(path) and under(path, outside)]:
        return f"targets: {in_head[0]} is in the head, which is not adapted: head=True trains it"
    alone = replace(coverage, matched={nothing[0]: []})
    if found := meant_in_vain(alone, model, targets, 0.0):
        return f"targets {nothing[0]!r}: {found}"
    layers = [part.path for part in coverage.parts if part.is_layer]
    if modules := [path for path, _ in plain_modules(model) if path and test.fullmatch(path)]:
        kind = type(model.get_submodule(modules[0])).__name__
        inside = sorted({path.rpartition(".")[2] for path in layers if under(path, modules)})
        what = f"a module around layers: name {', '.join(inside)}" if inside else "no layer that multiplies by a matrix"
        return f"targets {nothing[0]!r}: {summary(modules)} is {kind}, {what}"
    near = hint(nothing[0], [*PRESETS, ALL, *layers], cutoff=0.75)
    return (
        f"targets {', '.join(map(repr, nothing))} match no layer{near}; presets: {', '.join([*PRESETS, ALL])}; "
        f"layers here: {summary(layers) or 'none'}"
    )


def all_paths(model: nn.Module) -> "Paths":
    """First path of a module -> all paths that lead to it."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for path, module in plain_modules(model, every_path=True):
        found.setdefault(first.setdefault(id(module), path), []).append(path)
    return Paths(found)


class Paths(dict[str, list[str]]):
    """A part that is no module of the adapted model (inside a head, say) has one path."""

    def __missing__(self, path: str) -> list[str]:
        return [path]


def paths_to(model: nn.Module, module: nn.Module) -> list[str]:
    """All paths under which a model has a module."""
    return [path for path, m in plain_modules(model, every_path=True) if m is seen_as(module)]


def _patterns(model: nn.Module, targets: Targets) -> dict[str, re.Pattern[str]]:
    """pattern as given -> what a layer's path must match in full."""
    if targets == ALL:
        return {ALL: re.compile(".*")}
    if isinstance(targets, str) and targets in PRESETS:
        return {name: _ending(name) for name in layers_of(model, targets)}
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


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer of a path, which may be that of a stack of experts in a module."""
    return open_stack(model, path) or model.get_submodule(path)


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of a layer of any kind, or an adapted one."""
    return (layer.out_features, layer.in_features) if isinstance(layer, Adapted) else kinds.size(layer)
