"""The modules that `attach` puts into a model: an adapted layer with its adapters, and an adapted head with its copies.

Which adapter is active is asked of the one `Active` that all of them share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.active import Active
from loralab.cache import Cache, keeps
from loralab.errors import UserError
from loralab.kinds import is_product, keep, restore
from loralab.methods.gain import row_norms
from loralab.recipe import Recipe
from loralab.update import Dense, Update, apply, by_row, cat, each, merged, nothing, stack, take

FAST = "_loralab_fast"  # holds the forward that `put` gave to a module
HOOKS = (  # where torch keeps the hooks that run when a module is called
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of one module, until `put_back`; one that somebody else gave to the module stays."""
    if has_own_forward(module):
        return
    module.forward = forward
    module.__dict__[FAST] = forward


def put_back(model: nn.Module) -> None:
    """Undo every `put` inside a model. A forward that was wrapped around it since stays."""
    for module in model.modules():
        ours = module.__dict__.pop(FAST, None)
        if ours is not None and module.__dict__["forward"] is ours:
            del module.__dict__["forward"]


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module has a forward that is neither that of its class nor one of `put`: a hook of accelerate, say."""
    return module.__dict__.get("forward") is not module.__dict__.get(FAST)


class LikeOriginal(nn.Module):
    """What the model asks of its module, such as stride or num_experts, is asked of `original`, the one it had."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"][0], name)


class _OnDevice(dict[str, Tensor]):
    """The constants of an adapter on one device; a dict that weak references can point to."""


