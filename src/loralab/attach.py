"""`attach` puts an adapter on a model in place; the `Adapters` handle knows every adapter and which one is live."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from loralab import adding, live
from loralab.entry import Entry, base_tensor, counts_of, once, tensors_of
from loralab.errors import UserError
from loralab.fingerprint import fingerprint
from loralab.heads import head_of, under
from loralab.layer import Adapted, AdaptedHead, put_back
from loralab.merge import merge_dtype
from loralab.optimizers import grouped
from loralab.recipe import Recipe
from loralab.starts.inputs import look
from loralab.steps import Steps
from loralab.targets import ALL, Targets

HANDLE = "_loralab"  # the attribute of a model that holds its handle


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
        self.learned = {key: p.requires_grad for key, p in model.named_parameters()}
        outside = head_of(model)
        self._base_keys = [key for key in self.learned if not under(key, outside)]
        self._base_size = sum(model.get_parameter(key).numel() for key in self._base_keys)
        self.before: dict[str, Tensor] = {}  # bits of base tensors that learn in place, unless all do
        self._sha256: str | None = None
        self.steps = Steps(self)

    @property
    def base_sha256(self) -> str:
        """sha256 of the base's tensors as they were before any training, rounded to bfloat16 (see fingerprint.py)."""
        if self._sha256 is None:
            self._sha256 = fingerprint((key, base_tensor(self.model, key)) for key in self._base_keys)
        return self._sha256

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
        entry = adding.entry_of(self, name, method, settings, targets, head, labels)
        r = entry.recipe
        seen = None if filled else look(self, r, entry.paths, batches)
        if r.store or entry.base_names:
            _ = self.base_sha256  # taken while the base still has its own bits
        if not self.entries:
            self.model.requires_grad_(False)
        generator = Generator().manual_seed(seed)
        adding.add_layers(self, entry, name, generator, seen)
        adding.add_heads(self, entry, name, generator, heads_of)
        adding.open_base(self, entry)
        self.entries[name] = entry
        if r.factors is not None and r.factors.stepped:
            self.steps.add(name, seed)

    def remove(self, name: str) -> None:
        """Takes an adapter off the model; its layers stay wrapped until `detach`."""
        entry = self.entry(name)
        if name in self.live.names:
            raise UserError(f"adapter {name!r} is live: leave its `use` block first, or call detach()")
        adding.give_base_back(self, entry)
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
        return tensors_of(self, self.only(name))

    def state(self, name: str | None = None) -> dict[str, Tensor]:
        """{"encoder.layer.0.attention.self.query.A": tensor, ...}: path.role, the live tensors."""
        return {key: tensor for key, (_, tensor) in self.tensors(name).items()}

    def counts(self, name: str | None = None) -> dict[str, int]:
        """Numbers of values: that learn in the adapter, in its head, both together, and in the whole base."""
        return {**counts_of(self.tensors(name)), "base": self._base_size}

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
            adding.give_base_back(self, entry)
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
            tensor.requires_grad_(self.learned[key])
        self.model.__dict__.pop(HANDLE, None)
