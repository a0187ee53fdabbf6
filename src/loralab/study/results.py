"""The results of a study so far, and before it runs its outline, as data for machines."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from loralab.run import Settings
from loralab.study.definition import Definition
from loralab.study.estimate import estimate
from loralab.study.power import power
from loralab.study.record import Key, ScheduledRun, Study, done, read_run
from loralab.study.schedule import cells
from loralab.study.statistics import PlannedFamily, comparisons, planned, summaries


def as_data(study: Study) -> dict[str, Any]:
    """What --json prints and results.json holds; a number that is not known is null."""
    return {
        "name": study.name,
        "folder": str(study.folder),
        "cells": [_plain(dataclasses.asdict(row)) for row in summaries(study)],
        "comparisons": [_plain(dataclasses.asdict(row)) for row in comparisons(study)],
        "planned_contrasts": [_family(family) for family in planned(study)],
        "question": study.question,
        "notes": list(study.notes),
    }


def _family(family: PlannedFamily) -> dict[str, Any]:
    of_each = (family.seeds, family.errors_of_seeds, family.collapsed, family.margins, family.rows)
    contrasts = [
        _plain(dataclasses.asdict(c) | {"error_of_seeds": of_seeds})
        | {"seeds": seeds, "collapsed": lost, "margin": margin, "rows": rows}
        for c, seeds, of_seeds, lost, margin, rows in zip(family.contrasts, *of_each, strict=True)
    ]
    whose = {"name": family.name, "model": family.model, "endpoint": family.endpoint, "tasks": list(family.tasks)}
    return whose | {"contrasts": contrasts}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}


def outline(definition: Definition, scheduled: Sequence[ScheduledRun]) -> dict[str, Any]:
    """What a dry run prints: runs by cell, how many are done, and an estimate of time and memory."""
    store, usual = definition.store, _usual(definition)
    unique = list({s.address or id(s): s for s in scheduled}.values())
    left = [s for s in unique if not done(store, s)]
    finished = [run for s in unique if (run := read_run(store, s))]
    rows: dict[Key, dict[str, int]] = {}
    for s in scheduled:
        row = rows.setdefault(s.key, {"tune": 0, "final": 0, "done": 0})
        row[s.role] += 1
        row["done"] += done(store, s)
    return {
        "name": definition.name,
        "runs": len(unique),
        "done": len(unique) - len(left),
        "shared": len(scheduled) - len(unique),
        "cells": [dict(zip(("task", "model", "method"), key, strict=True)) | row for key, row in rows.items()],
        "power": [dataclasses.asdict(found) for found in power(definition, finished)],
        "estimate": dataclasses.asdict(estimate([(s.key, usual[s.key]) for s in left], finished)),
    }


def _usual(definition: Definition) -> dict[Key, Settings]:
    """The settings of each cell before tuning chose any."""
    seed = definition.seeds[0]
    return {c.key: definition.settings(c.task, c.model, c.method, seed, {}) for c in cells(definition)}
