"""`loralab demo`: the main job on embedded defaults."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loralab.cli.show import Json, as_json, folder_size, table
from loralab.disk import size_text
from loralab.errors import UserError
from loralab.run import Settings, train
from loralab.run.bar import Bar

METHODS = ("full", "head", "lora")  # each at its default learning rate
GIVEN: dict[str, Any] = {"task": "minimal-pairs", "epochs": 5}
DRAWN_WITH = ("matplotlib", "jinja2")
NO_REPORT = "none; it needs pip install 'loralab[report]'"
COLUMNS = ("method", "Matthews", "trainable", "peak memory", "training", "adapter on disk")


def demo(*, model: str = "minilm", out: Path = Path("runs/demo"), seed: int = 0, json: Json = False) -> None:
    """Fine-tune a small encoder on an embedded task: all of it, the head alone, and with LoRA. Write their report.

    This takes about two minutes on 2 cores.

    Parameters
    ----------
    model: str
        A local folder, a hub name, or an alias. minilm comes as a package and needs no network.
    out: Path
        Folder for the three runs and their report; an earlier demo there is replaced.
    seed: int
        Seed of all three runs.
    """
    runs = [Settings(**GIVEN, model=model, method=method, seed=seed, out=out / method) for method in METHODS]
    _clear([run.folder for run in runs])
    results = [{**train(run, Bar()), "adapter_bytes": folder_size(run.folder / "adapter")} for run in runs]
    page = _report(out)
    if json:
        as_json({result["method"]: result for result in results})
        return
    protocol = results[0]["protocol"]
    rows = f"{protocol['train']} rows to train on, {protocol['held_out']} held out"
    title = f"minimal-pairs ({rows}), {results[0]['model']}, {GIVEN['epochs']} epochs, seed {seed}"
    table(title, COLUMNS, [row(result) for result in results])
    print("Matthews: on the validation split, at the epoch chosen on the held-out rows")
    print(f"run folders: {', '.join(str(run.folder) for run in runs)}")
    print(f"report: {page or NO_REPORT}")


def _report(out: Path) -> Path | None:
    """Write the report and return its page; None, as the runs are worth keeping, if what draws it is missing."""
    if not all(find_spec(name) for name in DRAWN_WITH):
        return None
    from loralab.report import write

    return write(out)


def row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["method"],
        f"{result['metric']['selected']:.3f}",
        f"{result['counts']['trainable']:,}",
        size_text(result["memory"]["peak_bytes"]),
        f"{result['time']['train_s']:.1f} s",
        size_text(result["adapter_bytes"]),
    )


def _clear(folders: list[Path]) -> None:
    """Delete the runs of an earlier demo. Raises UserError, before anything is deleted, if a folder is no run."""
    there = [folder for folder in folders if folder.exists()]
    if foreign := [folder for folder in there if not (folder / "run.json").is_file()]:
        raise UserError(f"--out {foreign[0].parent}: {foreign[0]} is not a run of loralab; choose another folder")
    for folder in there:
        shutil.rmtree(folder)
