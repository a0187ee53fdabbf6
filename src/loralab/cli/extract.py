"""`loralab extract`: a fully fine-tuned model minus its base, as a LoRA."""

from pathlib import Path

from loralab import extract as extraction
from loralab import files, models
from loralab.cli.base import check_counts
from loralab.cli.show import Json, as_json, number, table
from loralab.disk import check_output_folder
from loralab.peft_format import LABELLED, task_type

SHOWN = 20  # rows of a table


def extract(
    folder: str,
    /,
    *,
    model: str,
    out: Path,
    rank: int = 16,
    targets: str = "all-linear",
    exclude: tuple[str, ...] = (),
    name: str | None = None,
    json: Json = False,
) -> None:
    """Write what a full fine-tuning changed as a LoRA of a rank, and print by layer how much of the change it lacks.

    Parameters
    ----------
    folder: str
        The fully fine-tuned model, as save_pretrained leaves it.
    model: str
        The base that it was tuned from: a local folder, a hub name, or an alias.
    out: Path
        Folder to write, new or empty.
    rank: int
        Rank of the LoRA, in each layer the best one by SVD.
    targets: str
        A preset, or a regular expression for whole paths of layers.
    exclude: str
        Layers to leave out.
    name: str
        Name of the adapter, by default that of the folder.
    """
    check_counts(rank=rank)
    check_output_folder(out)
    named = models.architecture(folder)  # None where it does not say, as a GGUF file, which holds a language model
    task = "CAUSAL_LM" if named is None else task_type(named) or "FEATURE_EXTRACTION"
    outputs = models.config(folder).num_labels if task in LABELLED else None
    tuned, base = (models.pretrained(each, task, outputs).model for each in (folder, model))
    called = name or files.adapter_name(out.name)
    made = extraction.extract(base, tuned, rank, targets, exclude, called)
    made.adapters.save(out)
    if json:
        as_json({"out": str(out), "rank": rank, "layers": dict(made.layers), "left": dict(made.left)})
        return
    worst = sorted(made.layers.items(), key=lambda pair: -pair[1])
    more = f", the {SHOWN} worst of {len(worst)}" if len(worst) > SHOWN else ""
    table(
        f"{out}: a LoRA of rank {rank} on {len(worst)} layers; what it lacks of the change |D - B A| / |D|{more}",
        ("layer", "lacks"),
        [(path, number(error)) for path, error in worst[:SHOWN]],
    )
    if made.left:
        changed = sorted(made.left.items(), key=lambda pair: -pair[1])
        title = f"changed too and no part of a LoRA: {len(changed)} tensors, |difference| / |value in the base|"
        table(title, ("tensor", "changed by"), [(key, number(by)) for key, by in changed[:SHOWN]])
