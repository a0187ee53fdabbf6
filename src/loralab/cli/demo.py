"""`loralab demo`: the main job on embedded defaults, for an encoder or a decoder."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loralab import models
from loralab.cli import base
from loralab.cli.show import Json, as_json, folder_size, pairs, table
from loralab.data import records
from loralab.disk import size_text
from loralab.errors import UserError
from loralab.objectives import generation
from loralab.run import Settings, setup, train, written
from loralab.run.bar import Bar, rows_bar

METHODS = ("full", "head", "lora")  # each at its default learning rate
GIVEN: dict[str, Any] = {"task": "minimal-pairs", "epochs": 5}
DECODER: dict[str, Any] = {  # few short steps; nothing is selected, so no row is held out for it
    "task": "records", "method": "lora", "lr": 2e-3, "batch_size": 4, "epochs": 1, "train_rows": 320,
    "validation_rows": 24, "max_length": 224, "selection": "last",
}  # fmt: skip
SHOWN = 3  # rows that are printed with their answers
DRAWN_WITH = ("matplotlib", "jinja2")
NO_REPORT = "none; it needs pip install 'loralab[report]'"
COLUMNS = ("method", "Matthews", "trainable", "peak memory", "training", "adapter on disk")


def demo(
    *,
    model: str | None = None,
    out: Path = Path("runs/demo"),
    seed: int = 0,
    decoder: bool = False,
    json: Json = False,
) -> None:
    """Fine-tune a small encoder on an embedded task: all of it, the head alone, and with LoRA. Write their report.

    This takes about two minutes on 2 cores.

    Parameters
    ----------
    model: str
        A local folder, a hub name, or an alias; by default minilm, which comes as a package and needs no network, and
        for a decoder smollm2.
    out: Path
        Folder for the runs and their report; an earlier demo there is replaced.
    seed: int
        Seed of all runs.
    decoder: bool
        Teach a small decoder to write JSON instead, and show its answers before and after.
    """
    if decoder:
        _decoder(Settings(**DECODER, model=model or "smollm2", seed=seed, out=out / "records"), json)
    else:
        _encoder(model or "minilm", out, seed, json)


def _encoder(model: str, out: Path, seed: int, json: bool) -> None:
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


# ---- the decoder -----------------------------------------------------------------------------------------------------


def _decoder(settings: Settings, json: bool) -> None:
    """Train on the records, and print how many answers are right before and after, and some of them."""
    models.resolve(settings.model)  # before anything is deleted
    _clear([settings.folder])
    result = train(settings, Bar())
    handle, tokenizer = base.load(settings.model, settings.folder / "adapter")
    task = setup.task_of(settings)
    split = setup.reported(task, settings)
    asked = written.questions(task, split, "json", len(split), handle.model, tokenizer, settings.max_length)
    who = {"base": None, settings.method: handle.names[0]}
    with rows_bar("answers", len(who) * len(asked)) as done:
        texts = {name: written.answers(handle, adapter, asked, tokenizer, done=done) for name, adapter in who.items()}
    right = {
        name: sum(generation.same_json(text, q.wanted) for text, q in zip(mine, asked, strict=True)) / len(asked)
        for name, mine in texts.items()
    }
    rows = [
        {"question": row[0][1].removeprefix(records.QUESTION), "right": row[1][1]}
        | {name: mine[i] for name, mine in texts.items()}
        for i, row in enumerate(split.texts[:SHOWN])
    ]
    if json:
        as_json({"right": right, "rows": len(asked), "train_s": result["time"]["train_s"], "answers": rows})
        return
    trained = f"{result['protocol']['train']} rows, {result['time']['train_s']:.0f} s"
    title = f"{task.name}: right of {len(asked)} new rows ({result['model']}, {settings.method} on {trained})"
    table(title, ("answers of", "right"), [(name, f"{share:.2f}") for name, share in right.items()])
    for row in rows:
        pairs("", row)
    print(f"run folder: {settings.folder}; try loralab generate --adapters {settings.folder / 'adapter'} --chat")
