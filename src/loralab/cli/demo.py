"""`loralab demo`: the main job on embedded defaults."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loralab.cli.show import Json, as_json, folder_size, size, table
from loralab.errors import UserError
from loralab.run import Settings, train
from loralab.run.bar import Bar

METHODS = ("full", "head", "lora")  # each at its default learning rate
GIVEN: dict[str, Any] = {"task": "minimal-pairs", "epochs": 5}
DRAWN_WITH = ("matplotlib", "jinja2")
NO_REPORT = "none, as it needs pip install 'loralab[report]'"
COLUMNS = ("method", "Matthews", "learns", "peak memory", "training", "adapter on disk")


def demo(*, model: str = "minilm", out: Path = Path("runs/demo"), seed: int = 0, json: Json = False) -> None:
    """Fine-tune a real small encoder on an embedded task by full, head-only and LoRA fine-tuning; write their report.

    On 2 cores that is about two minutes.

    Parameters
    ----------
    model: str
        A local folder, a hub name, or an alias; minilm installs as a package and needs no network.
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
    print("Matthews: on the validation split, at the epoch that the held-out rows chose")
    print(f"run folders: {', '.join(str(run.folder) for run in runs)}")
    print(f"report: {page or NO_REPORT}")


def _report(out: Path) -> Path | None:
    """The page of the runs; None where what draws it is not installed, which is no reason to lose the runs."""
    if not all(find_spec(name) for name in DRAWN_WITH):
        return None
    from loralab.report import write

    return write(out)


def row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["method"],
        f"{result['metric']['selected']:.3f}",
        f"{result['counts']['trainable']:,}",
        size(result["memory"]["peak_bytes"]),
        f"{result['time']['train_s']:.1f} s",
        size(result["adapter_bytes"]),
    )


def _clear(folders: list[Path]) -> None:
    """Takes an earlier demo's runs away, once all of them are known to be runs; nothing else is ever deleted."""
    there = [folder for folder in folders if folder.exists()]
    if strange := [folder for folder in there if not (folder / "run.json").is_file()]:
        raise UserError(f"--out {strange[0].parent}: {strange[0]} is not a run of loralab; choose another folder")
    for folder in there:
        shutil.rmtree(folder)
