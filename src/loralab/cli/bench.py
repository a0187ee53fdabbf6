"""`loralab bench`: speed and memory against PEFT, in one run."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from loralab.bench import Bench, Case, EpochCase, MixedCase, tables
from loralab.bench.cases import DTYPES, LAYERS, LENGTHS, RANKS, epochs, grid, growth, mixed_case
from loralab.bench.measure import quartiles
from loralab.cli import base
from loralab.cli.show import Json, as_json, table
from loralab.disk import check_output_folder, write_json, write_text
from loralab.errors import UserError
from loralab.fast.machine import fast_bfloat16
from loralab.run.bar import Plain

EPOCHS = 3  # repeats of --epoch at most: an epoch is long, and averages over hundreds of steps by itself
REPEATS, REPEATS_MIXED = 7, 15
LENGTH, LENGTH_MIXED = 64, 32  # tokens
READ_BY = {  # a measurement -> the flags that it alone reads
    "epoch": ("tasks", "data", "rows", "max_length", "together"), "cost": ("ranks", "layers"), "mixed": ("loaded",),
}  # fmt: skip
ONE = {  # a measurement -> the flags of which it takes one value
    "cost": ("models", "methods", "targets", "dtypes"),
    "mixed": ("models", "methods", "targets", "lengths", "dtypes"),
    "profile": ("models", "methods", "targets", "lengths", "dtypes"),
    "roofline": ("models", "methods", "targets", "lengths", "dtypes"),
}


def bench(
    *,
    models: tuple[str, ...] = ("minilm",),
    methods: tuple[str, ...] = ("lora", "dora", "full"),
    targets: tuple[str, ...] = ("all-linear",),
    lengths: tuple[int, ...] = (),
    dtypes: tuple[str, ...] = (),
    learns: Literal["classes", "tags", "text"] = "classes",
    allocator: Literal["equal", "own"] = "equal",
    batch_size: int = 32,
    repeats: int | None = None,
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
    mixed: bool = False,
    loaded: int = 1000,
    profile: bool = False,
    roofline: bool = False,
    out: Path = Path("runs/bench"),
    markdown: bool = False,
    json: Json = False,
) -> None:
    """Measure time and memory of training steps, PEFT and loralab in alternating turns, each in a process of its own.

    Writes bench.json, bench.md and pictures. What is measured and how: docs/benchmarks.md.

    Parameters
    ----------
    models: tuple
        Local folders, hub names, or aliases.
    methods: tuple
        Any of lora, dora, vera, lora-fa, qlora, full.
    targets: tuple
        Which layers are adapted: presets or regular expressions.
    lengths: tuple
        Tokens of a row; 64 by default, 16 to 256 with --cost, 32 with --mixed.
    dtypes: tuple
        bfloat16 (PEFT under autocast, as with Trainer's bf16=True) or float32; bfloat16 by default where this machine
        multiplies it fast.
    learns: Literal
        What a step learns: classes of rows, tags of tokens, or text (a decoder; PEFT with transformers' own loss).
    allocator: Literal
        equal: PEFT's process keeps freed memory for the next step, as loralab's does; own: it gives it back, as users
        have it who set nothing.
    batch_size: int
        Rows of a step; with --mixed also the number of adapters in a batch.
    repeats: int
        Turns of each side; 7 by default, 15 with --mixed, at most 3 with --epoch.
    threads: int
        Threads of each process; torch's own choice by default.
    epoch: bool
        Measure whole epochs of --tasks instead of steps, PEFT in Hugging Face's Trainer.
    tasks: tuple
        With --epoch: GLUE names, or minimal-pairs, which is embedded.
    data: Path
        With --epoch: folder with the GLUE tasks; without it they come from the hub.
    rows: int
        With --epoch: train on so many rows, drawn by the data's hash.
    max_length: int
        With --epoch: tokens at which a row is cut.
    together: tuple
        With --epoch: runs of loralab that share passes, as in a study; PEFT has one.
    cost: bool
        Measure how the cost of a step grows with rank, layers and length, for the first of --models, --methods,
        --targets and --dtypes.
    ranks: tuple
        With --cost: the ranks.
    layers: tuple
        With --cost: the numbers of encoder layers, counted from the first.
    mixed: bool
        Measure inference on a batch whose rows have an adapter each, for the first of --models, --methods, --targets,
        --lengths and --dtypes: against one merged adapter, and for lora against PEFT's adapter_names.
    loaded: int
        With --mixed: adapters in the largest case.
    profile: bool
        List the operations that take most of a step, for the first of --models, --methods, --targets, --lengths and
        --dtypes.
    roofline: bool
        Measure each product that a step needs by itself, and what they add up to beside the step, for the first of
        --models, --methods, --targets, --lengths and --dtypes.
    out: Path
        Folder to write; an earlier bench there is replaced.
    markdown: bool
        Print the tables as Markdown.
    """
    if not all((models, methods, targets, tasks, ranks, layers, together)):
        raise UserError("a flag that takes several values got none: give one or more")
    kinds = {"epoch": epoch, "cost": cost, "mixed": mixed, "profile": profile, "roofline": roofline}
    wanted = [name for name, on in kinds.items() if on]
    if len(wanted) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in wanted)} are different measurements: choose one")
    kind = wanted[0] if wanted else "steps"
    lists = {"models": models, "methods": methods, "targets": targets, "lengths": lengths, "dtypes": dtypes}
    others: dict[str, Any] = {"tasks": tasks, "data": data, "rows": rows, "max_length": max_length}
    others |= {"together": together, "ranks": ranks, "layers": layers, "loaded": loaded}
    sides: dict[str, Any] = {"learns": learns, "allocator": allocator}
    _check_idle(kind, lists, others | sides)
    chosen = dtypes or (DTYPES[0] if fast_bfloat16() else DTYPES[1],)
    default = LENGTH_MIXED if mixed else LENGTH
    cases = grid(models, methods, targets, lengths or (default,), chosen, batch_size, **sides)
    turns = (REPEATS_MIXED if mixed else REPEATS) if repeats is None else repeats
    run = Bench(min(turns, EPOCHS) if epoch else turns, threads)
    check_output_folder(out, lambda folder: (folder / "bench.json").is_file())
    out.mkdir(parents=True, exist_ok=True)
    if epoch:
        measured = _epochs(run, epochs(cases, tasks, data, rows, max_length, together))
    elif cost:
        measured = _growth(run, growth(cases[0], ranks, layers, lengths or LENGTHS))
    elif mixed:
        measured = _mixed(run, mixed_case(cases[0], loaded))
    elif profile:
        measured = _profile(run, cases[0])
    elif roofline:
        measured = _roofline(run, cases[0])
    else:
        measured = _steps(run, cases)
    rates = {dtype: asdict(quartiles(values)) for dtype, values in run.rates.items()}
    result = {"command": _command(), "repeats": run.repeats, **run.facts, "rates": rates, **measured}
    _write(result, out)
    if json:
        as_json(result)
    elif markdown:
        print(tables.markdown(result), end="")
    else:
        _show(result, out)


def _check_idle(kind: str, lists: dict[str, tuple[Any, ...]], others: dict[str, Any]) -> None:
    """Raise UserError for a flag that the measurement does not read, and for several values where it takes one."""
    defaults = {name: p.default for name, p in signature(bench).parameters.items()}
    given = {name: x != defaults[name] for name, x in (lists | others).items()}
    for owner, names in READ_BY.items():
        if owner != kind:
            base.check_idle({name: given[name] for name in names}, f"without --{owner}")
    base.check_idle(
        {"lengths": kind == "epoch" and given["lengths"]}, "with --epoch, whose rows have their own lengths"
    )
    base.check_idle({"learns": kind in ("epoch", "mixed") and given["learns"]}, f"with --{kind}, which has classes")
    shared = kind in ("mixed", "roofline") and given["allocator"]
    base.check_idle({"allocator": shared}, f"with --{kind}, which has one process")
    if wrong := [f"--{name}" for name in ONE.get(kind, ()) if given[name] and len(lists[name]) > 1]:
        raise UserError(f"--{kind} measures one case: give one value for {', '.join(wrong)}")


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


def _mixed(run: Bench, case: MixedCase) -> dict[str, Any]:
    with _bar(run, "mixed", 1):
        return {"mixed": run.mixed(case)}


def _profile(run: Bench, case: Case) -> dict[str, Any]:
    with _bar(run, "profile", 2):
        return {"profile": run.profile(case)}


def _roofline(run: Bench, case: Case) -> dict[str, Any]:
    with _bar(run, "roofline", 1):
        return {"roofline": run.roofline(case)}


@contextmanager
def _bar(run: Bench, title: str, turns: int) -> Iterator[None]:
    """A bar on stderr. It moves between turns only, so that drawing it takes no time from one."""
    console = Console(stderr=True, highlight=False)
    columns = (Plain(), BarColumn(), MofNCompleteColumn(), "turns, left", TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    task = bar.add_task(title, total=turns)

    def done() -> None:
        bar.advance(task)
        bar.refresh()

    if console.is_terminal:
        run.done = done
        bar.start()
        bar.refresh()
    try:
        yield
    finally:
        if console.is_terminal:
            bar.stop()


def _command() -> str:
    """The command line for a page, without paths of this machine."""
    words = sys.argv[1:] if sys.argv[1:2] == ["bench"] else ["bench"]
    return shlex.join(["loralab", *("DIR" if Path(word).is_absolute() else word for word in words)])


def _write(result: dict[str, Any], out: Path) -> None:
    write_json(out / "bench.json", result)
    write_text(out / "bench.md", tables.markdown(result))
    if find_spec("matplotlib"):
        from loralab.bench.plots import draw

        draw(result, out)


def _show(result: dict[str, Any], out: Path) -> None:
    for title, columns, rows, texts in tables.tables(result):
        table(title, columns, rows, texts)
        print()
    print(tables.note(result))
    print(tables.machine(result))
    drawn = "" if find_spec("matplotlib") else " (pictures need pip install 'loralab[report]')"
    print(f"written: {out}{drawn}")
