"""Install an adapter on a model: everything that can be wrong is checked first, then layers and heads are put in."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from loralab import kinds, rankmap
from loralab.adapted import AdaptedModel, AdapterSpec, base_tensor
from loralab.coverage import Coverage
from loralab.errors import UserError, check_once
from loralab.experts import AdaptedExperts, AdaptedStack, open_stack
from loralab.heads import head_of, output_layer, outside_backbone, own_copy, under
from loralab.kinds.stack import Stack
from loralab.layer import Adapted, AdaptedHead, Constants, is_linear, plain_modules, put_back
from loralab.methods import starts
from loralab.methods.base import Factors, Roles
from loralab.own_forward import adapted
from loralab.rankmap import LayerRank, RankMap
from loralab.reach import obstacle, tied_to
from loralab.read_past import is_read_past
from loralab.recipe import Recipe, check, recipe
from loralab.start_data import Seen
from loralab.stores import keep
from loralab.stores.float import Float
from loralab.targets import ALL, Targets, all_paths, cover, layer_at, paths_to, shape_of


class StatisticsNote(UserWarning):
    """Modules of the base that would follow their inputs in training are held."""


# ---- what is checked -------------------------------------------------------------------------------------------------


def spec_of(
    handle: AdaptedModel,
    name: str,
    method: str | Recipe,
    settings: Mapping[str, Any],
    targets: Targets,
    head: bool | Sequence[str],
    labels: Sequence[str],
    exclude: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> AdapterSpec:
    """The specification of an adapter. Raises UserError for what cannot be added, before anything has changed."""
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    head = (head,) if isinstance(head, str) else head
    named = {"targets": () if isinstance(targets, str) else targets, "labels": labels, "exclude": exclude}
    for what, names in {**named, "head": () if isinstance(head, bool) else head}.items():
        if names is not None and not _are_names(names):
            raise UserError(f"{what}={names!r}: expected a list of names")
        check_once(what, names or ())
    if not hasattr(tokens, "__len__"):
        raise UserError(f"tokens={tokens!r}: expected a list of the numbers of tokens")
    exclude = tuple(exclude or ())
    r = recipe(method, **settings)
    if r.policy and r.ranks is None:
        raise UserError(
            f"policy={r.policy!r} makes a rank map from data or weights, and there is none: give "
            "ranks=loralab.rank_map(model, method, batches), or use `loralab train`, which makes it (docs/rank-maps.md)"
        )
    _check_name(handle, name, r)
    own_head = head_of(handle.model)
    if head is True and not own_head:
        raise UserError(
            f"head=True: {type(handle.model).__name__} names no head; pass the paths of its modules, head=[...]"
        )
    heads = tuple(own_head) if head is True else tuple(head or ())
    _check_heads(handle, heads, labels)
    if r.factors is None and exclude:
        raise UserError(f"exclude={list(exclude)} with method {method!r}: it adapts no layer, so leave it out")
    if r.factors is None and len(tokens):
        raise UserError(f"tokens={list(tokens)[:4]} with method {method!r}: it adapts no layer, so leave them out")
    r, coverage = (r, None) if r.factors is None else _cover(handle, r, targets, exclude, heads)
    if coverage is not None and len(tokens):
        r, coverage = _with_tokens(handle, r, coverage, tokens)
    if coverage is not None and r.ranks is not None:
        coverage = replace(coverage, tokens=_token_values(handle, r.ranks))
    if r.store:
        keep(nn.Linear(8, 8), r.store)  # a trial: a missing package is reported before anything has changed
    if not heads and coverage is None and r.learn_base is None:
        raise UserError(f"method {method!r} learns nothing but the head: pass head=True")
    in_place = _in_place(r, [key for key in handle.learned if not under(key, heads)])
    if r.learn_base is not None and not in_place:
        raise UserError(
            f"train={r.train}: {type(handle.model).__name__} has no parameter called {r.learn_base} outside of the "
            "head, so nothing of the base would learn: choose another method, or 'head' for the head alone"
        )
    return AdapterSpec(r, coverage, heads, tuple(labels) or handle.labels.names, in_place)


def _check_heads(handle: AdaptedModel, heads: Sequence[str], labels: Sequence[str]) -> None:
    """Raise UserError for a head that cannot be copied, and for labels that no output of the model is for."""
    known = handle.labels.names
    if labels and not heads and known and len(labels) != len(known):
        raise UserError(
            f"{len(labels)} labels for a model of {len(known)}: the adapter needs a head of its own, head=True"
        )
    there = {path for path, _ in plain_modules(handle.model, every_path=True)}
    if missing := [path for path in heads if path not in there]:
        raise UserError(f"head={', '.join(missing)}: the model has no such module")
    if copied := [(path, whole) for path in heads for whole in handle.heads if path != whole and under(path, [whole])]:
        path, whole = copied[0]
        raise UserError(f"head={path}: it is inside {whole}, of which other adapters have copies: name {whole} instead")
    if nested := [path for path in heads if under(path, [other for other in heads if other != path])]:
        raise UserError(f"head: {nested[0]} is inside another of these modules, which is copied whole: leave it out")
    for path in heads:
        if path not in handle.heads and (problem := obstacle(handle.model.get_submodule(path))):
            raise UserError(f"head {path}: {problem}")


def _in_place(r: Recipe, keys: Sequence[str]) -> tuple[str, ...]:
    """Names of the base tensors that a recipe trains in place."""
    if r.learn_base is None:
        return ()
    return tuple(keys if r.learn_base == "all" else [key for key in keys if key.rpartition(".")[2] == r.learn_base])


def _are_names(names: Any) -> bool:
    """Whether these are several names, and not the letters of one."""
    return isinstance(names, Iterable) and not isinstance(names, str) and all(isinstance(each, str) for each in names)


def _check_name(handle: AdaptedModel, name: str, r: Recipe) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise UserError(f"adapter name {name!r}: expected letters, digits, - and _, and no word torch uses itself")
    if name in handle.specs:
        raise UserError(
            f"adapter {name!r} is there already ({', '.join(handle.names)}): remove it or choose a new name"
        )
    if taken := [n for n, spec in handle.specs.items() if spec.base_names]:
        raise UserError(f"adapter {taken[0]!r} trains the base itself, so no other adapter can share that base")
    if r.learn_base and handle.specs:
        raise UserError(f"train={r.train} changes the base that {', '.join(handle.names)} rely on: use a fresh model")


def _cover(
    handle: AdaptedModel, r: Recipe, targets: Targets, exclude: Sequence[str], heads: Sequence[str]
) -> tuple[Recipe, Coverage]:
    """The recipe at ranks that every layer can have, and the layers that it is on."""
    assert r.factors is not None
    own_head = [path for path in head_of(handle.model) if path not in heads]
    output = output_layer(handle.model)  # it can be adapted, by name; what else is a head can be trained only
    beside = [*outside_backbone(handle.model), *([] if output is None else [output])]
    outside = [*heads, *(path for path in own_head if path != output or targets == ALL)]
    outside += [path for path in handle.heads if path not in own_head]  # of other adapters: what is inside is a copy
    coverage = cover(handle.model, targets, outside, exclude, beside)
    if output in own_head and output not in coverage.paths:  # it is no part of the backbone that is counted
        coverage = replace(coverage, parts=tuple(part for part in coverage.parts if part.path != output))
    shapes = {path: shape_of(layer_at(handle.model, path)) for path in coverage.paths}
    if r.ranks is not None:
        if wrong := rankmap.misfits(r.ranks, shapes, coverage.left):
            raise UserError("rank map: " + "; ".join(wrong))
        coverage = coverage.keep(r.ranks.adapted)
        shapes = {path: shapes[path] for path in coverage.paths}
    else:
        r, coverage = _fitting(r, coverage, shapes)
        shapes = {path: shapes[path] for path in coverage.paths}
    _check_misfits(r, shapes)
    if strangers := r.factors.strangers(list(shapes)):  # type: ignore[union-attr]
        raise UserError("; ".join(strangers))
    _check_kinds(handle, r, shapes)
    return r, coverage


def _with_tokens(handle: AdaptedModel, r: Recipe, coverage: Coverage, tokens: Sequence[int]) -> tuple[Recipe, Coverage]:
    """The recipe with these tokens of the embedding of the input, and of an output layer tied to it, as one."""
    find = getattr(handle.model, "get_input_embeddings", None)
    words = find() if find is not None else None
    path = next((path for path, module in plain_modules(handle.model) if module is words), None)
    if words is None or path is None or kinds.kind_of(getattr(words, "original", (words,))[0]) is not kinds.EMBEDDING:
        raise UserError(f"tokens={list(tokens)[:4]}: {type(handle.model).__name__} names no embedding of its input")
    tied = tied_to(handle.model, path)
    if both := [p for p in (path, *tied) if p in coverage.paths]:
        raise UserError(f"tokens: {both[0]} is a target too, so all of its values learn already: leave one out")
    if problem := kinds.refusal(getattr(words, "original", (words,))[0]):
        raise UserError(f"tokens of {path}: {problem}")
    rows = token_layers(handle, path, tokens, shape_of(words)[1])
    plain = {p: LayerRank(getattr(r.factors, "rank", 1)) for p in coverage.paths} if r.ranks is None else r.ranks.layers
    r = check(replace(r, ranks=RankMap({**plain, **rows})))
    return r, replace(coverage, matched={**coverage.matched, "tokens": list(rows)}, left=coverage.left)


def token_layers(handle: AdaptedModel, path: str, tokens: Sequence[int], size: int) -> dict[str, LayerRank]:
    """The layer at `path`, and all that have its weight too, with these tokens of a vocabulary of that size as one."""
    tied = tied_to(handle.model, path)
    one = LayerRank(len(tokens), "tokens" if tied else None, tokens=tuple(sorted(tokens)), vocabulary=size)
    turned = [p for p in (path, *tied) if _is_product(layer_at(handle.model, p))]
    return {p: replace(one, rows=True) if p in turned else one for p in (path, *tied)}


def _is_product(layer: nn.Module) -> bool:
    return kinds.is_product(layer.original[0] if isinstance(layer, Adapted) else layer)


def _token_values(handle: AdaptedModel, ranks: RankMap) -> dict[str, int]:
    """Path -> how many values of a layer learn, of which single tokens do; what is shared counts in the first."""
    of_tokens = [path for path, layer in ranks.adapted.items() if layer.tokens is not None]
    shapes = {path: shape_of(layer_at(handle.model, path)) for path in of_tokens}
    sizes = {p: ranks.layers[p].rank * (shape[1] if ranks.layers[p].rows else shape[0]) for p, shape in shapes.items()}
    first = next(iter(of_tokens), None)
    return {p: n if p == first or ranks.layers[p].share is None else 0 for p, n in sizes.items()}


def _fitting(r: Recipe, coverage: Coverage, shapes: Mapping[str, tuple[int, int]]) -> tuple[Recipe, Coverage]:
    """Give layers that are too small for the rank the largest that they can have, or leave them alone.

    A method that needs one rank in all layers leaves them alone. Where every layer is too small, nothing is changed.
    """
    factors = r.factors
    small = [path for path, shape in shapes.items() if factors.misfit(*shape)]  # type: ignore[union-attr]
    largest = {path: _largest(r, shapes[path]) for path in small}
    if not small or len(small) == len(shapes):
        return r, coverage
    if all(largest.values()):
        ranks = RankMap({path: largest.get(path) or factors.rank for path in shapes})  # type: ignore[union-attr]
        if not rankmap.problems(factors, ranks):  # type: ignore[arg-type]
            return replace(r, ranks=ranks), replace(coverage, ranks={p: n for p, n in largest.items() if n is not None})
    why = str(factors.misfit(*shapes[small[0]]))  # type: ignore[union-attr]
    if hasattr(factors, "rank"):
        why = f"too small for rank {factors.rank}, and {factors.kind} has one rank in all layers"  # type: ignore[union-attr]
    return r, coverage.keep([path for path in shapes if path not in small], why)


def _largest(r: Recipe, shape: tuple[int, int]) -> int | None:
    """The largest rank below that of the recipe which a layer of this size can have, if any."""
    factors: Any = r.factors
    for rank in range(min(getattr(factors, "rank", 0), *shape), 0, -1):
        at = replace(factors, rank=rank)
        if not (at.problems() or at.misfit(*shape) or starts.problems(r.start, at, r.store)):
            return rank
    return None


def _check_misfits(r: Recipe, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError if a layer cannot take the method at its rank."""
    assert r.factors is not None
    own = {path: rankmap.own(r.factors, r.ranks, path) for path in shapes}
    misfits = {path: problem for path, shape in shapes.items() if (problem := own[path].misfit(*shape))}
    if misfits:
        path, problem = next(iter(misfits.items()))
        raise UserError(f"{problem} ({path}; {len(misfits)} of {len(shapes)} layers cannot take it)")


