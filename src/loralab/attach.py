"""`attach` puts an adapter on a model in place; the `Adapters` handle knows every adapter and which one is live."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab import live, ranks, starts
from loralab.bases import keep
from loralab.errors import UserError
from loralab.fingerprint import fingerprint
from loralab.layer import Adapted, AdaptedHead, put_back
from loralab.merge import merge_dtype
from loralab.optimizers import grouped
from loralab.recipe import Recipe, recipe
from loralab.starts.inputs import Seen, look
from loralab.steps import Steps
from loralab.targets import ALL, Coverage, Targets, cover

HANDLE = "_loralab"  # the attribute of a model that holds its handle


@dataclass(frozen=True)
class Entry:
    """What the handle knows of one adapter."""

    recipe: Recipe
    coverage: Coverage | None  # None: no layer is adapted
    heads: tuple[str, ...]  # paths of the modules that are its head
    labels: tuple[str, ...]
    base_names: tuple[str, ...]  # tensors of the base that learn in place (full fine-tuning)

    @property
    def paths(self) -> list[str]:
        return [] if self.coverage is None else self.coverage.paths


def attach(
    model: nn.Module,
    method: str | Recipe = "lora",
    *,
    name: str = "default",
    targets: Targets = ALL,
    head: bool | Sequence[str] = False,
    labels: Sequence[str] = (),
    seed: int = 0,
    batches: Iterable[Mapping[str, Any]] | None = None,
    **settings: Any,
) -> "Adapters":
    """Freezes `model`, puts a fresh adapter on it in place and leaves that adapter live.

    `settings` are the method's own: rank, alpha, dropout, ... (see `loralab methods`). `head=True` trains a copy of
    everything outside the backbone; a list names the modules instead. `seed` decides the adapter's random start;
    `batches`, each what `model(**batch)` takes, are for a start that looks at data (eva).
    Raises UserError for an unknown method, setting or target, before anything has changed.
    """
    if hasattr(model, HANDLE):
        raise UserError(
            f"this model has adapters already ({', '.join(of(model).names)}): use adapters.add(name, method)"
        )
    handle = Adapters(model)
    handle.add(name, method, targets=targets, head=head, labels=labels, seed=seed, batches=batches, **settings)
    setattr(model, HANDLE, handle)
    handle.live.names = (name,)
    return handle


def of(model: nn.Module) -> "Adapters":
    """The handle of an adapted model."""
    if not hasattr(model, HANDLE):
        raise UserError("this model has no adapters: call loralab.attach(model, method) or loralab.load(model, folder)")
    return getattr(model, HANDLE)  # type: ignore[no-any-return]


class Adapters:
    """All adapters of one model. Made by `attach` and `load`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.live = live.Live()
        self.entries: dict[str, Entry] = {}
        self.layers: dict[str, Adapted] = {}
        self.heads: dict[str, AdaptedHead] = {}
        self._learned = {key: p.requires_grad for key, p in model.named_parameters()}
        outside = _head_of(model)
        self._base_keys = [key for key in self._learned if not _under(key, outside)]
        self._base_size = sum(model.get_parameter(key).numel() for key in self._base_keys)
        self._before: dict[str, Tensor] = {}  # bits of base tensors that learn in place, unless all do
        self._sha256: str | None = None
        self.steps = Steps(self)

    @property
    def base_sha256(self) -> str:
        """sha256 of the base's tensors as they were before any training, rounded to bfloat16 (see fingerprint.py)."""
        if self._sha256 is None:
            self._sha256 = fingerprint((key, self.base_tensor(key)) for key in self._base_keys)
        return self._sha256

    def base_tensor(self, key: str) -> Tensor:
        """A tensor of the model by the name it had before `attach`."""
        *path, last = key.split(".")
        module = self.model
        for part in path:
            module = module.get_submodule(part)
            if isinstance(module, AdaptedHead):
                module = module.base
        return getattr(module.original[0] if isinstance(module, Adapted) else module, last)  # type: ignore[no-any-return]

    # ---- adding and removing -------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def add(
        self,
        name: str,
        method: str | Recipe = "lora",
        *,
        targets: Targets = ALL,
        head: bool | Sequence[str] = False,
        labels: Sequence[str] = (),
        seed: int = 0,
        batches: Iterable[Mapping[str, Any]] | None = None,
        filled: bool = False,
        heads_of: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        """Adds a fresh adapter beside the others; `use` makes it live. Arguments as in `attach`.

        `filled=True` leaves out a start that is computed, because a file gives the tensors. The head is a copy of that
        of `heads_of`, a plain model of this kind, by default of the one that this model had.
        """
        r = recipe(method, **settings)
        if r.plan and r.ranks is None:
            raise UserError(
                f"plan={r.plan!r} makes a rank map from data or weights, and there is none: give ranks=, or use "
                "`loralab train`, which makes it (docs/rank-maps.md)"
            )
        self._check_name(name, r)
        own_head = _head_of(self.model)
        if head is True and not own_head:
            raise UserError(
                f"head=True: {type(self.model).__name__} names no head; pass the paths of its modules, head=[...]"
            )
        heads = tuple(own_head) if head is True else tuple(head or ())
        outside = [*heads, *own_head]
        coverage = None if r.factors is None else self._cover(r, targets, outside)
        if r.store:
            keep(nn.Linear(8, 8), r.store)  # a trial: a missing package is told before anything has changed
        if not heads and coverage is None and r.learn_base is None:
            raise UserError(f"method {method!r} learns nothing but the head: pass head=True")
        entry = Entry(r, coverage, heads, tuple(labels) or _labels(self.model), self._in_place(r, heads))
        seen = None if filled else look(self, r, entry.paths, batches)
        if r.store or entry.base_names:
            _ = self.base_sha256  # taken while the base still has its own bits
        if not self.entries:
            self.model.requires_grad_(False)
        generator = Generator().manual_seed(seed)
        self._add_layers(entry, name, generator, seen)
        self._add_heads(entry, name, generator, heads_of)
        for key in entry.base_names:
            tensor = self.base_tensor(key).requires_grad_(True)
            if r.learn_base != "all":
                self._before[key] = tensor.detach().clone()
        self.entries[name] = entry
        if r.factors is not None and r.factors.stepped:
            self.steps.add(name, seed)

    def _in_place(self, r: Recipe, heads: Sequence[str]) -> tuple[str, ...]:
        """Names of the base tensors that a recipe trains in place."""
        if r.learn_base is None:
            return ()
        keys = [key for key in self._learned if not _under(key, heads)]
        return tuple(keys if r.learn_base == "all" else [key for key in keys if key.rpartition(".")[2] == r.learn_base])

    def _give_base_back(self, entry: Entry) -> None:
        for key in entry.base_names:
            if key not in self._before:
                raise UserError("this adapter trained the whole base in place: load the model anew instead")
            with torch.no_grad():
                self.base_tensor(key).requires_grad_(False).copy_(self._before.pop(key))

    def _check_name(self, name: str, r: Recipe) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
            raise UserError(f"adapter name {name!r}: expected letters, digits, - and _, and no word torch uses itself")
        if name in self.entries:
            raise UserError(
                f"adapter {name!r} is there already ({', '.join(self.names)}): remove it or choose a new name"
            )
        if taken := [n for n, entry in self.entries.items() if entry.base_names]:
            raise UserError(f"adapter {taken[0]!r} trains the base itself, so no other adapter can share that base")
        if r.learn_base and self.entries:
            raise UserError(f"train={r.train} changes the base that {', '.join(self.names)} rely on: use a fresh model")

    def _cover(self, r: Recipe, targets: Targets, outside: Sequence[str]) -> Coverage:
        assert r.factors is not None
        coverage = cover(self.model, targets, outside)
        shapes = {path: _shape(self.model.get_submodule(path)) for path in coverage.paths}
        if r.ranks is not None:
            if wrong := ranks.misfits(r.ranks, shapes, coverage.left):
                raise UserError("rank map: " + "; ".join(wrong))
            coverage = coverage.keep(r.ranks.adapted)
            shapes = {path: shapes[path] for path in coverage.paths}
        own = {path: ranks.own(r.factors, r.ranks, path) for path in shapes}
        misfits = {path: problem for path, shape in shapes.items() if (problem := own[path].misfit(*shape))}
        if misfits:
            path, problem = next(iter(misfits.items()))
            raise UserError(f"{problem} ({path}; {len(misfits)} of {len(shapes)} layers cannot take it)")
        stores = {path: layer.store for path, layer in self.layers.items() if path in shapes}
        if clash := [path for path, store in stores.items() if store != r.store]:
            kept = stores[clash[0]] or "as loaded"
            raise UserError(f"store={r.store!r}: {clash[0]} is kept {kept} for {', '.join(self.names)} already")
        return coverage

    def _add_layers(self, entry: Entry, name: str, generator: Generator, seen: Mapping[str, Seen] | None) -> None:
        """Wraps what is not wrapped yet and gives each layer its tensors; `seen=None` leaves out a computed start."""
        factors, start = entry.recipe.factors, entry.recipe.start
        if factors is None:
            return
        constants = factors.constants([_shape(self.model.get_submodule(path)) for path in entry.paths])
        mapped = ranks.Starts(entry.recipe.ranks)
        for path in entry.paths:
            W = None  # its own weight, once it is stored in fewer bits gone
            if path not in self.layers:
                original = self.model.get_submodule(path)
                W = keep(original).dense()
                put_back(self.model)  # a fast piece made before this would not know of the layer
                adapted = Adapted(original, entry.recipe.store, self.live)
                self.layers[path] = adapted.train(original.training)
                self.model.set_submodule(path, adapted)
            layer = self.layers[path]
            at = entry.recipe.at(path)
            tensors = starts.blank(start, at.factors, layer.out_features, layer.in_features, generator)
            if seen is not None:
                tensors |= starts.begin(start, at.factors, W, layer.base, generator, seen.get(path))
            on = mapped.of(path, {role: t.to(layer.device) for role, t in tensors.items()})
            layer.add(name, at, on, {role: t.to(layer.device) for role, t in constants.items()})

    def _add_heads(self, entry: Entry, name: str, generator: Generator, heads_of: nn.Module | None) -> None:
        for path in entry.heads:
            if path not in self.heads:
                original = self.model.get_submodule(path)
                self.heads[path] = AdaptedHead(original, self.live).train(original.training)
                self.model.set_submodule(path, self.heads[path])
            if heads_of is not None:
                self.heads[path].copies[name] = copy.deepcopy(heads_of.get_submodule(path)).requires_grad_(True)
                continue
            own = copy.deepcopy(self.heads[path].base)
            if entry.labels and len(entry.labels) != len(_labels(self.model)):
                _resize(own, len(_labels(self.model)), len(entry.labels), generator)
            self.heads[path].copies[name] = own.requires_grad_(True)

    def remove(self, name: str) -> None:
        """Takes an adapter off the model; its layers stay wrapped until `detach`."""
        entry = self.entry(name)
        if name in self.live.names:
            raise UserError(f"adapter {name!r} is live: leave its `use` block first, or call detach()")
        self._give_base_back(entry)
        self.steps.remove(name)
        for path in entry.paths:
            self.layers[path].remove(name)
        for path in entry.heads:
            del self.heads[path].copies[name]
        del self.entries[name]

    def entry(self, name: str | None) -> Entry:
        """What is known of an adapter; None means the one that is live."""
        return self.entries[self.only(name)]

    def only(self, name: str | None) -> str:
        """The name itself if there is such an adapter; None means the one that is live."""
        if name is None:
            if len(self.live.names) != 1:
                raise UserError(
                    f"name an adapter: live are {self.live.names or 'none'}, there are {', '.join(self.names)}"
                )
            return self.live.names[0]
        if name not in self.entries:
            raise UserError(f"no adapter {name!r} here: there are {', '.join(self.names) or 'none'}")
        return name

    # ---- what is live --------------------------------------------------------------------------------------------

    def use(
        self, names: str | Sequence[str] | None, ids: Tensor | Sequence[int] | None = None, rank: int | None = None
    ) -> AbstractContextManager["Adapters"]:
        """Makes an adapter live for a while: one name, None for the base, or names with `ids` (rows,) into them.

        `rank` evaluates an adapter that was trained for many ranks (DyLoRA) at one of them.
        """
        return live.use(self, names, ids, rank)

    # ---- what an adapter holds -----------------------------------------------------------------------------------

    def tensors(self, name: str | None = None) -> dict[str, tuple[str, Tensor]]:
        """path.role -> (role, live tensor) of everything that belongs to an adapter, its head and base tensors too."""
        name, entry = self.only(name), self.entry(name)
        out = {f"{p}.{role}": (role, t) for p in entry.paths for role, t in self.layers[p].roles(name).items()}
        out |= {key: (key.rpartition(".")[2], self.base_tensor(key)) for key in entry.base_names}
        for path in entry.heads:
            out |= {f"{path}.{key}": ("head", t) for key, t in self.heads[path].copies[name].named_parameters()}
        return out

    def state(self, name: str | None = None) -> dict[str, Tensor]:
        """{"encoder.layer.0.attention.self.query.A": tensor, ...}: path.role, the live tensors."""
        return {key: tensor for key, (_, tensor) in self.tensors(name).items()}

    def counts(self, name: str | None = None) -> dict[str, int]:
        """Numbers of values: that learn in the adapter, in its head, both together, and in the whole base."""
        held = self.tensors(name).values()
        head = sum(t.numel() for role, t in held if role == "head" and t.requires_grad)
        adapter = sum(t.numel() for t in {id(t): t for role, t in held if role != "head" and t.requires_grad}.values())
        return {"adapter": adapter, "head": head, "trainable": adapter + head, "base": self._base_size}

    def parameter_groups(
        self,
        lr: float | None = None,
        weight_decay: float = 0.0,
        head_lr: float | None = None,
        name: str | None = None,
        grouping: str = "roles",
    ) -> list[dict[str, Any]]:
        """Optimizer groups by role: B at lr * lr_ratio (LoRA+), the head at its own rate, no decay on vectors.

        `grouping="peft"` is that of PEFT's LoRA+: all vectors, a head's bias too, at lr * lr_ratio, and only biases
        without decay.
        """
        r = self.entry(name).recipe
        learned = {key: pair for key, pair in once(self.tensors(name)).items() if pair[1].requires_grad}
        return grouped(learned, grouping, r.lr if lr is None else lr, r.lr_ratio, head_lr, weight_decay)

    # ---- leaving -------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str, name: str | None = None, called: str | None = None) -> Path:
        """Writes adapter.safetensors and adapter.json, under another name if `called` gives it; see `loralab.load`."""
        from loralab.files import save

        return save(self, folder, name, called)

    def export(self, folder: Path | str, name: str | None = None, layout: str = "peft") -> Path:
        """Writes the adapter for other tools; the one layout is "peft", which vLLM and others read too."""
        from loralab import peft_layout

        if layout != "peft":
            raise UserError(f"layout {layout!r} is unknown: the one there is is 'peft'")
        return peft_layout.write(self, folder, name)

    def merge(self, name: str | None = None, dtype: torch.dtype | str | None = None) -> nn.Module:
        """A plain model with new tensors that acts like the adapted one; this model is left as it is.

        The update is added in float32 and the sum kept in the dtype the layer was loaded in, or the whole model in
        `dtype`: float32, bfloat16 or float16. A quantized base is dequantized first; a merge into fewer bits is
        refused, as it rounds the update away (`loralab.merge.merge_errors` measures it).
        """
        name, kept = self.only(name), None if dtype is None else merge_dtype(dtype)
        plain: nn.Module = copy.deepcopy(self.model)
        of(plain).unwrap(name, kept)
        return plain if kept is None else plain.to(kept)

    def detach(self) -> None:
        """Gives the model its original module tree and bits back; the adapters are gone.

        What was stored in fewer bits stays rounded: it comes back dequantized, in the dtype it was loaded in.
        """
        for entry in self.entries.values():
            self._give_base_back(entry)
        self.unwrap()

    def unwrap(self, name: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Puts plain layers back: with the update of `name` merged in, or None for the base alone."""
        self.steps.disconnect()
        put_back(self.model)
        for path, layer in self.layers.items():
            self.model.set_submodule(path, layer.plain(name, dtype))
        for path, head in self.heads.items():
            self.model.set_submodule(path, head.base if name is None else head.copy_of(name))
        for key, tensor in self.model.named_parameters():
            tensor.requires_grad_(self._learned[key])
        self.model.__dict__.pop(HANDLE, None)


def once(tensors: Mapping[str, tuple[str, Tensor]]) -> dict[str, tuple[str, Tensor]]:
    """The entries of `Adapters.tensors` without what layers share: it stays under the first layer that has it."""
    first = {id(tensor): key for key, (_, tensor) in reversed(list(tensors.items()))}
    return {key: pair for key, pair in tensors.items() if first[id(pair[1])] == key}


def _head_of(model: nn.Module) -> list[str]:
    """Paths of the modules outside a transformers model's backbone that have parameters of their own."""
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if backbone is None or backbone is model:
        return []
    shared = {id(p) for p in backbone.parameters()}
    rest = [(name, list(child.parameters())) for name, child in model.named_children() if child is not backbone]
    return [name for name, own in rest if own and not any(id(p) in shared for p in own)]


def _under(key: str, paths: Sequence[str]) -> bool:
    return any(key == path or key.startswith(path + ".") for path in paths)


def _shape(layer: Any) -> tuple[int, int]:
    """(out, in) of an nn.Linear, a Conv1D or an adapted layer."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def _resize(head: nn.Module, old: int, new: int, generator: Generator) -> None:
    """Gives the output layer of a head another number of outputs, freshly drawn (normal, 0.02; bias zero)."""
    outputs = [m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == old]
    if outputs:
        layer = outputs[-1]
        weight = torch.empty(new, layer.in_features).normal_(0, 0.02, generator=generator)
        layer.weight = nn.Parameter(weight.to(layer.weight))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(new).to(layer.weight))
        layer.out_features = new


def _labels(model: nn.Module) -> tuple[str, ...]:
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(names[i]) for i in sorted(names))
