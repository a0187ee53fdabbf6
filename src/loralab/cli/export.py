"""`loralab export`: an adapter in the layout other tools read."""

from pathlib import Path

from loralab.cli import base
from loralab.errors import UserError


def export(folder: Path, /, *, model: str, out: Path, layout: str = "peft") -> None:
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
        The one layout is "peft".
    """
    if out.exists():
        raise UserError(f"--out {out} exists: choose a new folder")
    adapters, _ = base.load(model, folder)
    print(f"exported to {adapters.export(out, layout=layout)}")