def _check_kinds(handle: AdaptedModel, r: Recipe, paths: Iterable[str]) -> None:
    """Raise UserError for layers whose kind, or whose store for other adapters, does not go with the recipe."""
    layers = {path: layer_at(handle.model, path) for path in paths}
    others = [path for path, layer in layers.items() if not is_linear(layer)]
    if others and (what := starts.looks_at(r.start)):
        raise UserError(
            f"start={r.start!r} looks at {what} of layers whose inputs are vectors, and those of {others[0]} are none: "
            "exclude it"
        )
    if stacks := [path for path, layer in layers.items() if isinstance(layer, Stack | AdaptedStack)]:
        _check_stacks(r, stacks[0])
    stores = {path: handle.layers[path].store for path in layers if path in handle.layers and path not in others}
    if clash := [path for path, store in stores.items() if store != r.store]:
        kept = stores[clash[0]] or "as loaded"
        raise UserError(f"store={r.store!r}: {clash[0]} is kept {kept} for {', '.join(handle.names)} already")


def _check_stacks(r: Recipe, path: str) -> None:
    """Raise UserError for what does not go with a leading axis of experts."""
    f = r.factors
    assert f is not None
    if not (f.low_rank and {"A", "B"} <= set(f.roles)) or f.stepped or type(f).placed is not Factors.placed:
        raise UserError(f"targets match {path}, a stack of experts, and {f.kind} is for single matrices: exclude it")
    if r.dropout:
        raise UserError(
            f"dropout={r.dropout}: {path} is a stack of experts, whose adapter is added to the weight and sees no x"
        )


