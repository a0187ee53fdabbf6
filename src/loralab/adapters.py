"""`attach` and `load` put adapters on a model in place; the `Adapters` handle adds, uses, saves and merges them."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Generator, Tensor, nn

from loralab import checkpoints, exports, files, fitting, hub, install, model_card, peft_convert, peft_format
from loralab.active import follow_checkpoints
from loralab.adapted import DDP_IGNORES, HANDLE, AdaptedModel, once
from loralab.algebra import Combined, combine
from loralab.contents import adapter_file, constants_sha256
from loralab.errors import OtherBase, UserError
from loralab.experts import AdaptedExperts, AdaptedStack
from loralab.fast import Choices, Speed, enable
from loralab.files import AdapterFile
from loralab.gradients import Loss
from loralab.hooks import StepHooks
from loralab.kinds import loaded
from loralab.layer import put_back
from loralab.merging import TieNote, merge_dtype
from loralab.methods import starts
from loralab.methods.base import whole
from loralab.optimizers import grouped, watch
from loralab.peft_place import placed
from loralab.recipe import Recipe
from loralab.reference import frozen_copy
from loralab.schema import checked, listed
from loralab.sentence_checkpoints import follow_sentence_transformers
from loralab.start_data import start_data
from loralab.targets import ALL, ReachNote, Targets, meant_in_vain
from loralab.ties import untie

OWN = ("save_pretrained", "push_to_hub")  # methods of a model that its handle stands in for


def attach(
    model: nn.Module,
    method: str | Recipe = "lora",
    *,
    name: str = "default",
    targets: Targets = ALL,
    exclude: Sequence[str] = (),
    tokens: Sequence[int] = (),
    head: bool | Sequence[str] = False,
    labels: Sequence[str] = (),
    seed: int = 0,
    batches: Iterable[Mapping[str, Any]] | None = None,
    loss: Loss | None = None,
    **settings: Any,
) -> "Adapters":
    """Freeze `model`, put a fresh adapter on it in place and leave that adapter active.

    `settings` are the method's own: rank, alpha, dropout, ... (see `loralab methods`). Layers that `exclude` names, or
    that are inside modules it names, are left alone; names are as in `targets`. Of `tokens`, such as new ones after a
    resize, the vectors learn too, in the embedding and in an output layer tied to it. `head=True` trains a copy of
    everything outside the backbone; a list names the modules instead. `seed` decides the adapter's random start;
    `batches`, each what `model(**batch)` takes, are for a start that looks at data (eva, lora-ga), and `loss`, a
    function of model and batch, for one that looks at gradients where the model has no loss of its own.
    Raises UserError for an unknown method, setting or target, before anything has changed.
    """
    if hasattr(model, HANDLE):
        there = ", ".join(of(model).names)
        raise UserError(f"this model has adapters already ({there}): use adapters.add(name, method)")
    handle = Adapters(model)
    given: dict[str, Any] = {
        "targets": targets,
        "exclude": exclude,
        "tokens": tokens,
        "head": head,
        "labels": labels,
        **settings,
    }
    handle.add(name, method, seed=seed, batches=batches, loss=loss, **given)
    handle.connect()
    handle.activate(name)
    return handle


def load(
    model: nn.Module,
    folder: Path | str,
    name: str | None = None,
    check_base: bool = True,
    through_peft: bool = False,
) -> "Adapters":
    """Put the adapter of `folder`, loralab's or PEFT's, on `model` beside those already there, and leave it active.

    `through_peft` has PEFT load the folder, on a copy of the model, and convert it to a LoRA: for its other methods.
    Raises UserError, with the model as it was, for a file with missing, extra or misshapen tensors, for layers the
    model does not have, and for a base other than the one it was trained on (unless `check_base=False`).
    """
    file = peft_convert.converted(Path(folder), model) if through_peft else read(folder)
    return put(model, file, folder, name, check_base)


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
        self.on_model: Any = None  # the hook that runs before a forward pass
        self.on_load: list[Any] = []  # the hooks that run around `load_state_dict`
        self.taken_in = False  # whether the state that is being loaded is a checkpoint

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin as a copy, perhaps in another process: all that `attach` asks of torch holds for it too."""
        vars(self).update(state)
        follow_checkpoints()
        if self.on_model is not None:
            watch(self)

    def connect(self) -> None:
        """Let the model know of its adapters, once the first of them is there."""
        if self.on_model is None:
            setattr(self.model, HANDLE, self)
            if loaded.open_whole(self.model):
                warnings.warn(loaded.WHOLE, loaded.WholeNote, stacklevel=4)
            self.on_model = self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
            self.on_load = [
                self.model.register_load_state_dict_pre_hook(self.before_load),
                self.model.register_load_state_dict_post_hook(self.after_load),
            ]
            for attribute in OWN:
                if hasattr(self.model, attribute):
                    self.model.__dict__[attribute] = getattr(self, attribute)
            watch(self)
            follow_sentence_transformers()

    # ---- adding and removing -------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        method: str | Recipe = "lora",
        *,
        targets: Targets = ALL,
        exclude: Sequence[str] = (),
        tokens: Sequence[int] = (),
        head: bool | Sequence[str] = False,
        labels: Sequence[str] = (),
        seed: int = 0,
        batches: Iterable[Mapping[str, Any]] | None = None,
        loss: Loss | None = None,
        filled: bool = False,
        plain: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        """Add a fresh adapter beside the others; `use` or `activate` activates it. Arguments as in `attach`.

        One that trains the base in place is active at once. `filled=True` leaves out a start that is computed, because
        a file gives the tensors. `plain` is this model before any adapter, perhaps with another head: its head is
        copied, and a start looks at data through it. Raises UserError, with nothing changed, for what cannot be added.
        """
        self.check_attached()
        seed = checked(seed, int, "seed")
        spec = install.spec_of(self, name, method, settings, targets, head, labels, exclude, tokens)
        r, coverage = spec.recipe, spec.coverage
        in_vain = None if coverage is None or filled else meant_in_vain(coverage, self.model, targets)
        seen = None if filled else start_data(self, r, spec.paths, batches, loss, plain)
        if r.store or spec.base_names:
            _ = self.base_sha256  # taken while the base still has its own bits
        if not self.specs:
            self.model.requires_grad_(False)
        generator = Generator().manual_seed(seed)
        with install.taken_back_on_error(self, name):
            install.add_layers(self, spec, name, generator, seen)
            install.add_heads(self, spec, name, generator, plain)
        install.open_base(self, spec, name)
        self.specs[name] = spec
        if r.factors is not None and r.factors.stepped:
            self.steps.add(name, seed)
        if spec.base_names:
            self.active.activate(name)
        self._follow()
        if in_vain is not None:
            warnings.warn(f"adapter {name!r}: {in_vain}", ReachNote, stacklevel=3)

    def remove(self, name: str) -> None:
        """Take an adapter off the model; its layers stay wrapped until `detach`.

        Raises UserError if it is active, also if that is outside of the `use` block around this call, or in another
        thread. Inside `use(None)` the default may be removed; after the block another has to be activated.
        """
        name = self.only(name)
        spec = self.specs[name]
        self.active.release(name)
        install.give_base_back(self, spec)
        self.steps.remove(name)
        for path in spec.paths:
            self.layers[path].remove(name)
        for path in spec.heads:
            del self.heads[path].copies[name]
        del self.specs[name]
        if self.synchronized is not None:
            self.synchronized = tuple(other for other in self.synchronized if other != name)
        self._follow()

    def combine(self, name: str, weights: Mapping[str, float], how: str = "exact", **given: Any) -> Combined:
        """Add the combination of adapters, name -> weight, as a LoRA under a new name; see `algebra.combine`.

        Returns what it is and what was lost. Raises UserError as `algebra.combine` and `add` do.
        """
        files = [self._contents(self.only(each)) for each in weights]
        made = combine(files, list(weights.values()), how, name=name, **given)
        put(self.model, made.file, f"combination {name!r}", name)
        return made

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
        without decay. Make the optimizer from these groups after `attach`. Raises UserError for an unknown name or
        grouping.
        """
        r = self.spec(name).recipe
        rates = {"lr": lr, "weight_decay": weight_decay, "head_lr": head_lr}
        lr, weight_decay, head_lr = (checked(value, float | None, key) for key, value in rates.items())
        learned = {key: pair for key, pair in once(self.tensors(name)).items() if pair[1].requires_grad}
        return grouped(learned, grouping, r.lr if lr is None else lr, r.lr_ratio, head_lr, weight_decay)

    def fast(self, dtype: str | torch.dtype = "auto", quiet: bool = False, speed: Speed = "auto") -> Choices:
        """Make forward and backward passes fast on this machine; unless `quiet`, print what was chosen and why.

        `dtype` is what frozen tensors may be rounded to: bfloat16, float32 (nothing is rounded), or auto, which is
        bfloat16 where the machine multiplies it fast. Rounded values stay so. `speed="off"` puts the plain path back.
        Call it after `attach`. The result follows later changes. Raises UserError for an unknown dtype or speed.
        """
        self.check_attached()
        choices = enable(self.model, dtype, speed)
        if not quiet:
            print(choices)
        return choices

    def reference(self) -> nn.Module:
        """A frozen model that answers for ever as this one does now: the `ref_model` of DPO and its like.

        It shares the tensors of the base, so it costs a copy of the adapters only. Inside `use(None)` it is the base.
        """
        self.check_attached()
        frozen = frozen_copy(self)
        of(frozen).steps.disconnect()
        return frozen

    # ---- leaving -------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str, name: str | None = None, saved_as: str | None = None) -> Path:
        """Write adapter.safetensors, adapter.json and a model card (README.md); see `load`.

        `saved_as` gives the adapter another name in the file. A README of somebody's own stays.

        Raises UserError if the folder cannot be written or holds an adapter in another layout, and for an adapter with
        values that are not finite.
        """
        file = self._contents(self.only(name), saved_as)
        if self.divided and torch.distributed.get_rank():
            return Path(folder)  # all processes put the tensors together, the first one writes
        written = files.write(file, folder)
        try:
            model_card.write(file, written)
        except OSError as error:
            raise UserError(f"cannot write {written / model_card.FILE}: {error.strerror or error}") from error
        return written

    def export(
        self, folder: Path | str, name: str | None = None, layout: str = "peft", base_name: str | None = None
    ) -> Path:
        """Write the adapter for other tools: layout "peft", which vLLM and others read too, or "gguf", for llama.cpp.

        `base_name` is what the folder calls the base, by default its hub name, or the last part of its folder's name.
        Returns the folder. Raises UserError for another layout, for an adapter that the layout cannot hold or whose
        values are not finite, and for a folder that holds an adapter in loralab's layout.
        """
        name = self.only(name)
        self._check_finite(name)
        return exports.export(self, name, Path(folder), layout, base_name)

    def push(
        self, repo: str, name: str | None = None, private: bool = False, dry_run: bool = False, api: Any = None
    ) -> str | None:
        """Upload the adapter with its model card to a repository of the hub; see `hub.push`.

        Returns the address of the commit, none with `dry_run`. Raises UserError as `save` and `hub.push` do.
        """
        with TemporaryDirectory() as place:
            return hub.push(self.save(place, name), repo, private, dry_run, api)[1]

    def merge(self, name: str | None = None, dtype: torch.dtype | str | None = None) -> nn.Module:
        """A plain model with new tensors that acts like the adapted one; this model is left as it is.

        The update is added in float32 and the sum kept in the dtype of the model, which is that from before `fast`
        rounded it, or the whole model in `dtype`: float32, bfloat16 or float16. The head and the labels are the
        adapter's. A quantized base is dequantized first; a merge into fewer bits is refused, as it rounds the update
        away (`loralab.analysis.merge_errors` measures it). Weights that were tied to an adapted one are tied no longer.
        Raises UserError for another dtype, and for an adapter with values that are not finite.
        """
        name, wanted = self.only(name), self.rounded_from if dtype is None else merge_dtype(dtype)
        self.check_undivided("merge")
        self._check_finite(name)
        held = [t for m in self.model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
        memo = {id(t): t.detach().clone() for t in held if not t.is_leaf}  # a state of the last forward pass
        plain: nn.Module = copy.deepcopy(self.model, memo)
        of(plain).unwrap(name, wanted)
        return plain if wanted is None else plain.to(wanted)

    def save_pretrained(self, folder: Path | str, is_main_process: bool = True, **more: Any) -> None:
        """Stand in for the model's own method, which would write a base under names that no model reads.

        Writes adapters as a checkpoint (see checkpoints.py), which `load` reads and Trainer goes on from. There is no
        whole model in the folder, so `from_pretrained` fails and says why; `adapters.merge().save_pretrained(folder)`
        writes one. Raises UserError if the folder cannot be written, or is to be pushed to the hub.
        """
        self.check_attached()
        if more.get("push_to_hub"):
            self.push_to_hub()
        if is_main_process or self.divided:
            each, steps = {name: self._contents(name) for name in self.specs}, self.steps.saved()
        if is_main_process:
            checkpoints.write(each, self.active.default.names, steps, Path(folder))

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Stand in for the model's own method, which would upload what is not checked. Raises UserError."""
        self.check_attached()
        raise UserError(
            "an adapted model is not pushed: adapters.push(repo) uploads the adapter, "
            "adapters.merge().push_to_hub(repo) a whole model"
        )

    def before_load(self, _model: nn.Module, state: dict[str, Any], *_: Any) -> None:
        """Take the tensors of a checkpoint from a state (a hook of the model). Raises UserError for other adapters."""
        self.taken_in = checkpoints.take_in(self, state)

    def after_load(self, _model: nn.Module, keys: Any) -> None:
        """Miss nothing of the base after a checkpoint, which does not hold it (a hook of the model)."""
        if self.taken_in:
            keys.missing_keys.clear()

    def _contents(self, name: str, saved_as: str | None = None) -> AdapterFile:
        """An adapter as its folder holds it. Raises UserError for values that are not finite."""
        self._check_finite(name)
        self._warn_of_others(name)
        return adapter_file(self, name, saved_as or name)

    def _check_finite(self, name: str) -> None:
        """Raise UserError if an adapter holds a value that is not finite."""
        tensors = {key: whole(t) for key, t in self.state(name).items()}
        if bad := [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
            raise UserError(
                f"adapter {name!r} holds values that are not finite in {listed(bad, 3)} ({len(bad)} of {len(tensors)} "
                "tensors): its training diverged; take an earlier state, or a lower learning rate"
            )

    def _warn_of_others(self, name: str) -> None:
        """Warn of what learns in the model and is no part of an adapter: a file of the adapter does not hold it."""
        own = {id(t) for each in self.specs for t in self.state(each).values()}
        if others := [key for key, p in self.model.named_parameters() if p.requires_grad and id(p) not in own]:
            warnings.warn(
                f"{listed(others, 3)} ({len(others)} tensors) of the base can learn but are no part of adapter "
                f"{name!r}, so its file does not hold them: name their modules in head=[...] when attaching",
                stacklevel=4,
            )

    def detach(self) -> None:
        """Give the model its original module tree and bits back; the adapters are gone, and this handle with them.

        What was stored in fewer bits, or rounded by `fast`, stays rounded: it comes back in the dtype of the model.
        Raises UserError for a base that was trained in place as a whole.
        """
        self.check_attached()
        for spec in self.specs.values():
            install.give_base_back(self, spec)
        self.unwrap()
        if self.rounded_from is not None:
            self.model.to(self.rounded_from)

    def unwrap(self, name: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Put plain layers back: with the update of `name` merged in, or None for the base alone."""
        self.steps.disconnect()
        if self.on_model is not None:
            for hook in (self.on_model, *self.on_load):
                hook.remove()
        install.let_statistics_move(self)
        put_back(self.model)
        there = {id(p) for p in self.model.parameters()}
        for experts in [m for m in self.model.modules() if isinstance(m, AdaptedExperts)]:
            install.replace_module(self.model, experts, experts.plain(name, dtype))
        for layer in self.layers.values():
            if isinstance(layer, AdaptedStack):
                continue
            own = loaded.whole_dtype(self.model) if isinstance(layer.base, loaded.Loaded) else None
            plain, tied = layer.plain(name, dtype or own), layer.own_weight()
            if name is None and tied is not None and id(tied) in there:  # another module still has the weight itself
                plain.weight = tied
            install.replace_module(self.model, layer, plain)
        for head in self.heads.values():
            install.replace_module(self.model, head, head.plain(name))
        if name is not None:
            loaded.make_plain(self.model)
        spec = None if name is None else self.specs[name]
        self.show_labels(spec.labels if spec is not None and spec.heads else self.labels.names)
        if apart := untie(self.model):
            warnings.warn(
                f"{listed(apart, 3)} is tied to another weight no longer, as one of them was adapted: the merged model "
                "has both, and its config says so where it can",
                TieNote,
                stacklevel=3,
            )
        for key, tensor in self.model.named_parameters():
            tensor.requires_grad_(self.learned.get(key, any(self.learned.values())))  # untied weights have new names
        for attribute in (HANDLE, *OWN, DDP_IGNORES):
            self.model.__dict__.pop(attribute, None)
        if self._ignored:
            setattr(self.model, DDP_IGNORES, sorted(self._ignored))
        self.detached = True
        for state in (self.specs, self.layers, self.heads):
            state.clear()
        self.active.activate(None)


# ---- loading ---------------------------------------------------------------------------------------------------------


def read(folder: Path | str) -> AdapterFile:
    """Read an adapter folder, in loralab's layout or PEFT's. Raises UserError for anything else."""
    folder = Path(folder)
    if not peft_format.places(folder)[1].exists():
        return files.read(folder)
    if files.places(folder)[1].exists():
        raise UserError(
            f"{folder} holds two adapters, {files.HEADER} and {peft_format.HEADER}, and nothing tells which is newer: "
            "remove the files of one of them"
        )
    return peft_format.read(folder)


def put(model: nn.Module, file: AdapterFile, folder: Path | str, name: str | None, check_base: bool = True) -> Adapters:
    """Load a parsed adapter file; `folder` only labels messages. Raises UserError as `load` does.

    Everything is checked before the model is changed. Warns of a folder of loralab 0.1.0, which has no checksums.
    """
    name = name or files.adapter_name(file.name)
    known = getattr(model, HANDLE, None)
    handle = Adapters(model) if known is None else of(model)
    file = placed(handle, file)
    problems = fitting.misfits(handle, file)
    if check_base and file.base.get("sha256") not in (None, handle.base_sha256):
        problems.append(
            f"it was trained on another base ({file.base.get('name')}, sha256 {str(file.base['sha256'])[:12]}, "
            f"here {handle.base_sha256[:12]}); load that base"
        )
    labels = file.labels if file.heads else ()  # without a head of its own, the outputs are those of the model
    if not problems:
        spec = install.spec_of(handle, name, file.recipe, {}, file.paths, file.heads, labels)
        computed = starts.added(file.recipe.start) if file.starts_anew else ()
        problems = fitting.unlike(fitting.expected(handle, spec, computed), file.tensors)
        if not problems and file.constants not in (None, constants_sha256(handle, spec)):
            problems.append(f"what its seed draws here is not what it was trained with (sha256 {file.constants[:12]})")
    if problems:
        other = file.base.get("sha256") not in (None, handle.base_sha256)
        raise (OtherBase if check_base and other else UserError)(f"{folder}: " + "; ".join(problems))
    handle.add(name, file.recipe, targets=file.paths, head=file.heads, labels=labels, filled=not file.starts_anew)
    fitting.fill(handle.state(name), file.tensors)
    handle.connect()
    handle.activate(name)
    for note in file.notes:
        warnings.warn(f"{folder}: {note}", files.FolderNote, stacklevel=3)
    return handle
