"""Folders of methods that only PEFT has: PEFT loads them onto a copy of the base and converts them to a LoRA.

A layer's update is cut at the rank where the rest is below the rounding of float32. Some of PEFT's starts (PiSSA,
OLoRA) move the weight W to W - B0 A0: what they moved is part of the update here, where the base stays as it is. PEFT
reads the folder and runs its own code for it, so this is done only where it is asked for.
"""

import copy
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapted import HANDLE, base_tensor
from loralab.disk import read_header, tensor_headers, write_tensors
from loralab.errors import UserError
from loralab.files import AdapterFile
from loralab.peft_format import PREFIX, TENSORS, check_not_pickled, places, read

WHOLE = 1.0  # share of the squares of an update that its LoRA keeps


def library() -> Any:
    """PEFT. Raises UserError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("through_peft=True needs PEFT: pip install peft") from error
    return peft


def converted(folder: Path, model: nn.Module) -> AdapterFile:
    """The adapter of a folder of PEFT as a LoRA, made by PEFT over a copy of `model`, which is left as it is.

    Raises UserError for a folder that PEFT cannot load onto this model, and for a method that adds nothing to a weight.
    """
    peft = library()
    stored, place = places(folder)
    read_header(place)  # PEFT looks on the hub for what is not here
    check_not_pickled(folder)
    tensor_headers(stored)
    plain = copy.deepcopy(model)
    if hasattr(plain, HANDLE):
        getattr(plain, HANDLE).detach()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            theirs = peft.PeftModel.from_pretrained(plain, str(folder))
            config, tensors = peft.convert_to_lora(theirs, rank=WHOLE)
    except Exception as error:  # whatever PEFT raises
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: PEFT does not convert it to a LoRA here: {first}") from error
    if missing := [str(w.message) for w in told if "missing adapter keys" in str(w.message)]:
        raise UserError(f"{folder}: PEFT found {missing[0][:200]}")
    saved = [name for name, m in theirs.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    state = peft.get_peft_model_state_dict(theirs)
    head = {key: t for key, t in state.items() if any(key.startswith(f"{name}.") for name in saved)}
    kept = {key: t for key, t in tensors.items() if key.endswith((".lora_A.weight", ".lora_B.weight"))}
    for path, D in _moved(theirs, model).items():
        kept |= _with(path, D, kept, config)
    config.modules_to_save = [name.removeprefix(PREFIX) for name in saved] or None
    config.task_type = theirs.active_peft_config.task_type
    with tempfile.TemporaryDirectory() as made:
        config.save_pretrained(made)
        write_tensors(Path(made) / TENSORS, kept | head)
        file = read(Path(made))
    return replace(file, name=folder.name or folder.resolve().name)


def _moved(theirs: Any, model: nn.Module) -> dict[str, Tensor]:
    """Path -> what PEFT added to the weight (out, in) of a layer as it put its adapter on.

    Raises UserError for a weight that it changed and that is no matrix.
    """
    found = {}
    for name, module in theirs.named_modules():
        path = name.removeprefix(PREFIX)
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if not isinstance(weight, Tensor) or getattr(module.base_layer, "base_layer", None) is not None:
            continue
        before = base_tensor(model, f"{path}.weight").detach()
        if weight.shape == before.shape and torch.equal(weight.detach(), before.to(weight)):
            continue
        if weight.shape != before.shape or weight.ndim != 2:
            raise UserError(f"{path}: PEFT changes its weight in a way that is no LoRA: merge the adapter with PEFT")
        D = weight.detach().float() - before.float()
        found[path] = D.mT if getattr(module, "fan_in_fan_out", False) else D
    return found


def _with(path: str, D: Tensor, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """PEFT's A and B of a layer with D (out, in) added to B A, at the rank that float32 can tell; `config` follows."""
    A, B = (f"{PREFIX}{path}.lora_{name}.weight" for name in "AB")
    if A in tensors:
        rank, alpha = (getattr(config, f"{name}_pattern").get(path) for name in ("rank", "alpha"))
        D = D + ((alpha or config.lora_alpha) / (rank or config.r)) * tensors[B].float() @ tensors[A].float()
    U, s, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    rank = max(1, int((s > s[0] * torch.finfo(torch.float32).eps).sum()))
    config.rank_pattern[path] = config.alpha_pattern[path] = rank
    config.exclude_modules.discard(path)
    root = s[:rank].sqrt()  # (r,)
    return {A: (root.unsqueeze(1) * Vh[:rank]).float(), B: (U[:, :rank] * root).float().contiguous()}
