"""A model with adapters: the modules that were put in, the specification of each adapter, and which one is active.

This is the state that `Adapters` (adapters.py) works on. Step hooks, rank policies and the fast path read it too, so it
lies below all of them.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from loralab import cache
from loralab.active import ROWS_FIRST, Active, first_row, follow_checkpoints, in_equal_parts, row_ids
from loralab.coverage import Coverage
from loralab.errors import UserError, check_once
from loralab.experts import AdaptedStack
from loralab.hashes import fingerprint
from loralab.heads import Labels, head_of, under
from loralab.layer import Adapted, AdaptedHead
from loralab.methods.base import whole
from loralab.recipe import Recipe, name_of
from loralab.rounded import Rounded, RoundedNote
from loralab.targets import layer_at, shape_of

NEWEST = (5, 23)  # of transformers, with which the tests pass; they do with 5.17 too
HANDLE = "_loralab"  # the attribute of a model that holds its handle
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # the attribute where DistributedDataParallel reads what to leave out

OVERVIEW = ("adapter", "method", "rank", "targets", "values", "learns", "in use")  # columns of `print(adapters)`

Tensors = Mapping[str, tuple[str, Tensor]]  # path.role -> (role, live tensor)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter, apart from its tensors."""

    recipe: Recipe
    coverage: Coverage | None  # None: no layer is adapted
    heads: tuple[str, ...]  # paths of the modules that it has its own copy of
    labels: tuple[str, ...]
    base_names: tuple[str, ...]  # tensors of the base that learn in place (full fine-tuning)

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers."""
        return [] if self.coverage is None else self.coverage.paths


class AdaptedModel:
    """The state of a model with adapters, and what can be asked of it. Changed by `Adapters` alone."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"{model!r:.80} is no model: expected a torch.nn.Module, as from_pretrained gives")
        _check_unwrapped(model)
        _check_there(model)
        _check_transformers()
        follow_checkpoints()
        self.model = model
        self.active = Active()
        self.specs: dict[str, AdapterSpec] = {}
        self.layers: dict[str, Adapted] = {}
        self.heads: dict[str, AdaptedHead] = {}
        self.learned = {key: p.requires_grad for key, p in model.named_parameters()}  # before `attach`
        self.labels = Labels.of(model)  # of the plain model
        self._shown = self.labels.names  # those that the model's config was given last
        self.before: dict[str, Tensor] = {}  # copies of base tensors that learn in place, unless all do
        self.held: dict[nn.Module, Any] = {}  # module with running statistics -> the hook that holds it
        self.detached = False
        self.synchronized: tuple[str, ...] | None = None  # adapters for DistributedDataParallel; None: the active one
        self._ignored = frozenset(getattr(model, DDP_IGNORES, ()))
        self._own_names: dict[str, list[str]] = {}  # adapter -> its `parameter_names`
        outside = head_of(model)
        self._base_keys = [key for key in self.learned if not under(key, outside)]
        self._base_size = sum(model.get_parameter(key).numel() for key in self._base_keys)
        self._sha256: str | None = None
        self.rounded_from: torch.dtype | None = None  # what the frozen tensors were before a fast path rounded them
        self.rounded = Rounded()  # those tensors
        self._rows_first = False  # whether layers are known to get inputs (rows, ...)

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order they were added."""
        return list(self.specs)

    @property
    def base_sha256(self) -> str:
        """sha256 of the base's tensors as they were before any training, rounded to bfloat16 (see `fingerprint`)."""
        if self._sha256 is None:
            self._sha256 = fingerprint((key, whole(base_tensor(self.model, key))) for key in self._base_keys)
        return self._sha256

    def spec(self, name: str | None = None) -> AdapterSpec:
        """The specification of an adapter; None means the active one. Raises UserError for an unknown name."""
        return self.specs[self.only(name)]

    def coverage(self, name: str | None = None) -> Coverage | None:
        """Which layers an adapter is on and which it leaves alone; None if it is on no layer.

        Raises UserError for an unknown name.
        """
        return self.spec(name).coverage

    def only(self, name: str | None) -> str:
        """The name itself if there is such an adapter; None means the active one. Raises UserError otherwise."""
        self.check_attached()
        if name is None:
            if len(self.active.names) != 1:
                raise UserError(
                    f"name an adapter: active are {self.active.names or 'none'}, there are {', '.join(self.names)}"
                )
            return self.active.names[0]
        if not isinstance(name, str) or name not in self.specs:
            raise UserError(f"no adapter {name!r} here: there are {', '.join(self.names) or 'none'}")
        return name

    @property
    def divided(self) -> bool:
        """Whether FSDP has divided tensors of the model among processes, all of which must then take part in a save."""
        return any(hasattr(p, "full_tensor") for p in self.model.parameters())

    def check_undivided(self, what: str) -> None:
        """Raise UserError if FSDP has divided the model, for what needs the whole of it in one process."""
        if self.divided:
            raise UserError(
                f"{what}: FSDP divides this model; save() the adapter, load it in one process and {what} there"
            )

    def check_attached(self) -> None:
        """Raise UserError if the adapters were taken off the model."""
        if self.detached:
            raise UserError(
                "these adapters were detached from their model and are gone: attach or load again, and use the new "
                "handle"
            )

    def __str__(self) -> str:
        """A table of the adapters: method, rank, targets, values, whether they learn, and which is in use."""
        if self.detached:
            return "adapters that were detached from their model"
        rows = [OVERVIEW, *(self._overview(name) for name in self.specs)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(OVERVIEW))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    __repr__ = __str__

    def _overview(self, name: str) -> tuple[str, ...]:
        spec, tensors = self.specs[name], once(self.tensors(name))
        ranks = sorted({getattr(spec.recipe.at(path).factors, "rank", 0) for path in spec.paths} - {0})
        learned = sum(t.numel() for _, t in tensors.values() if t.requires_grad)
        values = sum(t.numel() for _, t in tensors.values())
        learns = "no" if not learned else "yes" if learned == values else f"{learned:,} of them"
        where = ", ".join([*(spec.coverage.matched if spec.coverage else ()), *("+ head" for _ in spec.heads[:1])])
        in_use = "yes" if name in self.active.names else "no"
        rank = "-".join(dict.fromkeys(str(rank) for rank in (*ranks[:1], *ranks[-1:])))
        layers = f"{where} ({len(spec.paths)} layers)"
        return name, name_of(spec.recipe), rank or "-", layers, f"{values:,}", learns, in_use

    # ---- what is in use ------------------------------------------------------------------------------------------

    def activate(self, name: str | None) -> None:
        """Make an adapter, or the base (None), what the model answers with outside of `use`, in all threads and tasks.

        `attach` and `load` do so too. Raises UserError for an unknown name, and for the base beneath an adapter that
        trains it in place.
        """
        self.check_attached()
        self._check_use(name, () if name is None else (name,), None)
        self.active.activate(name)
        self._follow()

    def synchronize(self, *names: str) -> None:
        """Let DistributedDataParallel average the gradients of these adapters; by default those of the active one.

        Call it before the model is wrapped: the tensors of all other adapters are left out of the wrapper's sight, as
        it waits for a gradient of every tensor that it sees. Raises UserError for an unknown name.
        """
        check_once("synchronize", names)
        self.synchronized = tuple(map(self.only, names))
        self._follow()

    def caching(self, scope: cache.Scope | None = None, training: bool = False) -> AbstractContextManager[None]:
        """Keep what adapters are lowered to inside the block, so that it is computed once and not in every forward.

        Nothing may change the model's tensors meanwhile: wrap a loop that evaluates or predicts. With `training` the
        adapters may learn, and only what depends on the frozen base is kept. Holds for the current thread or task. A
        `scope` that is entered again still has what was kept; it is for a model that nobody else can change.
        """
        return cache.caching(cache.Scope(learns=True) if training else scope)

    def _follow_labels(self) -> None:
        """Let the model's labels be those of the adapter in use; of several adapters those of the first."""
        spec = self.specs.get(self.active.names[0]) if self.active.names else None
        self.show_labels(spec.labels if spec is not None and spec.heads else self.labels.names)

    def show_labels(self, names: tuple[str, ...]) -> None:
        """Give the model's config these labels, unless they are those of before, which somebody may have renamed."""
        if names and names != self._shown:
            self.labels.set(self.model, names)
            self._shown = names

    def _follow(self) -> None:
        """Let the model's labels, and what DistributedDataParallel synchronizes, be those of the active adapter."""
        self._follow_labels()
        seen = self.active.default.names if self.synchronized is None else self.synchronized
        known = self._own_names
        self._own_names = {name: known.get(name) or self.parameter_names(name) for name in self.specs}
        ignored = [*self._ignored, *(key for name in self.specs if name not in seen for key in self._own_names[name])]
        if ignored or hasattr(self.model, DDP_IGNORES):
            setattr(self.model, DDP_IGNORES, sorted(ignored))

    def parameter_names(self, name: str) -> list[str]:
        """The names that an adapter's own tensors have in `named_parameters` of the model."""
        spec = self.specs[name]
        out = [f"{path}.adapters.{name}.{role}" for path in spec.paths for role in self.layers[path].roles(name)]
        for path in spec.heads:
            out += [f"{path}.copies.{name}.{key}" for key, _ in self.heads[path].copies[name].named_parameters()]
        return out

    def before_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check what is in use before a forward pass of the model, and let its labels follow (a hook of the model)."""
        if torch.compiler.is_compiling():
            torch._dynamo.disable(self.active.check_compiled)()  # runs at each call, outside of the graph
            return
        self._follow_labels()
        if (learning := self.rounded.learning()) is not None:
            self._give_dtype_back(learning)
        if self.active.ids is not None and not self._rows_first:
            self._check_rows_first(len(self.active.ids), args, kwargs)
        wrapper = DistributedDataParallel._get_active_ddp_module() if torch.is_grad_enabled() else None
        if wrapper is not None and self.model.training:
            self._check_synchronized(wrapper)

    def _give_dtype_back(self, learning: Tensor) -> None:
        """Let the base have the dtype that it had before a fast path, as a part of it learns by now; warn of it."""
        key = next((key for key, p in self.model.named_parameters() if p is learning), "a tensor of the base")
        self.rounded.give_back()
        for layer in self.layers.values():
            layer.dtype = self.rounded_from or layer.dtype
        warnings.warn(
            f"{key} learns now, and fast() had rounded it, so that small steps would be lost: the base has its own "
            "dtype again, with the rounded values. Let it learn before fast(), which then leaves the base as it is and "
            "asks for autocast",
            RoundedNote,
            stacklevel=4,
        )

    def _check_rows_first(self, rows: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise UserError where layers get inputs (t, rows, in): as many rows as tokens would hide it from `ids`.

        Where a batch is square, the model is called with its first row alone, on the base and without its hooks. What
        it cannot do without the rest of its inputs, or where FSDP has divided it, stays unknown.
        """
        square = any(isinstance(t, Tensor) and t.shape[:2] == (rows, rows) for t in (*args, *kwargs.values()))
        if not square or rows == 1 or self.divided:
            return
        first_axes: list[int] = []
        devices = sorted({t.device.index for t in self.model.parameters() if t.device.type == "cuda"})
        one = [first_row(value, rows) for value in args], {key: first_row(v, rows) for key, v in kwargs.items()}
        base = self.active.changed(names=(), ids=None, streams=(), first_axes=first_axes)
        with base, torch.no_grad(), torch.random.fork_rng(devices):
            try:
                self.model.forward(*one[0], **one[1])
            except Exception:
                return
        if rows in first_axes:
            raise UserError(f"{type(self.model).__name__} puts tokens before rows: {ROWS_FIRST}")
        self._rows_first = True

    def _check_synchronized(self, wrapper: DistributedDataParallel) -> None:
        """Raise UserError if an adapter in use is not one whose gradients the wrapper averages."""
        for name in self.active.names:
            if not wrapper.parameters_to_ignore.isdisjoint(self.parameter_names(name)):
                raise UserError(
                    f"adapter {name!r} was not active when the model was given to DistributedDataParallel, so its "
                    f"gradients would not be averaged: call adapters.synchronize({name!r}) or activate it before"
                )

    @contextmanager
    def use(
        self, names: str | Sequence[str] | None, ids: Tensor | Sequence[int] | None = None, rank: int | None = None
    ) -> Iterator[Self]:
        """Activate an adapter inside the block: one name, None for the base, or names with `ids` (rows,) into them.

        `rank` evaluates an adapter that was trained for many ranks (DyLoRA) at one of them.

        The block holds for the current thread or asyncio task only, so that several of them can use adapters of one
        model at once. A thread that is started inside the block begins with the default of the model (see `activate`)
        and must enter `use` itself; a task that is started inside inherits what is in use. A backward pass, and the
        recomputation of activation checkpointing, use what the forward pass used, wherever they run. The labels in the
        model's config, which the loss of transformers reads, follow the adapter at each forward pass; as there is one
        config, threads that compute such losses at once need adapters with as many labels.

        Raises UserError for an unknown name, ids that do not fit, or a rank the adapter was not trained for.
        """
        self.check_attached()
        one = isinstance(names, str) or not isinstance(names, Iterable)
        chosen: tuple[Any, ...] = () if names is None else (names,) if one else tuple(names)
        self._check_use(names, chosen, ids)
        rows = None if ids is None else row_ids(ids, len(chosen))
        equal = rows is not None and in_equal_parts(rows, len(chosen))
        ranked = {} if rank is None else {"chosen": {name: self._at_rank(name, rank) for name in chosen}}
        try:
            with self.active.changed(names=chosen, ids=rows, equal_parts=equal, streams=(), **ranked):
                self._follow_labels()
                yield self
        finally:
            if not self.detached:
                self._follow_labels()

    def _check_use(self, names: Any, chosen: tuple[str, ...], ids: Any) -> None:
        check_once("use", chosen)
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
        """path.role -> (role, live tensor) of everything that belongs to an adapter, its head and base tensors too.

        Raises UserError for an unknown name.
        """
        name = self.only(name)
        spec = self.specs[name]
        out = {f"{p}.{role}": (role, t) for p in spec.paths for role, t in self.layers[p].roles(name).items()}
        out |= {key: (key.rpartition(".")[2], base_tensor(self.model, key)) for key in spec.base_names}
        for path in spec.heads:
            out |= {f"{path}.{key}": ("head", t) for key, t in self.heads[path].copies[name].named_parameters()}
        return out

    def state(self, name: str | None = None) -> dict[str, Tensor]:
        """{"encoder.layer.0.attention.self.query.A": tensor, ...}: path.role -> live tensor.

        Raises UserError for an unknown name.
        """
        return {key: tensor for key, (_, tensor) in self.tensors(name).items()}

    def counts(self, name: str | None = None) -> dict[str, int]:
        """Numbers of values: that learn in the adapter, in its head, both together, and in the whole base.

        Raises UserError for an unknown name.
        """
        learned = [(role, t.numel()) for role, t in once(self.tensors(name)).values() if t.requires_grad]
        head = sum(size for role, size in learned if role == "head")
        adapter = sum(size for role, size in learned if role != "head")
        return {"adapter": adapter, "head": head, "trainable": adapter + head, "base": self._base_size}

    def constants(self, spec: AdapterSpec) -> dict[str, Tensor]:
        """The frozen tensors that all layers of an adapter share, and no file holds (VeRA's A and B)."""
        recipe = spec.recipe
        if recipe.factors is None:
            return {}
        sizes = {path: shape_of(layer_at(self.model, path)) for path in spec.paths}
        return recipe.factors.constants([recipe.at(path).factors.shape(*size) for path, size in sizes.items()])  # type: ignore


