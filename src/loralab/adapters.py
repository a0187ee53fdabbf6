"""`attach` and `load` put adapters on a model in place; the `Adapters` handle adds, uses, saves and merges them."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from loralab import files, install, peft_format
from loralab.adapted import HANDLE, AdaptedModel, once
from loralab.errors import UserError
from loralab.files import AdapterFile, fingerprint
from loralab.hooks import StepHooks
from loralab.inputs import look
from loralab.layer import put_back
from loralab.methods import starts
from loralab.optimizers import grouped
from loralab.recipe import Recipe
from loralab.targets import ALL, Targets, cover

MERGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """Freeze `model`, put a fresh adapter on it in place and leave that adapter active.

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
    handle.active.names = (name,)
    return handle


def load(model: nn.Module, folder: Path | str, name: str | None = None, check_base: bool = True) -> "Adapters":
    """Put the adapter of `folder`, loralab's or PEFT's, on `model` beside those already there, and leave it active.

    Raises UserError, with the model as it was, for a file with missing, extra or misshapen tensors, for layers the
    model does not have, and for a base other than the one it was trained on (unless `check_base=False`).
    """
    return put(model, read(folder), folder, name, check_base)


def of(model: nn.Module) -> "Adapters":
    """The handle of an adapted model. Raises UserError for a model without adapters."""
    if not hasattr(model, HANDLE):
        raise UserError("this model has no adapters: call loralab.attach(model, method) or loralab.load(model, folder)")
    return getattr(model, HANDLE)  # type: ignore[no-any-return]


class Adapters(AdaptedModel):
    """All adapters of one model. Made by `attach` and `load`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.steps = StepHooks(self)

    # ---- adding and removing -------------------------------------------------------------------------------------

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
        """Add a fresh adapter beside the others; `use` activates it. Arguments as in `attach`.

        `filled=True` leaves out a start that is computed, because a file gives the tensors. The head is a copy of that
        of `heads_of`, a plain model of this kind, by default of the one that this model had.
        """
        spec = install.spec_of(self, name, method, settings, targets, head, labels)
        r = spec.recipe
        directions = None if filled else look(self, r, spec.paths, batches)
        if r.store or spec.base_names:
            _ = self.base_sha256  # taken while the base still has its own bits
        if not self.specs:
            self.model.requires_grad_(False)
        generator = Generator().manual_seed(seed)
        install.add_layers(self, spec, name, generator, directions)
        install.add_heads(self, spec, name, generator, heads_of)
        install.open_base(self, spec)
        self.specs[name] = spec
        if r.factors is not None and r.factors.stepped:
            self.steps.add(name, seed)

    def remove(self, name: str) -> None:
        """Take an adapter off the model; its layers stay wrapped until `detach`. Raises UserError if it is active."""
        spec = self.spec(name)
        if name in self.active.names:
            raise UserError(f"adapter {name!r} is active: leave its `use` block first, or call detach()")
        install.give_base_back(self, spec)
        self.steps.remove(name)
        for path in spec.paths:
            self.layers[path].remove(name)
        for path in spec.heads:
            del self.heads[path].copies[name]
        del self.specs[name]

    # ---- training ------------------------------------------------------------------------------------------------

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
        r = self.spec(name).recipe
        learned = {key: pair for key, pair in once(self.tensors(name)).items() if pair[1].requires_grad}
        return grouped(learned, grouping, r.lr if lr is None else lr, r.lr_ratio, head_lr, weight_decay)

    # ---- leaving -------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str, name: str | None = None, saved_as: str | None = None) -> Path:
        """Write adapter.safetensors and adapter.json, under another name if `saved_as` gives it; see `load`.

        Raises UserError if the folder cannot be written.
        """
        name = self.only(name)
        spec, tensors = self.specs[name], once(self.tensors(name))
        file = AdapterFile(
            name=saved_as or name,
            recipe=spec.recipe,
            coverage={} if spec.coverage is None else spec.coverage.matched,
            heads=list(spec.heads),
            labels=list(spec.labels),
            base={**_base_name(self.model), "sha256": self.base_sha256},
            tensors={key: t for key, (_, t) in tensors.items()},
            roles={key: role for key, (role, _) in tensors.items()},
            counts=self.counts(name),
            constants=_constants_sha256(self, name),
        )
        return files.write(file, folder)

    def export(self, folder: Path | str, name: str | None = None, layout: str = "peft") -> Path:
        """Write the adapter for other tools; the one layout is "peft", which vLLM and others read too.

        Raises UserError for another layout, and for an adapter that is no low-rank product.
        """
        if layout != "peft":
            raise UserError(f"layout {layout!r} is unknown: the one there is is 'peft'")
        name = self.only(name)
        spec = self.specs[name]
        if spec.coverage is None:
            raise UserError(f"adapter {name!r} adapts no layer, so there is no LoRA to export; merge it instead")
        if not spec.recipe.low_rank:
            raise UserError(f"adapter {name!r} is no low-rank product, so there is no LoRA to export; merge it instead")
        updates = {path: self.layers[path].lower(name) for path in spec.paths}
        gains = {path: self.layers[path].roles(name)["m"] for path in spec.paths if spec.recipe.gain}
        head = {key: t for key, (role, t) in self.tensors(name).items() if role == "head"}
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        return peft_format.write(folder, updates, gains, head, spec.heads, base)

    def merge(self, name: str | None = None, dtype: torch.dtype | str | None = None) -> nn.Module:
        """A plain model with new tensors that acts like the adapted one; this model is left as it is.

        The update is added in float32 and the sum kept in the dtype the layer was loaded in, or the whole model in
        `dtype`: float32, bfloat16 or float16. A quantized base is dequantized first; a merge into fewer bits is
        refused, as it rounds the update away (`loralab.analysis.merge_errors` measures it).
        """
        name, wanted = self.only(name), None if dtype is None else merge_dtype(dtype)
        plain: nn.Module = copy.deepcopy(self.model)
        of(plain).unwrap(name, wanted)
        return plain if wanted is None else plain.to(wanted)

    def detach(self) -> None:
        """Give the model its original module tree and bits back; the adapters are gone.

        What was stored in fewer bits stays rounded: it comes back dequantized, in the dtype it was loaded in.
        """
        for spec in self.specs.values():
            install.give_base_back(self, spec)
        self.unwrap()

    def unwrap(self, name: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Put plain layers back: with the update of `name` merged in, or None for the base alone."""
        self.steps.disconnect()
        put_back(self.model)
        for path, layer in self.layers.items():
            self.model.set_submodule(path, layer.plain(name, dtype))
        for path, head in self.heads.items():
            self.model.set_submodule(path, head.base if name is None else head.copy_of(name))
        for key, tensor in self.model.named_parameters():
            tensor.requires_grad_(self.learned[key])
        self.model.__dict__.pop(HANDLE, None)