class Constants:
    """The frozen tensors that all layers of an adapter share, once on every device that a layer is on."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.source = dict(tensors)
        self._copies: WeakValueDictionary[torch.device, _OnDevice] = WeakValueDictionary()

    def on(self, device: torch.device) -> _OnDevice:
        """Role -> tensor on that device, for as long as somebody holds the result."""
        if (found := self._copies.get(device)) is None:
            found = self._copies[device] = _OnDevice({role: t.to(device) for role, t in self.source.items()})
        return found

    def __deepcopy__(self, memo: Any) -> "Constants":
        return self  # nobody writes to them

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"])  # type: ignore[misc]


class Adapted(nn.Module):
    """y = g * (W x + B A x) + b over a frozen base, with the parameters of any number of adapters."""

    read_past = False  # whether a module around the layer reads its weight

    def __init__(self, original: nn.Module, store: str | None, active: Active, path: str = "") -> None:
        super().__init__()
        self.base = keep(original, store)
        self.original = (original,)  # in a tuple, so that it is no submodule
        self.path = path  # in the model, for error messages
        self.dtype: torch.dtype = original.weight.dtype  # type: ignore[assignment]  # of the weight when it comes back
        self.store = store
        self._own_weight: ref[Tensor] | None = None
        if store is not None:
            self._own_weight = ref(original.weight)  # type: ignore[arg-type]
            original.weight = None  # type: ignore[assignment]  # the base has it now, perhaps in fewer bits
        self.active = active
        self.recipes: dict[str, Recipe] = {}
        self.constants: dict[str, Mapping[str, Tensor]] = {}  # frozen, shared with other layers, not in the state
        self._sources: dict[str, tuple[Constants, _OnDevice]] = {}  # what the constants are parts of
        self.adapters = nn.ModuleDict()  # adapter name -> ParameterDict of role -> tensor
        self.lowered, self.stacked = Cache(), Cache(1)  # update of an adapter, and of the rows in use
        self.joined = Cache()  # update of an adapter as the fast path takes it
        self._take_hooks(original)

    def _take_hooks(self, original: nn.Module) -> None:
        """Run the hooks of the original when this layer is called; they are removed from both by the same handle."""
        for key in HOOKS:
            if key in original.__dict__:
                self.__dict__[key] = original.__dict__[key]
        if (hook := getattr(original, "_hf_hook", None)) is not None:  # of a model spread over devices
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(self, hook)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the weight is that of the module which it is tied to: in one copy of a model a tensor is one."""
        return {**self.__dict__, "_own_weight": self.own_weight()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tied = state["_own_weight"]
        super().__setstate__({**state, "_own_weight": None if tied is None else ref(tied)})  # type: ignore[no-untyped-call]

    def own_weight(self) -> Tensor | None:
        """The parameter that a stored weight was made of, if somebody still has it: a module that it is tied to."""
        return None if self._own_weight is None else self._own_weight()

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) of the base, as it is kept; with the update in use, where the model reads it itself."""
        return self.in_use() if self.read_past else self.base.dense()

    def in_use(self) -> Tensor:
        """The weight (out, in) with the update in use. Raises UserError for rows of several adapters."""
        if self.active.ids is not None and any(name in self.recipes for name in self.active.names):
            raise UserError(
                f"the model reads the weight of {self.path} itself, and rows of several adapters have no one weight: "
                "use one adapter at a time, or exclude this layer"
            )
        W, u = self.base.dense(), self.active_update()
        return W if u is None else merged(W, u).to(W.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,) of the base."""
        return self.base.bias  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return next(chain(self.parameters(), self.buffers())).device  # a quantized base without bias has buffers only

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.base.in_features  # type: ignore[no-any-return]

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.base.out_features  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapted":
        """Move or cast the layer: constants go to its device, and a weight comes back in the dtype of the cast."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name in self._sources:
            self._follow(name)
        return self

    def _follow(self, name: str) -> None:
        """Take the constants of an adapter from the device that the layer is on."""
        source, here = self._sources[name]
        if any(t.device != self.device for t in here.values()):
            here = source.on(self.device)
            self._sources[name] = source, here
            self.constants[name] = self._local(self.recipes[name], here)

    def _local(self, recipe: Recipe, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert recipe.factors is not None
        return recipe.factors.local(constants, self.out_features, self.in_features)

    def add(self, name: str, recipe: Recipe, tensors: Mapping[str, Tensor], constants: Constants) -> None:
        """Take an adapter's fresh tensors; a gain starts from the norm of the weight as adapted, so that it is 1."""
        here = constants.on(self.device)
        local = self._local(recipe, here)
        if recipe.gain:
            with torch.no_grad():
                u = replace(recipe, gain=False).lower({**tensors, **local}, self.base)
                tensors = {**tensors, "m": row_norms(self.base, u)}  # (out,)
        roles = {  # a parameter is shared with another layer, so it stays the same object
            role: (t if isinstance(t, nn.Parameter) else nn.Parameter(t, False)).requires_grad_(role in recipe.learn)
            for role, t in tensors.items()
        }
        self.adapters[name] = nn.ParameterDict(roles)
        recipe = next((other for other in self.recipes.values() if other == recipe), recipe)  # one object for equals
        self.recipes[name], self.constants[name], self._sources[name] = recipe, local, (constants, here)
        self.stacked.clear()

    def plain(self, name: str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The layer as it was before, with the update of one adapter merged in (in float32 or wider) if it has one.

        Its weight gets `dtype`, by default that of the model: the one it was loaded in, or was cast to since. A
        quantized weight is dequantized.
        """
        original = self.original[0]
        if self.store is None and name not in self.recipes:
            return restore(original, self.base, None)  # type: ignore[no-any-return]
        W = self.base.dense()  # (out, in)
        own = W.dtype if self.store is None else self.dtype
        if name in self.recipes:
            wide = torch.promote_types(W.dtype, torch.float32)
            with torch.no_grad():
                W = merged(W.to(wide), each(lambda t: t.to(wide), self.lower(name)))
        return restore(original, self.base, W.to(dtype or own))  # type: ignore[no-any-return]

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        del self.adapters[name], self.recipes[name], self.constants[name], self._sources[name]
        self.lowered.forget(name)
        self.joined.forget(name)
        self.stacked.clear()

    def roles(self, name: str) -> dict[str, Tensor]:
        """Role -> tensor of one adapter in this layer."""
        return dict(self.adapters[name]._parameters)  # type: ignore[arg-type]  # at a fifth of the time of items()

    def lower(self, name: str, drawn: Any = None) -> Update | Dense:
        """The update of one adapter; one that has no part in this layer changes nothing. `drawn` is for training."""
        if name not in self.recipes:
            return nothing(self.out_features, self.in_features, next(self.adapters.parameters()))
        p = {**self.roles(name), **self.constants[name]}
        return self.recipes[name].lower(p, self.base, self.active.chosen.get(name, drawn))

    def lower_together(self, names: Sequence[str], drawn: Mapping[str, Any]) -> Update | Dense:
        """The updates of several adapters with a leading axis. Those of one recipe are lowered in one go: of each role
        one tensor (K, ...), where K times as many small operations would be asked for."""
        alike: dict[Any, list[int]] = {}
        for i, name in enumerate(names):
            alike.setdefault(self._likeness(name, drawn), []).append(i)
        if len(alike) == len(names):
            return stack([self.lower(name, drawn.get(name)) for name in names])
        parts, places = [], [i for same in alike.values() for i in same]
        for same in alike.values():
            first = names[same[0]]
            if len(same) == 1:
                parts.append(stack([self.lower(first, drawn.get(first))]))
                continue
            of_each = [self.roles(names[i]) for i in same]
            p = {role: torch.stack([roles[role] for roles in of_each]) for role in of_each[0]}  # (K, ...)
            parts.append(self.recipes[first].lower({**p, **self.constants[first]}, self.base))
        u = cat(parts)
        return u if places == sorted(places) else take(u, torch.tensor(places).argsort())

    def _likeness(self, name: str, drawn: Mapping[str, Any]) -> Any:
        """Equal for adapters that can be lowered in one go: with one recipe and the same constants, nothing drawn."""
        recipe = self.recipes.get(name)
        if recipe is None or not recipe.low_rank or drawn.get(name) is not None or name in self.active.chosen:
            return name
        return id(recipe), *(t.data_ptr() for t in self._sources[name][1].values())

    def dropout(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """The dropout on the input of an adapter, or None where there is none."""
        p = self.recipes[name].dropout if name in self.recipes else 0.0
        return (lambda x: F.dropout(x, p)) if p and self.training else None

    def active_update(self) -> Update | Dense | None:
        """The update in use: None without one, with `ids` one for each row or part (see `by_row`)."""
        state = self.active.state
        names, ids = state.names, state.ids
        if not any(name in self.recipes for name in names):
            return None
        if self.training and torch.is_grad_enabled():
            self._check_frozen()
        drawn = self.active.drawn
        if drawn or not keeps():
            if ids is None:
                return self.lower(names[0], drawn.get(names[0]))
            fresh = self.lower_together(names, drawn)
            return fresh if state.equal_parts else take(fresh, ids)
        if ids is None:
            return self._cached(names[0])
        key = (names, tuple(ids.tolist()), tuple(map(state.chosen.get, names)))
        tensors = [t for name in names for t in self.made_from(name)]

        def rows_of() -> Update | Dense:
            return by_row([self._cached(name) for name in names], ids, state.equal_parts)

        return self.stacked.get(key, tensors, rows_of)  # type: ignore[no-any-return]

    def _check_frozen(self) -> None:
        """Raise UserError if the weight of the base would learn beside the adapters."""
        W = self.base._parameters.get("weight")
        if W is not None and W.requires_grad:
            raise UserError(
                f"{self.path}.weight requires a gradient: adapters are defined over a frozen weight, and their files "
                "do not hold it. Do not call requires_grad_(True) on the whole model after attach (its adapters learn "
                "already); method='full' trains the base itself"
            )

    def _cached(self, name: str) -> Update | Dense:
        key = (name, self.active.chosen.get(name))
        return self.lowered.get(key, self.made_from(name), lambda: self.lower(name))  # type: ignore[no-any-return]

    def made_from(self, name: str) -> list[Tensor]:
        """Every tensor that the update of an adapter is computed from."""
        if name not in self.recipes:
            return []
        own = [*self.adapters[name]._parameters.values(), *self.constants[name].values()]
        over = self.recipes[name].over_base
        base = [*self.base._parameters.values(), *self.base._buffers.values()] if over else []
        return [t for t in (*own, *base) if t is not None]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out); with `ids` the first axis of x is the rows."""
        self.active.check(len(x), replica="_is_replica" in self.__dict__)
        u, ids = self.active_update(), self.active.ids
        if u is None:
            return self.base(x)  # type: ignore[no-any-return]
        names = self.active.names
        if ids is None:
            return apply(x, self.base, u, self.dropout(names[0]))
        rows = x.reshape(len(u[0]), -1, self.in_features)  # (rows or parts, t, in)
        return apply(rows, self.base, u, self._dropout_by_row(names, ids)).reshape(*x.shape[:-1], self.out_features)

    def _dropout_by_row(self, names: tuple[str, ...], ids: Tensor) -> Callable[[Tensor], Tensor] | None:
        drops = [self.dropout(name) for name in names]
        if not any(drops):
            return None

        def each_row(x: Tensor) -> Tensor:
            rows = x.reshape(len(ids), -1, x.shape[-1])  # (rows, t, in)
            return torch.stack(
                [row if (d := drops[i]) is None else d(row) for i, row in zip(ids.tolist(), rows, strict=True)]
            ).view_as(x)

        return each_row


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer, adapted or not, is the product of vectors with a matrix: no embedding, convolution or stack."""
    return type(layer) is Adapted or is_product(layer)


class AdaptedHead(nn.Module):
    """A module that each adapter has its own copy of: a classification head, or a part of one.

    The copies learn, so they are float32 at least; with `same_dtype` an output has the dtype of the input, for a
    module that others of the model follow.
    """

    def __init__(self, base: nn.Module, active: Active, same_dtype: bool = False) -> None:
        super().__init__()
        self.base = base
        self.active = active
        self.same_dtype = same_dtype
        self.copies = nn.ModuleDict()  # adapter name -> its own module
        self.stacked = Cache(1)

    def copy_of(self, name: str) -> nn.Module:
        """The module of an adapter; that of the base if it has none."""
        return self.copies[name] if name in self.copies else self.base  # noqa: SIM401  (a ModuleDict has no get)

    def plain(self, name: str | None = None) -> nn.Module:
        """The module of an adapter, or of the base, in the dtypes of the base."""
        if name is None or name not in self.copies:
            return self.base
        kept = next((t.dtype for t in self.base.parameters() if t.is_floating_point()), None)
        return self.copies[name] if kept is None else self.copies[name].to(kept)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (rows, ...) -> (rows, outputs); rows of adapters with fewer labels are filled with -inf."""
        self.active.check(len(x))
        names, ids = self.active.names, self.active.ids
        if not names:
            return self.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        back = x.dtype if x.is_floating_point() else next(self.base.parameters()).dtype  # an embedding takes integers
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            own = next(self.copy_of(names[0]).parameters(), x)  # a module without parameters takes what comes
            x = x.to(own.dtype)  # the backbone may compute in fewer bits
        out = self.copy_of(names[0])(x, *args, **kwargs) if ids is None else self._by_row(x, names, ids, args, kwargs)
        return out.to(back) if self.same_dtype and isinstance(out, Tensor) else out

    def _by_row(
        self, x: Tensor, names: tuple[str, ...], ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Each row through the module of its adapter."""
        copies = [self.copy_of(name) for name in names]
        if all(type(copy) is nn.Linear for copy in copies) and not (args or kwargs):
            return self._linear(x, copies, ids)  # type: ignore[arg-type]
        present = ids.unique().tolist()
        outs = []
        for i in present:
            with self.active.only(i):
                mine = [_rows_of(value, ids == i) for value in args]
                named = {key: _rows_of(value, ids == i) for key, value in kwargs.items()}
                outs.append(self.copy_of(names[i])(x[ids == i], *mine, **named))
        widest = max(out.shape[-1] for out in outs)
        outs = [F.pad(out, (0, widest - out.shape[-1]), value=-torch.inf) for out in outs]  # (rows of i, ..., widest)
        order = torch.cat([(ids == i).nonzero().squeeze(1) for i in present])  # (rows,)
        return torch.cat(outs)[order.argsort()]

    def _linear(self, x: Tensor, copies: Sequence[nn.Linear], ids: Tensor) -> Tensor:
        """The copies as one product: x (rows, ..., in) -> (rows, ..., widest)."""
        tensors = [t for copy in copies for t in (copy.weight, copy.bias) if t is not None]
        W, b = self.stacked.get((*map(id, copies), tuple(ids.tolist())), tensors, lambda: _heads(copies, ids))
        flat = x.reshape(len(x), -1, x.shape[-1])  # (rows, t, in)
        return torch.baddbmm(b.to(x.dtype), flat, W.mT.to(x.dtype)).view(*x.shape[:-1], -1)


def seen_as(module: nn.Module) -> nn.Module:
    """What `plain_modules` gives in the place of a module: for a head that adapters have copies of, the base's own."""
    return module.base if isinstance(module, AdaptedHead) else module


def plain_modules(model: nn.Module, every_path: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of a model as it is without adapters, but for adapted layers, which come as they are.

    One that several paths lead to comes once, or with `every_path` under each of them. Adapters are not entered, so
    that it takes no longer with a thousand of them.
    """
    seen: set[nn.Module] = set()

    def inside(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = seen_as(module)
        if module in seen:
            return
        if not every_path:
            seen.add(module)
        yield path, module
        for name, child in () if isinstance(module, Adapted) else module._modules.items():
            if child is not None:
                yield from inside(f"{path}.{name}" if path else name, child)

    return inside("", model)


def _rows_of(value: Any, chosen: Tensor) -> Any:
    """The chosen rows of what a module is given beside x, if it is a tensor with as many rows as x."""
    return value[chosen] if isinstance(value, Tensor) and value.shape[:1] == chosen.shape else value


def _heads(copies: Sequence[nn.Linear], ids: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (rows, widest, in), bias (rows, 1, widest)); what a head has no label for has a bias of -inf."""
    widest = max(copy.out_features for copy in copies)
    weights, biases = [], []
    for copy in copies:
        more = (0, widest - copy.out_features)
        weights.append(F.pad(copy.weight, (0, 0, *more)))  # (widest, in)
        bias = copy.weight.new_zeros(copy.out_features) if copy.bias is None else copy.bias
        biases.append(F.pad(bias, more, value=-torch.inf))  # (widest,)
    return torch.stack(weights)[ids], torch.stack(biases)[ids].unsqueeze(1)
