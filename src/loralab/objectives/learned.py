"""What a model learned: by class or type, the confusion of classes, calibration, and the rows it gets most wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralab import objectives
from loralab.data import Split, Task
from loralab.data.batches import Rows
from loralab.objectives.objective import Array

BINS = 10  # of the probabilities of answers
MOST_CLASSES = 40  # whose confusion is written down
WORST = 50  # rows that are listed


def learned(task: Task, predictions: Array, labels: Array) -> dict[str, Any]:
    """Return `parts`, `confusion`, `calibration` and `lost`, each where the objective has it.

    Predictions (rows, ...) and labels (rows, ...) are those that metrics are computed from.
    """
    objective = objectives.of(task)
    found: dict[str, Any] = {}
    parts = objective.parts(task, predictions, labels)
    counts, sure = objective.confusion(task, predictions, labels), objective.sure(task, predictions, labels)
    if parts:
        found["parts"] = parts
        found["lost"] = lost(parts)
    if counts is not None and len(counts) <= MOST_CLASSES:
        found["confusion"] = {"labels": list(task.labels or ()), "counts": counts.tolist()}
    if sure is not None:
        found["calibration"] = calibration(*sure)
    return found


def lost(parts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the classes, types or labels that are there and are found in no row: recall 0."""
    return [name for name, row in parts.items() if row["recall"] == 0 and row.get("rows", row.get("spans", 0)) > 0]


def calibration(chances: Array, right: Array) -> dict[str, Any]:
    """Return the expected calibration error, and a bin for each tenth of the probabilities (answers,) that has answers.

    The error is the mean distance of a bin's probability from its share of right answers (Guo et al., 2017).
    """
    places = np.minimum((chances * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for place in np.unique(places):
        mine = places == place
        said, true = float(chances[mine].mean()), float(right[mine].mean())
        bins.append({"from": place / BINS, "answers": int(mine.sum()), "probability": said, "right": true})
        error += mine.mean() * abs(said - true)
    return {"error": float(error), "bins": bins}


def worst(task: Task, split: Split, rows: Rows, predictions: Array, most: int = WORST) -> dict[str, list[Any]] | None:
    """Return the rows of a split that are most wrong, as columns: row number, texts, label, answer, and how wrong.

    `rows` are those of the split as tokens. None where an objective cannot tell.
    """
    objective = objectives.of(task)
    how = objective.wrong(task, predictions, rows.labels.numpy())
    if how is None:
        return None
    places = rows.kept or range(len(split))  # of each prediction in the split
    order = [i for i in np.argsort(-how, kind="stable")[:most] if how[i] > 0]
    chosen = [places[i] for i in order]
    told = [
        objective.told(task, split.texts[p], split.labels[p], predictions[i])
        for i, p in zip(order, chosen, strict=True)
    ]
    return {
        "row": [split.rows[place] for place in chosen],
        **_texts(task.columns, [split.texts[place] for place in chosen]),
        "right": [right for right, _ in told],
        "answered": [answer for _, answer in told],
        "how_wrong": [round(float(how[i]), 4) for i in order],
    }


def _texts(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[str]]:
    """The texts of rows: a column each where the columns of the file are known, else one."""
    taken = {"row", "right", "answered", "how_wrong"}
    if rows and all(len(row) == len(names) for row in rows) and not taken & {*names}:
        return {name: [str(row[i]) for row in rows] for i, name in enumerate(names)}
    return {"text": [" | ".join(map(str, row)) for row in rows]}
