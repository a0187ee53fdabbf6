"""The two modules that `attach` puts into a model: an adapted linear layer and an adapted head.

They hold tensors only. Which adapter is live is asked of the one `Active` that all of them share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.active import Active
from loralab.cache import Cache
from loralab.methods.gain import row_norms
from loralab.recipe import Recipe
from loralab.stores import keep, restore
from loralab.update import Dense, Update, apply, by_row, each, merged, nothing

FAST = "_loralab_fast"  # the mark of a module whose forward is not that of its class


def put(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Gives one module another way to compute what it computes, until `put_back`."""
    module.forward = forward
    module.__dict__[FAST] = True


def put_back(model: nn.Module) -> None:
    """Every module computes as its class says again."""
    for module in model.modules():
        if module.__dict__.pop(FAST, False):
            del module.__dict__["forward"]


class Adapted(nn.Module):
    """y = g * (W x + B A x) + b over a frozen base, with the parameters of any number of adapters."""

    def __init__(self, original: nn.Module, store: str | None, active: Active) -> None:
        super().__init__()
        self.base = keep(original, store)
        self.original = (original,)  # in a tuple, so that it is no submodule
        self.dtype: torch.dtype = original.weight.dtype  # type: ignore[assignment]
        self.store = store
        if store is not None:
            original.weight = None  # type: ignore[assignment]  # the base keeps it now, perhaps in fewer bits
        self.active = active
        self.recipes: dict[str, Recipe] = {}
        self.constants: dict[str, Mapping[str, Tensor]] = {}  # frozen, shared with other layers, not in the state
        self.adapters = nn.ModuleDict()  # adapter name -> ParameterDict of role -> tensor
        self.lowered, self.stacked = Cache(), Cache(1)  # update of an adapter, and of the rows in use
        self.joined = Cache()  # update of an adapter as the fast path takes it

    @property
    def weight(self) -> Tensor:
        return self.base.dense()  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers())).device  # a quantized base without bias has buffers only

    @property
    def in_features(self) -> int:
        return self.base.in_features  # type: ignore[no-any-return]

    @property
    def out_features(self) -> int:
        return self.base.out_features  # type: ignore[no-any-return]

    def add(self, name: str, recipe: Recipe, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
        """Takes an adapter's fresh tensors; a gain starts from the norm of the weight as adapted, so that it is 1."""
        assert recipe.factors is not None
        self.constants[name] = recipe.factors.local(constants, self.out_features, self.in_features)
        if recipe.gain:
            with torch.no_grad():
                u = replace(recipe, gain=False).lower({**tensors, **self.constants[name]}, self.base)
                tensors = {**tensors, "m": row_norms(self.base, u)}
        roles = {  # a parameter is shared with another layer, so it stays the very one
            role: (t if isinstance(t, nn.Parameter) else nn.Parameter(t, False)).requires_grad_(role in recipe.learn)
            for role, t in tensors.items()
        }
        self.adapters[name] = nn.ParameterDict(roles)
        self.recipes[name] = recipe
        self.stacked.known.clear()

    def plain(self, name: str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The layer as it was before, with the update of one adapter merged in (in float32 or wider) if it has one.

        Its weight is kept in `dtype`, by default the one it was loaded in; from a quantized base it is dequantized.
        """
        W = self.base.dense()
        if name in self.recipes:
            wide = torch.promote_types(W.dtype, torch.float32)
            with torch.no_grad():
                W = merged(W.to(wide), each(lambda t: t.to(wide), self.lower(name)))
        restore(self.original[0], W.to(dtype or self.dtype))
        return self.original[0]

    def remove(self, name: str) -> None:
        del self.adapters[name], self.recipes[name], self.constants[name]
        self.lowered.forget(name)
        self.joined.forget(name)
        self.stacked.known.clear()

    def roles(self, name: str) -> dict[str, Tensor]:
        """Role -> tensor of one adapter in this layer."""
        return dict(self.adapters[name].items())  # type: ignore[operator]

    def lower(self, name: str, drawn: Any = None) -> Update | Dense:
        """The update of one adapter; one that has no part in this layer changes nothing. `drawn` is for training."""
        if name not in self.recipes:
            return nothing(self.out_features, self.in_features, next(self.adapters.parameters()))
        p = {**self.roles(name), **self.constants[name]}
        return self.recipes[name].lower(p, self.base, self.active.chosen.get(name, drawn))

    def drop(self, name: str) -> Callable[[Tensor], Tensor] | None:
        p = self.recipes[name].dropout if name in self.recipes else 0.0
        return (lambda x: F.dropout(x, p)) if p and self.training else None

    def active_update(self) -> Update | Dense | None:
        """The update of what is live: None where nothing is, with `ids` one for each row or part (see `by_row`)."""
        names, ids = self.active.names, self.active.ids
        steps_follow = torch.is_grad_enabled() or bool(self.active.drawn)
        if steps_follow:
            for memo in (self.lowered, self.stacked, self.joined):
                memo.known.clear()
        if not any(name in self.recipes for name in names):
            return None
        if steps_follow:
            made = [self.lower(name, self.active.drawn.get(name)) for name in names]
            return made[0] if ids is None else by_row(made, ids, self.active.equal_parts)
        if ids is None:
            return self._known(names[0])
        key = (names, tuple(ids.tolist()), tuple(map(self.active.chosen.get, names)))
        of = [t for name in names for t in self.made_from(name)]

        def rows_of() -> Update | Dense:
            return by_row([self._known(name) for name in names], ids, self.active.equal_parts)

        return self.stacked.get(key, of, rows_of)  # type: ignore[no-any-return]

    def _known(self, name: str) -> Update | Dense:
        """`lower` of what is live, done once as nothing learns."""
        key = (name, self.active.chosen.get(name))
        return self.lowered.get(key, self.made_from(name), lambda: self.lower(name))  # type: ignore[no-any-return]

    def made_from(self, name: str) -> list[Tensor]:
        """Every tensor that the update of an adapter is computed from."""
        if name not in self.recipes:
            return []
        own = [*self.adapters[name]._parameters.values(), *self.constants[name].values()]
        base = [*self.base._parameters.values(), *self.base._buffers.values()] if self.recipes[name].gain else []
        return [t for t in (*own, *base) if t is not None]

    def forward(self, x: Tensor) -> Tensor:
        self.active.check(len(x))
        u, ids = self.active_update(), self.active.ids
        if u is None:
            return self.base(x)  # type: ignore[no-any-return]
        if ids is None:
            return apply(x, self.base, u, self.drop(self.active.names[0]))
        rows = x.reshape(len(u[0]), -1, self.in_features)
        return apply(rows, self.base, u, self._drop_rows(self.active.names, ids)).reshape(
            *x.shape[:-1], self.out_features
        )

    def _drop_rows(self, names: tuple[str, ...], ids: Tensor) -> Callable[[Tensor], Tensor] | None:
        drops = [self.drop(name) for name in names]
        if not any(drops):
            return None

        def each_row(x: Tensor) -> Tensor:
            rows = x.reshape(len(ids), -1, x.shape[-1])
            return torch.stack(
                [row if (d := drops[i]) is None else d(row) for i, row in zip(ids.tolist(), rows, strict=True)]
            ).view_as(x)

        return each_row


class AdaptedHead(nn.Module):
    """A module that each adapter has its own copy of: a classification head, or a part of one."""

    def __init__(self, base: nn.Module, active: Active) -> None:
        super().__init__()
        self.base = base
        self.active = active
        self.copies = nn.ModuleDict()  # adapter name -> its own module
        self.stacked = Cache(1)

    def copy_of(self, name: str) -> nn.Module:
        return self.copies[name] if name in self.copies else self.base  # noqa: SIM401  (a ModuleDict has no get)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (rows, ...) -> (rows, outputs); rows of adapters with fewer labels are filled with -inf."""
        names, ids = self.active.names, self.active.ids
        if names and not torch.is_autocast_enabled(x.device.type):  # the backbone may compute in bfloat16
            x = x.to(next(self.copy_of(names[0]).parameters()).dtype)
        if torch.is_grad_enabled():  # a step may follow, and torch's fused AdamW leaves versions as they were
            self.stacked.known.clear()
        if not names:
            return self.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        if ids is None:
            return self.copy_of(names[0])(x, *args, **kwargs)  # type: ignore[no-any-return]
        self.active.check(len(x))
        copies = [self.copy_of(name) for name in names]
        if all(type(copy) is nn.Linear for copy in copies) and not (args or kwargs):
            return self._linear(x, copies, ids)  # type: ignore[arg-type]
        present = ids.unique().tolist()
        outs = []
        for i in present:
            with self.active.only(i):
                outs.append(self.copy_of(names[i])(x[ids == i], *args, **kwargs))
        widest = max(out.shape[-1] for out in outs)
        outs = [F.pad(out, (0, widest - out.shape[-1]), value=-torch.inf) for out in outs]
        order = torch.cat([(ids == i).nonzero().squeeze(1) for i in present])  # (rows,)
        return torch.cat(outs)[order.argsort()]

    def _linear(self, x: Tensor, copies: Sequence[nn.Linear], ids: Tensor) -> Tensor:
        """The copies as one product: x (rows, ..., in) -> (rows, ..., widest)."""
        of = [t for copy in copies for t in (copy.weight, copy.bias) if t is not None]
        W, b = self.stacked.get((*map(id, copies), tuple(ids.tolist())), of, lambda: _heads(copies, ids))
        flat = x.reshape(len(x), -1, x.shape[-1])  # (rows, t, in)
        return torch.baddbmm(b.to(x.dtype), flat, W.mT.to(x.dtype)).view(*x.shape[:-1], -1)


def _heads(copies: Sequence[nn.Linear], ids: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (rows, widest, in), bias (rows, 1, widest)); what a head has no label for has a bias of -inf."""
    widest = max(copy.out_features for copy in copies)
    weights, biases = [], []
    for copy in copies:
        more = (0, widest - copy.out_features)
        weights.append(F.pad(copy.weight, (0, 0, *more)))
        bias = copy.weight.new_zeros(copy.out_features) if copy.bias is None else copy.bias
        biases.append(F.pad(bias, more, value=-torch.inf))
    return torch.stack(weights)[ids], torch.stack(biases)[ids].unsqueeze(1)
