"""A model with adapters: the modules that were put in, what is known of each adapter, and which one is active.

This is the state that `Adapters` (adapters.py) works on. Step hooks, rank policies and the fast path read it too, so it
lies below all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from loralab.active import Active, in_equal_parts, row_ids
from loralab.errors import UserError
from loralab.files import fingerprint
from loralab.heads import head_of, under
from loralab.layer import Adapted, AdaptedHead
from loralab.recipe import Recipe
from loralab.targets import Coverage, shape_of

HANDLE = "_loralab"  # the attribute of a model that holds its handle

Tensors = Mapping[str, tuple[str, Tensor]]  # path.role -> (role, live tensor)


@dataclass(frozen=True)
class AdapterSpec:
    """What is known of one adapter beside its tensors."""

    recipe: Recipe
    coverage: Coverage | None  # None: no layer is adapted
    heads: tuple[str, ...]  # paths of the modules that are its head
    labels: tuple[str, ...]
    base_names: tuple[str, ...]  # tensors of the base that learn in place (full fine-tuning)

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers."""
        return [] if self.coverage is None else self.coverage.paths


class AdaptedModel:
    """The state of a model with adapters, and what can be asked of it. Changed by `Adapters` alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active = Active()
        self.specs: dict[str, AdapterSpec] = {}
        self.layers: dict[str, Adapted] = {}
        self.heads: dict[str, AdaptedHead] = {}
        self.learned = {key: p.requires_grad for key, p in model.named_parameters()}  # before `attach`
        self.before: dict[str, Tensor] = {}  # bits of base tensors that learn in place, unless all do
        outside = head_of(model)
        self._base_keys = [key for key in self.learned if not under(key, outside)]
        self._base_size = sum(model.get_parameter(key).numel() for key in self._base_keys)
        self._sha256: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order they were added."""
        return list(self.specs)

    @property
    def base_sha256(self) -> str:
        """sha256 of the base's tensors as they were before any training, rounded to bfloat16 (see `fingerprint`)."""
        if self._sha256 is None:
            self._sha256 = fingerprint((key, base_tensor(self.model, key)) for key in self._base_keys)
        return self._sha256

    def spec(self, name: str | None = None) -> AdapterSpec:
        """What is known of an adapter; None means the active one. Raises UserError for an unknown name."""
        return self.specs[self.only(name)]

    def only(self, name: str | None) -> str:
        """The name itself if there is such an adapter; None means the active one. Raises UserError otherwise."""
        if name is None:
            if len(self.active.names) != 1:
                raise UserError(
                    f"name an adapter: active are {self.active.names or 'none'}, there are {', '.join(self.names)}"
                )
            return self.active.names[0]
        if name not in self.specs:
            raise UserError(f"no adapter {name!r} here: there are {', '.join(self.names) or 'none'}")
        return name

    @contextmanager
    def use(
        self, names: str | Sequence[str] | None, ids: Tensor | Sequence[int] | None = None, rank: int | None = None
    ) -> Iterator[Self]:
        """Activate an adapter inside the block: one name, None for the base, or names with `ids` (rows,) into them.

        `rank` evaluates an adapter that was trained for many ranks (DyLoRA) at one of them.
        Raises UserError for an unknown name, ids that do not fit, or a rank the adapter was not trained for.
        """
        chosen = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        self._check_use(names, chosen, ids)
        rows = None if ids is None else row_ids(ids, len(chosen))
        equal = rows is not None and in_equal_parts(rows, len(chosen))
        ranked = {} if rank is None else {"chosen": {name: self._at_rank(name, rank) for name in chosen}}
        with self.active.changed(names=chosen, ids=rows, equal_parts=equal, streams=(), **ranked):
            yield self

    def _check_use(self, names: Any, chosen: tuple[str, ...], ids: Any) -> None:
        if unknown := [name for name in chosen if name not in self.specs]:
            raise UserError(
                f"no adapter {', '.join(map(repr, unknown))} here: there are {', '.join(self.names) or 'none'}"
            )
        if changed := [name for name, spec in self.specs.items() if spec.base_names and chosen != (name,)]:
            raise UserError(f"adapter {changed[0]!r} trains the base in place, so there is no base beneath it to use")
        if (ids is None) != (len(chosen) < 2 and not isinstance(names, list | tuple)):
            raise UserError(f"use({names!r}, ids={ids!r}): a list of names goes with ids, a single name without")

    def _at_rank(self, name: str, rank: int) -> Any:
        factors = self.specs[name].recipe.factors
        if factors is None:
            raise UserError(f"adapter {name!r} adapts no layer, so it has no rank")
        return factors.at(rank)

    # ---- tensors of an adapter -----------------------------------------------------------------------------------

    def tensors(self, name: str | None = None) -> dict[str, tuple[str, Tensor]]:
        """path.role -> (role, live tensor) of everything that belongs to an adapter, its head and base tensors too."""
        name = self.only(name)
        spec = self.specs[name]
        out = {f"{p}.{role}": (role, t) for p in spec.paths for role, t in self.layers[p].roles(name).items()}
        out |= {key: (key.rpartition(".")[2], base_tensor(self.model, key)) for key in spec.base_names}
        for path in spec.heads:
            out |= {f"{path}.{key}": ("head", t) for key, t in self.heads[path].copies[name].named_parameters()}
        return out

    def state(self, name: str | None = None) -> dict[str, Tensor]:
        """{"encoder.layer.0.attention.self.query.A": tensor, ...}: path.role, the live tensors."""
        return {key: tensor for key, (_, tensor) in self.tensors(name).items()}

    def counts(self, name: str | None = None) -> dict[str, int]:
        """Numbers of values: that learn in the adapter, in its head, both together, and in the whole base."""
        learned = [(role, t.numel()) for role, t in once(self.tensors(name)).values() if t.requires_grad]
        head = sum(size for role, size in learned if role == "head")
        adapter = sum(size for role, size in learned if role != "head")
        return {"adapter": adapter, "head": head, "trainable": adapter + head, "base": self._base_size}

    def constants(self, spec: AdapterSpec) -> dict[str, Tensor]:
        """The frozen tensors that all layers of an adapter share, and no file holds (VeRA's A and B)."""
        recipe = spec.recipe
        if recipe.factors is None:
            return {}
        sizes = {path: shape_of(self.model.get_submodule(path)) for path in spec.paths}
        return recipe.factors.constants([recipe.at(path).factors.shape(*size) for path, size in sizes.items()])  # type: ignore


def base_tensor(model: nn.Module, key: str) -> Tensor:
    """A tensor of an adapted model by the name it had before `attach`."""
    *path, last = key.split(".")
    module = model
    for part in path:
        module = module.get_submodule(part)
        if isinstance(module, AdaptedHead):
            module = module.base
    return getattr(module.original[0] if isinstance(module, Adapted) else module, last)  # type: ignore[no-any-return]


def once(tensors: Tensors) -> dict[str, tuple[str, Tensor]]:
    """The entries of `AdaptedModel.tensors` without repeats: a shared tensor stays under its first layer."""
    first = {id(tensor): key for key, (_, tensor) in reversed(list(tensors.items()))}
    return {key: pair for key, pair in tensors.items() if first[id(pair[1])] == key}