# ---- what is put in --------------------------------------------------------------------------------------------------


class Starts:
    """Gives the layers of one adapter their starting tensors, in turn; those of one share get the same parameters."""

    def __init__(self, recipe: Recipe) -> None:
        self.layers = {} if recipe.ranks is None else recipe.ranks.layers
        self.recipe = recipe
        self.given: dict[str, dict[str, Tensor]] = {}  # share -> role -> tensor

    def of(self, path: str, fresh: Roles) -> dict[str, Tensor]:
        """Role -> tensor of one layer; `fresh` is what the method starts it with, parameters are for what is shared."""
        layer = self.layers.get(path)
        if layer is None:
            return dict(fresh)
        tensors = dict(fresh)
        if layer.share is not None:
            shared = self.recipe.at(path).factors.shared  # type: ignore[union-attr]
            made = {role: nn.Parameter(t) if role in shared else t for role, t in fresh.items()}
            first = self.given.setdefault(layer.share, made)
            # what goes with A and B (a snapshot, say) starts as that of the first layer, but is the layer's own
            tensors = {role: t if role in shared else t.clone() for role, t in first.items()}
        if layer.gates is not None:
            tensors["gates"] = tensors["A"].new_tensor(layer.gates)  # (r,)
        return tensors


def add_layers(handle: AdaptedModel, spec: AdapterSpec, name: str, generator: Generator, seen: Seen | None) -> None:
    """Wrap what is not wrapped yet and give each layer its tensors; `seen=None` leaves out a computed start."""
    if spec.recipe.factors is None:
        return
    constants = Constants(handle.constants(spec))
    given, places = Starts(spec.recipe), all_paths(handle.model)
    output = output_layer(handle.model)  # losses of other libraries, such as TRL's, read its weight
    if not handle.specs:
        put_back(handle.model)  # a fast path put in before the first adapter knows another `Active`
    for path in spec.paths:
        W = None  # (out, in); once a layer is stored in fewer bits, its own weight is gone
        if path not in handle.layers and (stack := open_stack(handle.model, path)) is not None:
            open_experts(handle, stack.holder[0], path.rpartition(".")[0])
        if path not in handle.layers:
            original = handle.model.get_submodule(path)
            W = kinds.keep(original).dense()  # (out, in)
            layer = adapted(original, spec.recipe.store, handle.active, path).train(original.training)
            layer.read_past = path == output or any(is_read_past(handle.model, place) for place in places[path])
            handle.layers[path] = layer
            for place in places[path]:
                handle.model.set_submodule(place, layer)
        layer = handle.layers[path]
        at = spec.recipe.at(path)
        tensors = _started(at.start, at.factors, W, layer.base, generator, seen, path)
        layer.add(name, at, given.of(path, {role: t.to(layer.device) for role, t in tensors.items()}), constants)