def merge_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of a name or dtype; raises UserError for what an update cannot be merged into."""
    found = MERGE_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in MERGE_DTYPES.values():
        raise UserError(
            f"merge into {dtype}: choose one of {', '.join(MERGE_DTYPES)}; fewer bits would round most of the update "
            "away, so keep the adapter beside a quantized base, or quantize the merged model anew and measure it"
        )
    return found


# ---- loading ---------------------------------------------------------------------------------------------------------


def read(folder: Path | str) -> AdapterFile:
    """Read an adapter folder, in loralab's layout or PEFT's. Raises UserError for anything else."""
    folder = Path(folder)
    return peft_format.read(folder) if (folder / peft_format.HEADER).is_file() else files.read(folder)


def put(model: nn.Module, file: AdapterFile, folder: Path | str, name: str | None, check_base: bool = True) -> Adapters:
    """Load a parsed adapter file; `folder` only labels errors. Raises UserError as `load` does."""
    name = name or file.name
    known = getattr(model, HANDLE, None)
    handle = Adapters(model) if known is None else of(model)
    problems = _misfits(handle, file)
    if check_base and file.base.get("sha256") not in (None, handle.base_sha256):
        problems.append(
            f"it was trained on another base ({file.base.get('name')}, sha256 {str(file.base['sha256'])[:12]}, "
            f"here {handle.base_sha256[:12]}); load that base, or pass check_base=False if you know better"
        )
    if problems:
        raise UserError(f"{folder}: " + "; ".join(problems))
    handle.add(name, file.recipe, targets=file.paths, head=file.heads, labels=file.labels, filled=not file.starts_anew)
    computed = starts.added(file.recipe.start) if file.starts_anew else ()
    state = {key: tensor for key, (role, tensor) in once(handle.tensors(name)).items() if role not in computed}
    problems = _fill(state, file.tensors)
    if file.constants not in (None, _constants_sha256(handle, name)):
        problems.append(f"what its seed draws here is not what it was trained with (sha256 {file.constants[:12]})")
    if problems:
        if known is None:
            handle.unwrap()
        else:
            handle.remove(name)
        raise UserError(f"{folder}: " + "; ".join(problems))
    setattr(model, HANDLE, handle)
    handle.active.names, handle.active.ids = (name,), None
    return handle


def _misfits(handle: AdaptedModel, file: AdapterFile) -> list[str]:
    """Layers and heads of a file that the model does not have."""
    there = {path for path, _ in handle.model.named_modules()}
    missing = [path for path in [*file.paths, *file.heads] if path not in there]
    if missing:
        return [
            f"the model has no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''} ({len(missing)} missing)"
        ]
    if file.paths:
        cover(handle.model, file.paths)
    return []


def _fill(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Copy tensors into the live state if all fit; otherwise change nothing and list every problem."""
    problems = []
    if missing := [key for key in state if key not in tensors]:
        problems.append(f"missing tensors: {', '.join(missing)}")
    if extra := [key for key in tensors if key not in state]:
        problems.append(f"unexpected tensors: {', '.join(extra)}")
    for key in state.keys() & tensors.keys():
        if state[key].shape != tensors[key].shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)}, expected {tuple(state[key].shape)}")
        elif not tensors[key].isfinite().all():
            problems.append(f"{key} holds values that are not finite")
    if not problems:
        with torch.no_grad():
            for key, tensor in state.items():
                tensor.copy_(tensors[key])
    return problems


def _constants_sha256(handle: AdaptedModel, name: str) -> str | None:
    """sha256 of the frozen tensors that a method draws from a seed and no file holds; None where there are none."""
    drawn = handle.constants(handle.specs[name])
    return fingerprint(sorted(drawn.items()), exact=True) if drawn else None


def _base_name(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    return {"name": Path(name).name if Path(name).is_dir() else name, "model_type": getattr(config, "model_type", None)}