def _check_unwrapped(model: nn.Module) -> None:
    """Raise UserError for a model in a wrapper or with one inside, PEFT's too: its paths are not those of the model."""
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UserError(
                f"{path or 'the model'} is {type(module).__name__} of PEFT: take its adapter off with unload() or "
                "merge_and_unload() first, or save it and loralab.load(base, folder)"
            )
        inner = next((name for name in ("_orig_mod", "_fsdp_wrapped_module") if name in module._modules), None)
        if isinstance(module, DataParallel | DistributedDataParallel):
            inner = "module"
        if inner is not None:
            raise UserError(
                f"{path or 'the model'} is wrapped in {type(module).__name__}: attach to the model itself first "
                f"({path or 'model'}.{inner}), then wrap or compile it"
            )


def _check_there(model: nn.Module) -> None:
    """Raise UserError for a parameter that has no shape yet, as those of torch's lazy modules."""
    lazy = next((key for key, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise UserError(f"{lazy} has no shape before the first forward: call the model with a batch once, then attach")


@functools.cache
def _check_transformers() -> None:
    """Warn once where transformers is newer than what is tested: its layers may compute something else."""
    here = tuple(int(part) for part in transformers.__version__.split(".")[:2] if part.isdecimal())
    if here > NEWEST:
        newest = ".".join(map(str, NEWEST))
        warnings.warn(
            f"transformers {transformers.__version__} is newer than {newest}, the newest that loralab is tested with: "
            "compare adapters.merge() with the adapted model once, or install an older one",
            stacklevel=4,
        )


def base_tensor(model: nn.Module, key: str) -> Tensor:
    """A tensor of an adapted model by the name it had before `attach`."""
    *path, last = key.split(".")
    module = model
    for name in path:
        module = module.get_submodule(name)
        if isinstance(module, AdaptedHead):
            module = module.base
    if isinstance(module, Adapted):
        module = module.base if last == "bias" else module.original[0]
    found = getattr(module, last)
    return found.base.weight if isinstance(found, AdaptedStack) else found


def once(tensors: Tensors) -> dict[str, tuple[str, Tensor]]:
    """The entries of `AdaptedModel.tensors` without repeats: a shared tensor stays under its first layer."""
    first = {id(tensor): key for key, (_, tensor) in reversed(list(tensors.items()))}
    return {key: pair for key, pair in tensors.items() if first[id(pair[1])] == key}
