"""`loralab demo`: the main job on embedded defaults."""

import shutil
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from loralab.cli.show import as_json, folder_size, size, table
from loralab.errors import UserError
from loralab.train import Settings, train
from loralab.train.progress import Bar

RUNS: dict[str, dict[str, Any]] = {
    "full": {"epochs": 3},
    "head": {"epochs": 3},
    "lora": {"epochs": 4},
}  # method -> settings beside the defaults
COLUMNS = ("method", "Matthews", "learns", "peak memory", "training", "adapter on disk")


def demo(
    *,
    model: str = "minilm",
    out: Path = Path("runs/demo"),
    seed: int = 0,
    json: Annotated[bool, Parameter(negative="", help="Print the results as JSON.")] = False,
) -> None:
    """Fine-tune a real small encoder on an embedded task by full, head-only and LoRA fine-tuning; about two minutes.

    Parameters
    ----------
    model: str
        A local folder, a hub name, or an alias; minilm installs as a package and needs no network.
    out: Path
        Folder for the three runs; an earlier demo there is replaced.
    seed: int
        Seed of all three runs.
    """
    results: dict[str, Any] = {}
    for method, given in RUNS.items():
        folder = _fresh(out / method)
        results[method] = train(
            Settings(task="minimal-pairs", model=model, method=method, seed=seed, out=folder, **given), Bar()
        )
        results[method]["adapter_bytes"] = folder_size(folder / "adapter")
    if json:
        as_json(results)
        return
    first = results["lora"]
    title = f"minimal-pairs ({first['protocol']['train']} rows of train), {first['model']}, seed {seed}"
    table(title, COLUMNS, [row(result) for result in results.values()])
    print(f"Matthews correlation on the validation split, at the epoch a held-out tenth of train chose. Runs: {out}")


def row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["method"],
        f"{result['metric']['selected']:.3f}",
        f"{result['counts']['trainable']:,}",
        size(result["memory"]["peak_bytes"]),
        f"{result['time']['train_s']:.1f} s",
        size(result["adapter_bytes"]),
    )


def _fresh(folder: Path) -> Path:
    """The folder, rid of an earlier demo's run; nothing else is ever deleted."""
    if folder.exists():
        if not (folder / "run.json").is_file():
            raise UserError(f"--out {folder.parent}: {folder} is not a run of loralab; choose another folder")
        shutil.rmtree(folder)
    return folder
