"""The model card of an adapter: README.md in its folder, which says all that another machine needs to use it."""

import json
from collections.abc import Mapping
from typing import Any

from loralab.model_card import cell, render
from loralab.model_names import how_to_get, hub_name, public_name
from loralab.objectives import Objective
from loralab.run.setup import PreparedRun


def card(run: PreparedRun, result: Mapping[str, Any]) -> str:
    """Return the text of a finished run's card."""
    s, task, counts = run.settings, run.task, result["counts"]
    base = public_name(s.model)
    about = f"A {task.objective} adapter ({s.method}) over {base}, trained with loralab."
    use = [
        "import loralab",
        f'answer = loralab.pipeline("path/to/this/folder")  # base: {base}',
        f"print(answer([{_example(run.objective, task.columns)}]))",
    ]
    facts = {
        "base": f"{base}, sha256 of its tensors {run.adapters.base_sha256}; {how_to_get(base)}",
        "input": f"columns {', '.join(task.columns)}" if task.columns else "texts",
        "longest row": f"{s.max_length} tokens; longer ones are cut",
        "labels": ", ".join(run.objective.names(task)[:40]) or "none",
        "data": f"sha256 {task.sha256}, {len(run.train)} rows to train on",
        "values that learn": f"{counts['adapter']:,} in the adapter, {counts['head']:,} in the head",
        "licence": s.licence or "not stated",
    }
    licence, measured = s.licence or "", _measured(run, result)
    return render(run.adapter_name, about, use, facts, hub_name(s.model), s.method, licence, measured)


def _measured(run: PreparedRun, result: Mapping[str, Any]) -> list[str]:
    """Lines of the metrics, overall and by class or type."""
    lines = [
        "",
        f"Measured on {_reported(run, result)}, seed {run.settings.seed}:",
        "",
        "| metric | value |",
        "| --- | ---: |",
    ]
    lines += [f"| {cell(name)} | {value:.4f} |" for name, value in result["metrics"].items()]
    parts = result["learned"].get("parts", {})
    if parts:
        heads = list(next(iter(parts.values())))
        lines += ["", f"| | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
        lines += [f"| {cell(name)} | {' | '.join(f'{row[h]:.4g}' for h in heads)} |" for name, row in parts.items()]
    return lines


def _reported(run: PreparedRun, result: Mapping[str, Any]) -> str:
    split = result["learned"]["split"]
    how = " (optimistic: the epoch was chosen on these rows)" if result["protocol"]["optimistic"] else ""
    return f"the {len(run.validation[split])} rows of {split}{how}"


def _example(objective: Objective, columns: tuple[str, ...]) -> str:
    """A row as the pipeline takes it, in Python."""
    if len(columns) == 2 and not objective.own_words:
        return "{" + ", ".join(f"{json.dumps(name)}: ..." for name in columns) + "}"
    return '"a text"'
