"""The base that an adapter folder belongs to: its name, and the model with a head for the adapter."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from loralab import model_names, models
from loralab.adapters import Adapters, put
from loralab.errors import OtherBase, UserError
from loralab.files import AdapterFile, inside
from loralab.objectives import saved
from loralab.peft_format import LABELLED, task_type
from loralab.schema import listed
from loralab.serve.pool import AdapterFolder, adapter_folders

Device = Literal["auto", "cpu", "cuda"]


def torch_device(given: str) -> torch.device:
    """The device that is meant: with auto a GPU if there is one. Raises UserError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if given.startswith("cuda") and not there:
        raise UserError(f"device={given!r}: torch finds no GPU on this machine, leave it out and the CPU is used")
    try:
        return torch.device(("cuda" if there else "cpu") if given == "auto" else given)
    except RuntimeError as error:
        raise UserError(f"device={given!r}: expected auto, cpu, cuda or another device of torch") from error


def on_base(
    model: str,
    file: AdapterFile,
    folder: Path,
    name: str | None = None,
    whole: bool = False,
    say: Callable[[str], None] = lambda note: None,
    device: str = "cpu",
) -> tuple[Adapters, Any]:
    """Return (adapters, tokenizer): an adapter on its base, in eval mode on a device (see `torch_device`).

    Raises UserError as `plain` and `adapters.put` do. A base that is not there, or is another one, is an error that
    says which is wanted and how to get it.
    """
    place = torch_device(device)
    try:
        model_names.require(model)
        base = plain(model, file, folder, whole, say)
        handle = put(base.model, file, folder, name)
    except (OtherBase, model_names.NotHere) as error:
        raise UserError(f"{error}; {wanted(folder, file)}") from error
    handle.model.to(place)
    return handle, base.tokenizer


def wanted(folder: Path, file: AdapterFile) -> str:
    """Say which base an adapter wants and how to get it."""
    name = saved.read(folder, file.base.get("task_type")).base or file.base.get("name")
    return model_names.wanted(name, file.base.get("sha256"))


def model_of(given: str | None, folder: Path, file: AdapterFile) -> str:
    """The name of an adapter's base: as given, as its run was given it, or as the folder has it. Raises UserError."""
    known = None if given else next(iter(adapter_folders([str(folder)]).values()))
    if given:
        return given
    name = (known and known.base) or file.base.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder} names no base: say which with --model")
    return model_names.here(name)


def shared(given: str | None, folders: Iterable[AdapterFolder]) -> str:
    """The name of the base of several adapters, as given or as they all name it. Raises UserError."""
    bases = sorted({folder.base for folder in folders if folder.base})
    if given is None and len(bases) != 1:
        raise UserError(f"the adapters name {', '.join(bases) or 'no base'}: say which base with --model")
    return given or bases[0]


def present(model: str, adapters: Iterable[AdapterFolder]) -> None:
    """Raise UserError for a base that is not there, with which the first adapter wants and how to get it."""
    try:
        model_names.require(model)
    except model_names.NotHere as error:
        first = next(iter(adapters), None)
        raise UserError(f"{error}; {first.wanted}" if first else str(error)) from error


def plain(
    model: str, file: AdapterFile, folder: Path, whole: bool = False, say: Callable[[str], None] = lambda note: None
) -> models.Pretrained:
    """Load the base of an adapter, with a head for it; `say` is told if a part of the head is random.

    Raises UserError for what does not fit, and with `whole` for a head that would be random.

    The model class is the one that the folder names; a folder that names none is taken to belong to a classifier if it
    has a head, else to the class that the base was saved from.
    """
    task = _task(file, model)
    outputs = (_outputs(file) or None) if task in LABELLED else None
    found = models.pretrained(model, task, outputs)
    wanted, kind = file.base.get("class"), type(found.model).__name__
    if wanted != kind and wanted is not None and task_type(wanted) == task:
        raise UserError(f"{folder} belongs to a {wanted}, and {model} is a {kind}: name the base it was trained on")
    if task in LABELLED and len(file.labels) == found.model.config.num_labels:
        found.model.config.id2label = dict(enumerate(file.labels))
        found.model.config.label2id = {label: i for i, label in enumerate(file.labels)}
    if random := [key for key in found.drawn if inside(key, file.heads) is None]:
        lack = f"neither {folder} nor {model} has {listed(random, 3)}"
        if whole:
            raise UserError(
                f"{lack}: the head would be random; train the adapter with a head, or name a base that has it"
            )
        say(f"{lack}, so the head is random")
    return found


def _task(file: AdapterFile, model: str) -> str:
    """The task of an adapter's base, as PEFT calls it."""
    named = file.base.get("task_type") or task_type(file.base.get("class") or "")
    if named in models.AUTO_CLASSES:
        return str(named)
    saved_from = None if file.heads else task_type(models.architecture(model) or "")
    return saved_from if saved_from not in (None, "FEATURE_EXTRACTION") else "SEQ_CLS"


def _outputs(file: AdapterFile) -> int:
    """Outputs of the head: one a label, or where a folder names no labels the narrowest matrix of its head; 0: none."""
    head = [t for key, t in file.tensors.items() if inside(key, file.heads)]
    return len(file.labels) or min((len(t) for t in head if t.ndim == 2), default=0)
