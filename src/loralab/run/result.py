"""result.json: what a run came to, with all that a comparison must know about how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.run.setup import Run


def result_of(
    run: Run, progress: Mapping[str, Any], memory: Mapping[str, Any], together: int, by_rank: Mapping[str, Any]
) -> dict[str, Any]:
    """The result of a finished run; `progress` is that of its member, `together` the runs that shared its passes."""
    s, history = run.settings, progress["history"]
    name = run.task.metrics[0]
    selected, scores = history[progress["best"]], [record["validation"][name] for record in history]
    seconds = max(progress["seconds"], 1e-9)
    return {
        "task": run.task.name,
        "model": Path(s.model).name,
        "method": s.method,
        "seed": s.seed,
        "metric": {
            "name": name,
            "selected": selected["validation"][name],
            "last": scores[-1],
            "best_on_validation": max(scores),
        },
        "metrics": selected["validation"],
        "selected_epoch": selected["epoch"],
        **({"by_rank": dict(by_rank)} if by_rank else {}),  # one training for many ranks: the metrics at each
        "counts": run.adapters.counts(run.name),
        "time": {
            "train_s": progress["seconds"] + (run.plan or {}).get("seconds", 0.0),
            "examples_per_s": len(run.train) * progress["epoch"] / seconds,
            "tokens_per_s": progress["tokens"] / seconds,
            "together": together,  # more than 1: seconds are an equal part of the passes, and memory is that of all
            **({} if run.plan is None else {"plan": run.plan}),  # its seconds are in train_s, its rows in no rate
        },
        "memory": dict(memory),
        "protocol": {
            "selection": s.selection,
            "optimistic": s.selection == "validation",
            "train": len(run.train),
            "held_out": len(run.held_out or ()),
            "start": "pretrained",
        },
        "notes": list(run.notes),
        "warnings": _warnings(run, selected),
    }


def _warnings(run: Run, selected: Mapping[str, Any]) -> list[str]:
    if not selected["one_class"]:
        return []
    return [
        f"every validation row is predicted the same class at the selected epoch: {run.settings.method} did not learn "
        f"{run.task.name}; try another --lr, more --epochs, or --targets all-linear"
    ]
