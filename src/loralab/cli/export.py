"""`loralab export`: an adapter in the layout other tools read."""

import sys
from pathlib import Path
from typing import Literal

from loralab import peft_write
from loralab.cli import base
from loralab.disk import check_output_folder
from loralab.model_names import public_name


def export(
    folder: Path, /, *, model: str, out: Path, layout: Literal["peft"] = "peft", name: str | None = None
) -> None:
    """Write an adapter in PEFT's layout, which vLLM and the rest of the ecosystem read too.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab.
    model: str
        The base: a local folder, a hub name, or an alias.
    out: Path
        Folder to write, new or empty.
    layout: str
        Whose layout.
    name: str
        Another name for the adapter than its own.
    """
    check_output_folder(out)
    adapters, _ = base.load(model, folder, name)
    print(f"exported to {adapters.export(out, layout=layout, base_name=public_name(model))}")
    for note in peft_write.vllm_notes(out):
        print(f"note: {note}", file=sys.stderr)
