"""Checkpoints of sentence-transformers' trainer: it takes them up by opening them as whole models, which they are not.

sentence-transformers has no place to say how a part of a model is taken up, so the one method that does it is wrapped:
for a model with adapters it loads each part from its own folder. All other models go the way they went.
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from loralab.adapted import HANDLE
from loralab.disk import read_tensors
from loralab.files import CHECKPOINT

PACKAGE, TRAINER, METHOD = "sentence_transformers", "sentence_transformers.base.trainer", "_load_from_checkpoint"
WRAPPED = "_loralab_wrapped"  # marks the method


def follow_sentence_transformers() -> None:
    """Wrap the method, once, if sentence-transformers is in use; versions that have it elsewhere stay as they are."""
    if PACKAGE not in sys.modules:
        return
    try:
        module = import_module(TRAINER)
    except ImportError:
        return
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == TRAINER]
    for kind in [kind for kind in own if METHOD in vars(kind)]:  # transformers' Trainer, imported there, is another's
        if not hasattr(method := vars(kind)[METHOD], WRAPPED):
            setattr(kind, METHOD, _wrapped(method))


def _wrapped(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def load(trainer: Any, checkpoint: str, *more: Any) -> None:
        model = getattr(trainer.model, "_orig_mod", trainer.model)
        if any(hasattr(module, HANDLE) for module in model.modules()):
            take_up(model, Path(checkpoint))
        else:
            method(trainer, checkpoint, *more)

    setattr(load, WRAPPED, True)
    return load


def take_up(model: Any, checkpoint: Path) -> None:
    """Load a checkpoint into the parts of a model of sentence-transformers. Raises UserError for other adapters."""
    for part in json.loads((checkpoint / "modules.json").read_text(encoding="utf-8")):
        module: nn.Module = model.get_submodule(part["name"])
        adapted = next((inner for inner in module.modules() if hasattr(inner, HANDLE)), None)
        if adapted is not None:
            adapted.load_state_dict(read_tensors(checkpoint / part["path"] / CHECKPOINT))
        elif module.state_dict():
            kind: Any = type(module)
            module.load_state_dict(kind.load(str(checkpoint), subfolder=part["path"]).state_dict())
