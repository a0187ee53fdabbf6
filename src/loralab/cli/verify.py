"""`loralab verify`: is an adapter folder whole, and does it fit a base?"""

from pathlib import Path

import torch

from loralab import files
from loralab.adapters import read
from loralab.cli import base
from loralab.disk import read_header
from loralab.errors import UserError


def verify(folder: Path, /, *, model: str | None = None) -> None:
    """Check an adapter folder: readable, complete, finite, and with --model that it loads on that base.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    model: str
        The base to try it on: a local folder, a hub name, or an alias.
    """
    file = read(folder)
    if model is None:
        if problems := _problems(folder, file):
            raise UserError(f"{folder}: {'; '.join(problems)}")
        print(f"{folder}: whole ({len(file.tensors)} tensors); pass --model to check that it fits a base")
        return
    base.load(model, folder)
    print(f"{folder}: whole, and fits {model}")


def _problems(folder: Path, file: files.AdapterFile) -> list[str]:
    """What is wrong without looking at a base; a folder of PEFT does not list its tensors."""
    header = folder / files.HEADER
    roles = read_header(header).get("roles") if header.is_file() else dict.fromkeys(file.tensors)
    if not isinstance(roles, dict):
        return [f"{header.name} does not list its tensors under roles"]
    wrong = {
        "missing tensors": [key for key in roles if key not in file.tensors],
        "unexpected tensors": [key for key in file.tensors if key not in roles],
        "values that are not finite": [key for key, t in file.tensors.items() if not torch.isfinite(t).all()],
    }
    return [f"{what}: {', '.join(keys)}" for what, keys in wrong.items() if keys]
