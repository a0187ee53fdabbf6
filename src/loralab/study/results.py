"""What a study has found so far, and before it runs what it will do, as data for machines."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from loralab.run import Settings
from loralab.study.conduct import done
from loralab.study.definition import Definition
from loralab.study.estimate import estimate
from loralab.study.plan import points
from loralab.study.record import Key, Planned, Study, read_run
from loralab.study.statistics import comparisons, summaries


def as_data(study: Study) -> dict[str, Any]:
    """What --json prints and results.json holds; a number that is not known is null."""
    return {
        "name": study.name,
        "folder": str(study.folder),
        "cells": [_plain(dataclasses.asdict(row)) for row in summaries(study)],
        "comparisons": [_plain(dataclasses.asdict(row)) for row in comparisons(study)],
        "notes": list(study.notes),
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in row.items()}


def outline(definition: Definition, planned: Sequence[Planned]) -> dict[str, Any]:
    """What a dry run tells: runs by cell, how many are done, and a guess of time and memory."""
    store, usual = definition.store, _usual(definition)
    unique = list({p.address or id(p): p for p in planned}.values())
    left = [p for p in unique if not done(store, p)]
    guess = estimate([(p.key, usual[p.key]) for p in left], [run for p in unique if (run := read_run(store, p))])
    cells: dict[Key, dict[str, int]] = {}
    for p in planned:
        cell = cells.setdefault(p.key, {"tune": 0, "final": 0, "done": 0})
        cell[p.role] += 1
        cell["done"] += done(store, p)
    return {
        "name": definition.name,
        "runs": len(unique),
        "done": len(unique) - len(left),
        "shared": len(planned) - len(unique),
        "cells": [dict(zip(("task", "model", "method"), key, strict=True)) | cell for key, cell in cells.items()],
        "estimate": dataclasses.asdict(guess),
    }


def _usual(definition: Definition) -> dict[Key, Settings]:
    """The settings of each cell before tuning chose any."""
    seed = definition.seeds[0]
    return {p.key: definition.settings(p.task, p.model, p.method, seed, {}) for p in points(definition)}
