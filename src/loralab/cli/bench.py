"""`loralab bench`: speed and memory against PEFT, in one run."""

import json as encoder
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loralab.bench import Bench, Case, EpochCase, told
from loralab.bench.cases import DTYPES, LAYERS, LENGTHS, RANKS, epochs, grid, growth
from loralab.bench.spread import spread
from loralab.cli.show import Json, as_json, table
from loralab.errors import UserError
from loralab.fast.machine import fast_bfloat16

EPOCHS = 3  # of each side at most: an epoch is long, and averages over hundreds of steps by itself


def bench(
    *,
    models: tuple[str, ...] = ("minilm",),
    methods: tuple[str, ...] = ("lora", "dora", "full"),
    targets: tuple[str, ...] = ("all-linear",),
    lengths: tuple[int, ...] = (),
    dtypes: tuple[str, ...] = (),
    batch_size: int = 32,
    repeats: int = 7,
    threads: int | None = None,
    epoch: bool = False,
    tasks: tuple[str, ...] = ("cola", "mrpc"),
    data: Path | None = None,
    rows: int | None = None,
    max_length: int = 128,
    together: tuple[int, ...] = (1,),
    cost: bool = False,
    ranks: tuple[int, ...] = RANKS,
    layers: tuple[int, ...] = LAYERS,
    out: Path = Path("runs/bench"),
    markdown: bool = False,
    json: Json = False,
) -> None:
    """Time and memory of training steps, PEFT and loralab turn and turn about, each in a process of its own.

    Writes bench.json, bench.md and pictures. What is measured and how: docs/benchmarks.md.

    Parameters
    ----------
    models: tuple
        Local folders, hub names, or aliases.
    methods: tuple
        Of lora, dora, vera, lora-fa, qlora, full.
    targets: tuple
        Which layers are adapted: presets or regular expressions.
    lengths: tuple
        Tokens of a row: 64 by default, with --cost 16 to 256.
    dtypes: tuple
        bfloat16 (PEFT under autocast, as Trainer's bf16=True), float32; by default bfloat16 where it is fast here.
    batch_size: int
        Rows of a step.
    repeats: int
        Turns of each side; with --epoch at most 3.
    threads: int
        Threads of each side; torch's own choice by default.
    epoch: bool
        Whole epochs of --tasks end to end instead of steps, PEFT in Hugging Face's Trainer.
    tasks: tuple
        GLUE names, or minimal-pairs, which is embedded.
    data: Path
        Folder with the GLUE tasks; without it the hub's.
    rows: int
        With --epoch: only so many training rows.
    max_length: int
        With --epoch: tokens at which a row is cut.
    together: tuple
        With --epoch: runs of loralab that share passes, as in a study; PEFT has one.
    cost: bool
        How a step's cost grows with rank, layers and length, for the first of models, methods, targets and dtypes.
    ranks: tuple
        With --cost.
    layers: tuple
        With --cost: the encoder's first so many.
    out: Path
        Folder to write; an earlier bench there is replaced.
    markdown: bool
        Print the tables as Markdown.
    """
    if not all((models, methods, targets, tasks, ranks, layers)):
        raise UserError("a flag that names several things got none: give one or more")
    if epoch and cost:
        raise UserError("--epoch and --cost are two benches: choose one")
    chosen = dtypes or (DTYPES[0] if fast_bfloat16() else DTYPES[1],)
    cases = grid(models, methods, targets, lengths or (64,), chosen, batch_size)
    run = Bench(min(repeats, EPOCHS) if epoch else repeats, threads)
    _folder(out)
    if epoch:
        measured = _epochs(run, epochs(cases, tasks, data, rows, max_length, together))
    elif cost:
        measured = _growth(run, growth(cases[0], ranks, layers, lengths or LENGTHS))
    else:
        measured = _steps(run, cases)
    rates = {dtype: asdict(spread(values)) for dtype, values in run.rates.items()}
    result = {"command": _command(), "repeats": run.repeats, **run.facts, "rates": rates, **measured}
    _write(result, out)
    if json:
        as_json(result)
    elif markdown:
        print(told.markdown(result), end="")
    else:
        _show(result, out)


def _steps(run: Bench, cases: list[Case]) -> dict[str, Any]:
    with _bar(run, "steps", len(cases) * run.repeats):
        return {"steps": run.steps(cases)}


def _epochs(run: Bench, cases: list[EpochCase]) -> dict[str, Any]:
    with _bar(run, "epochs", 2 * len(cases) * run.repeats):
        return {"epochs": run.epochs(cases)}


def _growth(run: Bench, axes: dict[str, list[Case]]) -> dict[str, Any]:
    """Each axis; a case that lies on two of them is measured once."""
    cases = list(dict.fromkeys(case for grown in axes.values() for case in grown))
    with _bar(run, "cost", len(cases) * run.repeats):
        found = dict(zip(cases, run.steps(cases), strict=True))
    return {"growth": {axis: [found[case] for case in grown] for axis, grown in axes.items()}}


@contextmanager
def _bar(run: Bench, what: str, turns: int) -> Iterator[None]:
    """A bar on stderr, which moves between turns only, so that drawing it takes no part of one."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("turns, left"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, auto_refresh=False)
    counted = bar.add_task(what, total=turns)

    def done() -> None:
        bar.advance(counted)
        bar.refresh()

    if console.is_terminal:
        run.done = done
        bar.start()
        bar.refresh()
    try:
        yield
    finally:
        bar.stop()


def _folder(out: Path) -> None:
    """Made before minutes of measuring; nothing but an earlier bench is written over."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "bench.json").is_file():
        raise UserError(f"--out {out} holds something else than a bench: choose another folder")
    out.mkdir(parents=True, exist_ok=True)


def _command() -> str:
    """What was typed, for a page, without places on this machine."""
    words = sys.argv[1:] if sys.argv[1:2] == ["bench"] else ["bench"]
    return shlex.join(["loralab", *("DIR" if Path(word).is_absolute() else word for word in words)])


def _write(result: dict[str, Any], out: Path) -> None:
    (out / "bench.json").write_text(encoder.dumps(result, indent=1) + "\n")
    (out / "bench.md").write_text(told.markdown(result))
    if find_spec("matplotlib"):
        from loralab.bench.draw import draw

        draw(result, out)


def _show(result: dict[str, Any], out: Path) -> None:
    for title, columns, rows, texts in told.tables(result):
        table(title, columns, rows, texts)
        print()
    print(told.note(result))
    print(told.machine(result))
    drawn = "" if find_spec("matplotlib") else " (pictures need pip install 'loralab[report]')"
    print(f"written: {out}{drawn}")
