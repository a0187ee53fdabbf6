"""Adapters over one base, loaded when a row needs them and dropped, the least recently used first, beyond a budget.

What is counted is what an adapter holds and what it is lowered to; loading one goes over the budget for a moment.
A base is one model. Adapters that keep it in few bits, or train it in place, see another base than the rest, so each
such kind has a model of its own: a row never runs over layers that its adapter was not trained on.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from loralab import fast
from loralab.adapted import HANDLE
from loralab.adapters import Adapters, of, put, read
from loralab.errors import UserError
from loralab.files import AdapterFile
from loralab.run.memory import tensor_bytes

Kind = Hashable


@dataclass
class Loaded:
    """An adapter that is on a model."""

    slot: str  # its name there
    kind: Kind
    size: int  # bytes
    labels: tuple[str, ...]


@dataclass
class Pool:
    fresh: Callable[[], nn.Module]
    """Makes the plain base, in eval mode."""
    budget: int | None = None
    """Bytes that adapters may take, with what they are lowered to; None sets no limit."""
    fast: bool = True
    """Whether layers run on the fast path where there is one."""
    models: dict[Kind, nn.Module] = field(default_factory=dict)
    loaded: "OrderedDict[Path, Loaded]" = field(default_factory=OrderedDict)  # the least recently used first
    count: int = 0  # adapters ever loaded

    @property
    def used(self) -> int:
        """Bytes."""
        return sum(adapter.size for adapter in self.loaded.values())

    @cached_property
    def base_sha256(self) -> str:
        return Adapters(self._model(None)).base_sha256

    @property
    def any_model(self) -> nn.Module:
        return next(iter(self.models.values()), None) or self._model(None)

    def handle(self, kind: Kind) -> Adapters:
        return of(self.models[kind])

    def admit(self, folder: Path, beside: Iterable[Path] = ()) -> Loaded | None:
        """The adapter of a folder, loaded now if it is not; None if it does not fit while those `beside` it stay.

        Raises UserError for a folder that cannot be used over this base, and for one larger than the whole budget.
        """
        if folder not in self.loaded:
            self.loaded[folder] = self._put(read(folder), folder)
        self.loaded.move_to_end(folder)
        found, stay = self.loaded[folder], {folder, *beside}
        for other in [other for other in self.loaded if other not in stay]:
            if self.budget is None or self.used <= self.budget:
                break
            self.drop(other)
        if self.budget is None or self.used <= self.budget:
            return found
        self.drop(folder)
        if found.size > self.budget:
            raise UserError(f"{folder} takes {found.size:,} bytes, more than the budget of {self.budget:,}")
        return None

    def drop(self, folder: Path) -> None:
        """Takes an adapter off its model; a model that only it could use goes with it."""
        gone = self.loaded.pop(folder)
        if gone.kind is None or any(other.kind == gone.kind for other in self.loaded.values()):
            self.handle(gone.kind).remove(gone.slot)
        else:
            del self.models[gone.kind]

    def _model(self, kind: Kind) -> nn.Module:
        if kind not in self.models:
            self.models[kind] = self.fresh().eval()
        return self.models[kind]

    def _put(self, file: AdapterFile, folder: Path) -> Loaded:
        if not file.heads:
            raise UserError(f"{folder} has no head, so its answers would be those of a random one")
        kind, slot, self.count = _kind(file, folder), f"a{self.count}", self.count + 1
        model = self._model(kind)
        known: Adapters | None = getattr(model, HANDLE, None)
        before = 0 if known is None else len(known.layers)
        handle = put(model, file, folder, slot)
        handle.active.names = ()
        model.eval()
        if self.fast and (known is None or len(handle.layers) > before):  # a block knows the layers it was made of
            fast.prepare(model)
        return Loaded(slot, kind, size_of(handle, slot), handle.specs[slot].labels)


def _kind(file: AdapterFile, folder: Path) -> Kind:
    """What adapters must have in common to share a model: the very same base beneath them."""
    if file.recipe.learn_base is not None:
        return ("in place", folder)
    return (file.recipe.store, tuple(sorted(file.paths))) if file.recipe.store else None


@torch.no_grad()
def size_of(handle: Adapters, name: str) -> int:
    """Bytes of an adapter: its tensors, and what they are lowered to, which is kept once it is used."""
    held = [tensor for _, tensor in handle.tensors(name).values()]
    held += [t for p in handle.specs[name].paths for t in handle.layers[p].lower(name) if t is not None]
    return tensor_bytes(held)
