"""`loralab verify`: is an adapter folder whole, and does it fit a base?"""

from pathlib import Path

from loralab.cli import base


def verify(folder: Path, /, *, model: str | None = None, name: str | None = None) -> None:
    """Check an adapter folder: readable, unchanged, complete, finite, and with --model that it loads on that base.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    model: str
        The base to try it on: a local folder, a hub name, or an alias.
    name: str
        Another name for the adapter than its own.
    """
    if model is None:
        file = base.read(folder, name)
        print(f"{folder}: whole ({len(file.tensors)} tensors); pass --model to check that it fits a base")
        return
    base.load(model, folder, name)
    print(f"{folder}: whole, and fits {model}")
