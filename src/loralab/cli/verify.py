"""`loralab verify`: is an adapter folder whole, and does it fit a base?"""

from pathlib import Path

import torch

from loralab import files
from loralab.cli import base
from loralab.errors import UserError


def verify(folder: Path, /, *, model: str | None = None) -> None:
    """Check an adapter folder: readable, finite, and with --model that it loads on that base. Exit code 2 if not.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    model: str
        The base to try it on: a local folder, a hub name, or an alias.
    """
    file = files.read(folder)
    if bad := [key for key, tensor in file.tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{folder}: values that are not finite in {', '.join(bad)}")
    if model is None:
        print(f"{folder}: whole ({len(file.tensors)} tensors); pass --model to check that it fits a base")
        return
    base.load(model, folder)
    print(f"{folder}: whole, and fits {model}")
