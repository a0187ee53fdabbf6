"""The model card of an adapter: README.md in its folder, which says all that another machine needs to use it."""

import json
from collections.abc import Mapping
from typing import Any

from loralab.model_names import how_to_get, public_name
from loralab.objectives import Objective
from loralab.run.setup import PreparedRun

FILE = "README.md"


def card(run: PreparedRun, result: Mapping[str, Any]) -> str:
    """Return the text of a finished run's card."""
    s, task, counts = run.settings, run.task, result["counts"]
    base = public_name(s.model)
    front = {
        "library_name": "loralab",
        "base_model": base,
        "license": s.licence or "unknown",
        "tags": ["lora", s.method],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [
        f"# {run.adapter_name}",
        "",
        f"A {task.objective} adapter ({s.method}) over {base}, trained with loralab.",
        "",
    ]
    lines += ["```python", "import loralab", f'answer = loralab.pipeline("path/to/this/folder")  # base: {base}']
    lines += [f"print(answer([{_example(run.objective, task.columns)}]))", "```", ""]
    lines += ["| what | is |", "| --- | --- |"]
    facts = {
        "base": f"{base}, sha256 of its tensors {run.adapters.base_sha256}; {how_to_get(base)}",
        "input": f"columns {', '.join(task.columns)}" if task.columns else "texts",
        "longest row": f"{s.max_length} tokens; longer ones are cut",
        "labels": ", ".join(run.objective.names(task)[:40]) or "none",
        "data": f"sha256 {task.sha256}, {len(run.train)} rows to train on",
        "values that learn": f"{counts['adapter']:,} in the adapter, {counts['head']:,} in the head",
        "licence": s.licence or "not stated",
    }
    lines += [f"| {key} | {_cell(text)} |" for key, text in facts.items()]
    lines += ["", f"Measured on {_reported(run, result)}, seed {s.seed}:", "", "| metric | value |", "| --- | ---: |"]
    lines += [f"| {_cell(name)} | {value:.4f} |" for name, value in result["metrics"].items()]
    parts = result["learned"].get("parts", {})
    if parts:
        heads = list(next(iter(parts.values())))
        lines += ["", f"| | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
        lines += [f"| {_cell(name)} | {' | '.join(f'{row[h]:.4g}' for h in heads)} |" for name, row in parts.items()]
    return "\n".join(lines) + "\n"


def _reported(run: PreparedRun, result: Mapping[str, Any]) -> str:
    split = result["learned"]["split"]
    how = " (optimistic: the epoch was chosen on these rows)" if result["protocol"]["optimistic"] else ""
    return f"the {len(run.validation[split])} rows of {split}{how}"


def _example(objective: Objective, columns: tuple[str, ...]) -> str:
    """A row as the pipeline takes it, in Python."""
    if len(columns) == 2 and objective.answer is not None:
        return "{" + ", ".join(f"{json.dumps(name)}: ..." for name in columns) + "}"
    return '"a text"'


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
