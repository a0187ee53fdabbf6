"""`loralab export`: an adapter in the layout other tools read."""

from pathlib import Path

from loralab import gguf_format, peft_write
from loralab.cli import base as bases
from loralab.cli.show import note
from loralab.disk import check_output_folder, write_text
from loralab.hub import TEMPLATE
from loralab.model_names import hub_name
from loralab.objectives import saved


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
    template = saved.read(folder).template
    adapters, _ = bases.load(model, folder, name)
    called = hub_name(model) if base is None else str(base)
    adapters.export(out, layout="gguf" if gguf else "peft", base_name=called)
    print(f"exported to {out / gguf_format.ADAPTER if gguf else out}")
    if template is not None:
        write_text(out / TEMPLATE, template)
        note(f"it was trained with a chat template of its own, {out / TEMPLATE}: give it to what runs the adapter")
    print(f"base: {called}, sha256 of its tensors {adapters.base_sha256}")
    for text in [] if gguf else peft_write.vllm_notes(out):
        note(text)
