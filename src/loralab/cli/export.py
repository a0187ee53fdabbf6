"""`loralab export`: an adapter in the layout other tools read."""

from pathlib import Path
from typing import Literal

from loralab.cli import base


def export(folder: Path, /, *, model: str, out: Path, layout: Literal["peft"] = "peft") -> None:
    """Write an adapter in PEFT's layout, which vLLM and the rest of the ecosystem read too.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab.
    model: str
        The base: a local folder, a hub name, or an alias.
    out: Path
        Folder to write; must not exist.
    layout: str
        Whose layout.
    """
    base.absent(out)
    adapters, _ = base.load(model, folder)
    print(f"exported to {adapters.export(out, layout=layout)}")