def _started(
    start: str,
    factors: Any,
    W: Tensor | None,
    base: Any,
    generator: Generator,
    seen: Seen | None,
    path: str,
) -> dict[str, Tensor]:
    """Role -> starting tensor of a layer, of a stack of experts with a leading axis (n, ...)."""
    if isinstance(base, Stack):
        each = [Float(matrix, None) for matrix in base.dense().detach()]
        drawn = [_started(start, factors, one.weight, one, generator, seen, path) for one in each]
        return {role: torch.stack([tensors[role] for tensors in drawn]) for role in drawn[0]}
    tensors = starts.blank(start, factors, base.out_features, base.in_features, generator)
    if seen is not None:
        tensors |= factors.from_base(base) | starts.begin(start, factors, W, base, generator, seen.get(path))
    return tensors


def open_experts(handle: AdaptedModel, holder: nn.Module, path: str) -> None:
    """Put a module of experts whose stacks are layers in the place of the model's own."""
    opened = AdaptedExperts(holder, handle.active, path).train(holder.training)
    replace_module(handle.model, holder, opened)
    for name, child in opened.named_children():
        if isinstance(child, AdaptedStack):
            handle.layers[f"{path}.{name}"] = child


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every path that leads to it."""
    for path in paths_to(model, old):
        model.set_submodule(path, new)


def add_heads(
    handle: AdaptedModel, spec: AdapterSpec, name: str, generator: Generator, plain: nn.Module | None
) -> None:
    """Give the adapter its own copy of each head, of that in `plain` if it is given."""
    old = len(handle.labels.names)
    all_of_it = set(head_of(handle.model))
    for path in spec.heads:
        if path not in handle.heads:
            original = handle.model.get_submodule(path)
            handle.heads[path] = AdaptedHead(original, handle.active).train(original.training)
            replace_module(handle.model, original, handle.heads[path])
        # the end of a model may answer in float32, but what other modules follow must not
        last = path in all_of_it and all_of_it <= set(spec.heads)
        handle.heads[path].same_dtype = handle.heads[path].same_dtype or not last
        if plain is None:
            own = own_copy(handle.heads[path].base, old, len(spec.labels) or old, generator)
        else:
            own = own_copy(plain.get_submodule(path), old, old, generator)
        handle.heads[path].copies[name] = own


@contextmanager
def taken_back_on_error(handle: Any, name: str) -> Iterator[None]:
    """Forget an adapter that the block puts in, where an error stops it: no memory, an SVD that fails, Ctrl-C."""
    try:
        yield
    except BaseException:
        for layer in handle.layers.values():
            if name in layer.recipes:
                layer.remove(name)
        for head in handle.heads.values():
            if name in head.copies:
                del head.copies[name]
        if not handle.specs:
            handle.unwrap()
        raise


def open_base(handle: AdaptedModel, spec: AdapterSpec, name: str) -> None:
    """Let the tensors of the base that learn in place learn; a copy of them is kept, unless all do.

    Unless all do, statistics that the model keeps of its inputs stay as they are.
    """
    if spec.recipe.learn_base != "all":
        hold_statistics(handle, [handle.heads[path].copies[name] for path in spec.heads])
    for key in spec.base_names:
        tensor = base_tensor(handle.model, key).requires_grad_(True)
        if spec.recipe.learn_base != "all":
            handle.before[key] = tensor.detach().clone()


def give_base_back(handle: AdaptedModel, spec: AdapterSpec) -> None:
    """The inverse of `open_base`. Raises UserError if there is no copy of what learned."""
    for key in spec.base_names:
        if key not in handle.before:
            raise UserError("this adapter trained the whole base in place: load the model anew instead")
        with torch.no_grad():
            base_tensor(handle.model, key).requires_grad_(False).copy_(handle.before.pop(key))


def hold_statistics(handle: AdaptedModel, heads: Sequence[nn.Module]) -> None:
    """Keep modules with running statistics in evaluation mode: those are of the base, and no file of an adapter.

    Those in an adapter's own copies of heads are held too. Warns of the first of them.
    """
    there = [*plain_modules(handle.model), *(inside for head in heads for inside in head.named_modules())]
    with_statistics = {m: path for path, m in there if isinstance(m._buffers.get("running_mean"), Tensor)}
    if with_statistics and not handle.held:
        path = next(iter(with_statistics.values()))
        warnings.warn(
            f"{path} and other modules with running statistics ({len(with_statistics)}) stay in evaluation mode while "
            "adapters are on the model: what they keep is of the base, which no file of an adapter holds",
            StatisticsNote,
            stacklevel=4,
        )
    for module in with_statistics:
        if module not in handle.held:
            handle.held[module] = module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, _: Any) -> None:
    if module.training:
        module.training = False


def let_statistics_move(handle: AdaptedModel) -> None:
    """The inverse of `hold_statistics`; the modules are in the mode of the model."""
    for module, hook in handle.held.items():
        hook.remove()
        module.training = handle.model.training
    handle.held.clear()
