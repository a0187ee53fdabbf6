"""The folders that Trainer and `save_pretrained` leave: adapters, and no half of a base.

model.safetensors holds what learns, once, under loralab/NAME/path.role, with the draws and counts of methods that act
at every step. It bears that name as Trainer reads it without strictness, with PEFT installed or not. adapter.json
beside it makes the folder an adapter of loralab. config.json makes `from_pretrained` fail with the reason: auto classes
print the type of the model that they do not know, a class of its own refuses a size that is no number or, as not every
config has these, an implementation of experts that there is not. Tokenizers, which read the type only, are loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loralab import files
from loralab.adapted import AdaptedModel, once
from loralab.disk import write_json, write_tensors
from loralab.errors import UserError
from loralab.files import CHECKPOINT, INSIDE, AdapterFile
from loralab.schema import listed

NO_MODEL = "this folder holds adapters and no whole model: use loralab.load(base, folder)"
STUB = dict.fromkeys(("model_type", "vocab_size", "hidden_size", "experts_implementation"), NO_MODEL)


def write(
    adapters: Mapping[str, AdapterFile], active: Sequence[str], steps: Mapping[str, Tensor], folder: Path
) -> None:
    """Write a checkpoint: name -> adapter, the names of the active ones, and the state of the steps.

    One active adapter lies in the folder itself, each other one in a folder of its name inside too, from where it is
    loaded. Raises UserError if the folder cannot be written, and as `files.write` does.
    """
    first = active[0] if len(active) == 1 else None
    others = {name: file for name, file in adapters.items() if name != first}
    beside = {f"{INSIDE}{name}/{key}": t for name, file in others.items() for key, t in file.tensors.items()}
    beside |= steps
    try:
        if first is not None:
            files.write(adapters[first], folder, beside)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / CHECKPOINT, beside)
        for name, file in others.items():
            files.write(file, folder / name)
        write_json(folder / "config.json", STUB)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def take_in(handle: AdaptedModel, state: dict[str, Any]) -> bool:
    """Put the tensors of a checkpoint in `state` under the names that the model has for them; whether there are any.

    Raises UserError for the checkpoint of other adapters, or of other layers.
    """
    given = {key: state.pop(key) for key in list(state) if key.startswith(INSIDE)}
    if not given:
        return False
    own = {f"{INSIDE}{name}/{key}": t for name in handle.specs for key, (_, t) in once(handle.tensors(name)).items()}
    missing, extra = [key for key in own if key not in given], [key for key in given if key not in own]
    if missing or extra:
        differ = "; ".join(f"{what} {listed(keys, 3)}" for what, keys in (("no", missing), ("also", extra)) if keys)
        raise UserError(f"this checkpoint is of other adapters than the model has ({differ}): attach the same first")
    names = {id(p): key for key, p in handle.model.named_parameters()}
    shaped = {key: t.reshape(own[key].shape) if t.ndim == 0 else t for key, t in given.items()}  # of older counters
    state |= {names[id(own[key])]: t for key, t in shaped.items()}
    return True
