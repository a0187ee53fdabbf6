"""Folders of methods that only PEFT has: PEFT loads them onto a copy of the base and converts them to a LoRA.

A layer's update is cut at the rank where the rest is below the rounding of float32. PEFT reads the folder and runs its
own code for it, so this is done only where it is asked for.
"""

import copy
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from loralab.adapted import HANDLE
from loralab.disk import read_header, tensor_headers, write_tensors
from loralab.errors import UserError
from loralab.files import AdapterFile
from loralab.peft_format import TENSORS, check_not_pickled, places, read

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
    config.modules_to_save = [name.removeprefix("base_model.model.") for name in saved] or None
    config.task_type = theirs.active_peft_config.task_type
    with tempfile.TemporaryDirectory() as made:
        config.save_pretrained(made)
        write_tensors(Path(made) / TENSORS, kept | head)
        file = read(Path(made))
    return replace(file, name=folder.name or folder.resolve().name)
