"""What run.json and result.json say: all that a comparison must know about how a run was made and what it came to."""

import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import loralab
from loralab.data import Task, tables
from loralab.data.metrics import best
from loralab.fast.machine import hardware
from loralab.recipe import to_json
from loralab.run.settings import Settings
from loralab.run.setup import PreparedRun
from loralab.targets import meant_in_vain


def facts(run: PreparedRun) -> dict[str, Any]:
    """Return the content of run.json: everything needed to repeat the run, and what it ran on."""
    spec = run.adapters.spec(run.name)
    return {
        "settings": run.settings.to_json(),
        "recipe": to_json(spec.recipe),
        "plan": run.plan,
        "seed": run.settings.seed,
        "versions": {
            "loralab": loralab.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "hardware": hardware(run.settings.gpu),
        "precision": str(run.settings.precision).removeprefix("torch."),
        "data": {"sha256": run.task.sha256, "train": len(run.train), "held_out": len(run.held_out or ()),
                 **{key: len(rows) for key, rows in run.validation.items()}},
        "base_sha256": run.adapters.base_sha256,
        "counts": run.adapters.counts(run.name),
        "coverage": {key: len(paths) for key, paths in spec.coverage.matched.items()} if spec.coverage else {},
        "notes": list(run.notes),
    }  # fmt: skip


def skipped_rows(task: Task) -> str:
    """Return the rows that a run leaves out, as a CSV of file, row and reason; empty if there are none."""
    skipped = {} if task.reading is None else task.reading.skipped
    rows = [(str(path), row, why) for path, mine in skipped.items() for row, why in sorted(mine.items())]
    columns = dict(zip(("file", "row", "why"), map(list, zip(*rows, strict=True)), strict=False))
    return tables.render(columns, ".csv") if rows else ""


def result_of(
    run: PreparedRun,
    progress: Mapping[str, Any],
    memory: Mapping[str, Any],
    together: int,
    by_rank: Mapping[str, Any],
    endpoints: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of result.json.

    `progress` holds the fields of state.Progress, `together` is the number of runs over the same model, `by_rank` the
    metrics at each rank of a training for many ranks, `endpoints` what a comparison may look at beside the metrics.
    """
    s, history = run.settings, progress["history"]
    name = run.task.metrics[0]
    selected, scores = history[progress["best"]], [record["validation"].get(name) for record in history]
    every = None not in scores  # else the validation split was read once
    seconds = max(progress["seconds"], 1e-9)
    return {
        "task": run.task.name,
        "objective": run.task.objective,
        "labels": None if run.task.labels is None else list(run.task.labels),
        "model": Path(s.model).name,
        "method": s.method,
        "seed": s.seed,
        "metric": {
            "name": name,
            "selected": selected["validation"][name],
            "held_out": None if selected["held_out"] is None else selected["held_out"][name],
            "last": scores[-1],
            "best_on_validation": best(name, scores) if every else None,
        },
        "metrics": selected["validation"],
        "endpoints": dict(endpoints),
        "selected_epoch": selected["epoch"],
        **({"by_rank": dict(by_rank)} if by_rank else {}),
        "counts": run.adapters.counts(run.name),
        "time": {
            "train_s": progress["seconds"] + (run.plan or {}).get("seconds", 0.0),
            "examples_per_s": progress["rows"] / seconds,
            "tokens_per_s": progress["tokens"] / seconds,
            "together": together,  # if above 1: seconds are an equal share of the passes, memory is that of all
            **({} if run.plan is None else {"plan": run.plan}),  # its seconds are in train_s, its rows in no rate
        },
        "memory": dict(memory),
        "protocol": {
            "selection": s.selection,
            "optimistic": s.selection == "validation",
            "rows_held_out": s.held_out if s.selection == "held-out" else "none",
            "train": len(run.train),
            "held_out": len(run.held_out or ()),
            "start": "pretrained" if s.from_adapter is None else "adapter",
        },
        "notes": list(run.notes),
        "collapsed": selected["one_class"],
        "collapsed_held_out": selected.get("one_class_held_out"),
        "warnings": _warnings(run, selected),
    }


def lost_classes(result: Mapping[str, Any]) -> list[str]:
    """Warn of classes, types or labels that are found in no row, where the model tells others apart."""
    learned = result["learned"]
    lost = [] if result["collapsed"] else learned.get("lost", [])
    if not lost:
        return []
    rows = ", ".join(f"{name!r} ({learned['parts'][name].get('rows', learned['parts'][name].get('spans')):.0f})"
                     for name in lost[:10]) + ", ..." * (len(lost) > 10)  # fmt: skip
    balance = "--class-weights balanced, " if result["objective"] == "classification" else ""
    return [f"lost: {rows} of {learned['split']} are found in no row; try {balance}more rows of them, or more --epochs"]


def _advice(settings: Settings) -> str:
    """Say what to try where a run learned nothing."""
    usual = next(f.default for f in fields(Settings) if f.name == "targets")
    tries = ["another --lr (--tune tries several)", "more --epochs"]
    if settings.targets != usual and not settings.idle():
        tries.append(f"--targets {usual}")
    return f"{', '.join(tries[:-1])} or {tries[-1]}"


def _warnings(run: PreparedRun, selected: Mapping[str, Any]) -> list[str]:
    found, coverage, s = [], run.adapters.coverage(run.name), run.settings
    if coverage is not None and (in_vain := meant_in_vain(coverage, run.model, s.targets)) is not None:
        found.append(in_vain)
    if selected["one_class"]:
        found.append(
            f"every validation row is predicted the same at the selected epoch: {s.method} did not learn "
            f"{run.task.name}; try {_advice(s)}"
        )
    return found
