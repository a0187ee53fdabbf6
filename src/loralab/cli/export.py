"""`loralab export`: an adapter in the layout other tools read."""

from pathlib import Path

from loralab import gguf_format, peft_write
from loralab.cli import base as bases
from loralab.cli.show import note
from loralab.disk import check_output_folder
from loralab.model_names import hub_name


def export(
    folder: Path, /, *, model: str, out: Path, gguf: bool = False, base: Path | None = None, name: str | None = None
) -> None:
    """Write an adapter in PEFT's layout, which vLLM and the rest of the ecosystem read too, or as a file of llama.cpp.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab.
    model: str
        The base: a local folder, a hub name, or an alias.
    out: Path
        Folder to write, new or empty.
    gguf: bool
        Write the LoRA of llama.cpp, adapter.gguf, in place of PEFT's layout.
    base: Path
        Let the export name the base by this folder; by default by its hub name, and never by a path.
    name: str
        Another name for the adapter than its own.
    """
    check_output_folder(out)
    adapters, _ = bases.load(model, folder, name)
    called = hub_name(model) if base is None else str(base)
    adapters.export(out, layout="gguf" if gguf else "peft", base_name=called)
    print(f"exported to {out / gguf_format.ADAPTER if gguf else out}")
    print(f"base: {called}, sha256 of its tensors {adapters.base_sha256}")
    for text in [] if gguf else peft_write.vllm_notes(out):
        note(text)
