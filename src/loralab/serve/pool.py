"""Adapters over one base: which folders rows may name, and which of them are loaded.

A folder is known by its header alone; its tensors are read when a row needs them and dropped, the least recently used
first, beyond a budget. What counts is what an adapter has and what it is lowered to; loading one exceeds the budget for
a moment. A base is one model. Adapters that keep the base in few bits, or train it in place, need another base than the
rest, so each such kind has a model of its own: a row never runs over layers that its adapter was not trained on.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab import fast, files, model_names, peft_format
from loralab.adapted import HANDLE
from loralab.adapters import Adapters, of, put, read
from loralab.data import glue
from loralab.disk import read_header
from loralab.errors import UserError
from loralab.files import AdapterFile
from loralab.objectives import saved
from loralab.run.memory import tensor_bytes

# ---- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFolder:
    """One folder that rows may name."""

    folder: Path
    name: str
    text: tuple[str, ...]  # columns it was trained on; empty where the folder does not say
    base: str | None  # name of the base, as the run was given it or as the folder has it
    sha256: str | None  # of that base
    objective: str = "classification"
    written: Mapping[str, str] = field(default_factory=dict)  # separator and encoding of the file it learned from
    max_length: int | None = None  # tokens after which its rows were cut
    writes: bool = False  # whether its answers are texts

    @property
    def wanted(self) -> str:
        """Which base it wants, and how to get it."""
        return model_names.wanted(self.base, self.sha256)

    def other_base(self, sha256: str) -> str | None:
        """Say that it was trained on another base than the one of this sha256; None where it was not."""
        if self.sha256 in (None, sha256):
            return None
        return f"was trained on another base (the sha256 of this one begins {sha256[:12]}); {self.wanted}"


def adapter_folders(entries: Sequence[str]) -> dict[str, AdapterFolder]:
    """Return what a row may say -> folder. An entry is a folder, or NAME=FOLDER.

    A folder answers to its own name if no other has it, and always to its path as given. Raises one UserError with all
    problems.
    """
    found: list[tuple[str, AdapterFolder]] = []
    problems = []
    for entry in entries:
        name, named, path = entry.rpartition("=")
        try:
            found.append((path if not named else name, _adapter_folder(Path(path), name)))
        except UserError as error:
            problems.append(str(error))
    if twice := [name for name, times in Counter(key for key, _ in found).items() if times > 1]:
        problems.append(f"{', '.join(twice)} given twice")
    if problems:
        raise UserError("; ".join(problems))
    times = Counter(adapter.name for _, adapter in found)
    return {a.name: a for _, a in found if times[a.name] == 1} | dict(found)


def _adapter_folder(folder: Path, name: str) -> AdapterFolder:
    if (place := peft_format.places(folder)[1]).is_file():
        base = _string(read_header(place).get("base_model_name_or_path"))
        known = saved.read(folder, _string(read_header(place).get("task_type")))
        name = name or folder.resolve().name
        base = base and model_names.here(base)
        return AdapterFolder(
            folder, name, (), base, None, known.objective, known.written, known.max_length, known.writes
        )
    header = read_header(place := files.places(folder)[1])
    base_entry = header.get("base")
    if not isinstance(base_entry, dict):
        raise UserError(f"{place}: not an adapter header, it names no base")
    own_name, settings = str(header.get("name")), _settings(folder)
    known = saved.read(folder, _string(base_entry.get("task_type")))
    base = _string(settings.get("model")) or known.base or _string(base_entry.get("name"))
    text = tuple(known.columns) or _text(own_name, settings)
    digest = _string(base_entry.get("sha256"))
    rest = (known.objective, known.written, known.max_length, known.writes)
    return AdapterFolder(folder, name or own_name, text, base, digest, *rest)


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _settings(folder: Path) -> Mapping[str, Any]:
    """Return the settings of the run that wrote the adapter, if the folder still lies in the run's."""
    try:
        settings = json.loads((folder.resolve().parent / "run.json").read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _text(name: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    columns = settings.get("text")
    if isinstance(columns, list) and columns:
        return tuple(map(str, columns))
    task = glue.canonical(str(settings.get("task", name)))
    return glue.TABLE[task].columns if task else ()


# ---- the pool --------------------------------------------------------------------------------------------------------

Kind = Hashable  # what adapters must have in common to share a model


@dataclass
class LoadedAdapter:
    """An adapter that is on a model."""

    slot: str  # its name there
    kind: Kind
    size: int  # bytes
    labels: tuple[str, ...]


@dataclass
class Pool:
    """The loaded adapters and the models they are on."""

    new_base: Callable[[], nn.Module]
    """Makes the plain base."""
    budget: int | None = None
    """Bytes that adapters may take, with what they are lowered to; None sets no limit."""
    fast: bool = True
    """Whether layers run on the fast path where there is one."""
    heads: bool = True
    """Whether adapters must bring a head; without, the base's own answers."""
    models: dict[Kind, nn.Module] = field(default_factory=dict)
    loaded: "OrderedDict[Path, LoadedAdapter]" = field(default_factory=OrderedDict)  # the least recently used first
    count: int = 0  # adapters ever loaded

    @property
    def used(self) -> int:
        """Bytes that the loaded adapters take."""
        return sum(adapter.size for adapter in self.loaded.values())

    @cached_property
    def base_sha256(self) -> str:
        """Hash of the plain base."""
        return Adapters(self.plain).base_sha256

    @property
    def plain(self) -> nn.Module:
        """The model whose base is as it was loaded; outside of `use` it answers without an adapter."""
        return self._model(None)

    @property
    def any_model(self) -> nn.Module:
        """One of the models, made if there is none yet."""
        return next(iter(self.models.values()), None) or self.plain

    def handle(self, kind: Kind) -> Adapters:
        """Return the adapters of the model of a kind."""
        return of(self.models[kind])

    def admit(self, folder: Path, beside: Iterable[Path] = ()) -> LoadedAdapter | None:
        """Return the adapter of a folder, loaded if need be; None if it does not fit while those `beside` it stay.

        Raises UserError for a folder that cannot be used over this base, and for one larger than the whole budget.
        """
        if folder not in self.loaded:
            self.loaded[folder] = self._load(read(folder), folder)
        self.loaded.move_to_end(folder)
        adapter, stay = self.loaded[folder], {folder, *beside}
        for other in [other for other in self.loaded if other not in stay]:
            if self.budget is None or self.used <= self.budget:
                break
            self.drop(other)
        if self.budget is None or self.used <= self.budget:
            return adapter
        self.drop(folder)
        if adapter.size > self.budget:
            raise UserError(f"{folder} takes {adapter.size:,} bytes, more than the budget of {self.budget:,}")
        return None

    def admit_all(
        self, wanted: Sequence[Path], rank: int | None = None
    ) -> tuple[dict[Path, LoadedAdapter], list[Path], dict[Path, UserError]]:
        """Return the wanted adapters that are loaded together, those that have to wait, and those that fail.

        One without the `rank` to evaluate at, where one is given, fails.
        """
        admitted: dict[Path, LoadedAdapter] = {}
        failed: dict[Path, UserError] = {}
        for place, folder in enumerate(wanted):
            try:
                adapter = self.admit(folder, admitted)
                if adapter is None:
                    return admitted, list(wanted[place:]), failed
                with self.handle(adapter.kind).use(adapter.slot, rank=rank):  # raises for a rank it lacks
                    admitted[folder] = adapter
            except UserError as error:
                failed[folder] = error
        return admitted, [], failed

    def drop(self, folder: Path) -> None:
        """Remove an adapter from its model; a model that only it could use goes with it."""
        dropped = self.loaded.pop(folder)
        if dropped.kind is None or any(other.kind == dropped.kind for other in self.loaded.values()):
            self.handle(dropped.kind).remove(dropped.slot)
        else:
            del self.models[dropped.kind]

    def _model(self, kind: Kind) -> nn.Module:
        if kind not in self.models:
            self.models[kind] = self.new_base().eval()
        return self.models[kind]

    def _load(self, file: AdapterFile, folder: Path) -> LoadedAdapter:
        if self.heads and not file.heads:
            raise UserError(f"{folder} has no head, so its answers would be those of a random one")
        kind, slot, self.count = _kind(file, folder), f"a{self.count}", self.count + 1
        model = self._model(kind)
        existing: Adapters | None = getattr(model, HANDLE, None)
        layers_before = 0 if existing is None else len(existing.layers)
        handle = put(model, file, folder, slot)
        if file.recipe.learn_base is None:  # one that trains the base in place stays active on its own model
            handle.activate(None)
        model.eval()
        if self.fast and (existing is None or len(handle.layers) > layers_before):  # new layers join the fast path
            fast.prepare(model)
        return LoadedAdapter(slot, kind, size_of(handle, slot), handle.specs[slot].labels)


def _kind(file: AdapterFile, folder: Path) -> Kind:
    """Return what tells bases apart: only adapters over the very same base share a model."""
    if file.recipe.learn_base is not None:
        return ("in place", folder)
    return (file.recipe.store, tuple(sorted(file.paths))) if file.recipe.store else None


@torch.no_grad()
def size_of(handle: Adapters, name: str) -> int:
    """Return the bytes of an adapter: its tensors, and what they are lowered to, which stays once it is used."""
    tensors = [tensor for _, tensor in handle.tensors(name).values()]
    tensors += [t for p in handle.specs[name].paths for t in handle.layers[p].lower(name) if t is not None]
    return tensor_bytes(tensors)
