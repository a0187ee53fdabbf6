"""Run an adapter of any objective over rows: what `loralab evaluate` scores and `loralab predict` answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loralab import objectives
from loralab.adapters import Adapters
from loralab.data import Split, Task
from loralab.data.batches import Done, Rows, check_vocabulary, collate, cut_at, sorted_batches, unwatched
from loralab.errors import UserError
from loralab.objectives import Array, Encoding, by_row, ragged
from loralab.objectives.saved import Saved


@torch.no_grad()
def predictions(
    adapters: Adapters,
    task: Task,
    split: Split,
    tokenizer: Any,
    max_length: int,
    batch_size: int = 32,
    done: Done = unwatched,
) -> tuple[Array, Rows]:
    """Return what the active adapter predicts of the rows of a split (rows, ...), and these rows as tokens.

    `done` is called with the number of rows of every batch that is answered. Raises UserError.
    """
    objective = objectives.of(task)
    rows = objective.encode(task, split, tokenizer, Encoding(max_length, train=False))
    check_vocabulary(task.name, rows, split.rows, adapters.model)
    device = next(adapters.model.parameters()).device
    parts, order = [], []
    width = objective.outputs(task)
    with adapters.caching():
        for chosen in sorted_batches(rows.lengths, batch_size):
            batch = collate(rows, chosen, tokenizer, device)
            outputs = by_row(objective.forward(adapters.model, batch), len(chosen), width)
            labels = batch.get("labels", rows.labels[chosen].to(device))
            parts.append(objective.predict(outputs, labels).float().cpu().numpy())
            order += chosen
            done(len(chosen))
    return ragged(parts)[np.argsort(order)], rows


def answer_rows(
    adapters: Adapters,
    known: Saved,
    cells: Sequence[tuple[Any, ...]],
    tokenizer: Any,
    max_length: int | None = None,
    batch_size: int = 32,
    done: Done = unwatched,
) -> list[dict[str, Any] | UserError]:
    """Return what the active adapter answers to each row, by column; a UserError for a row that cannot be answered.

    Rows are cut after `max_length` tokens, by default where those of the adapter's training were. `done` is as above.
    """
    objective = objectives.OBJECTIVES[known.objective]
    if objective.answer is None or known.writes:
        raise ValueError(f"{known.objective} writes its answers: loralab.objectives.generation")
    found: list[Any] = [None] * len(cells)
    rows, labels, places = [], [], []
    for i, cell in enumerate(cells):
        if lack := objective.lacking(cell, known.columns):
            found[i] = UserError(f"cells of a row: {lack}; give a tuple of them, or a dict")
            continue
        try:
            row, label = objective.ask(*cell)
        except (ValueError, TypeError) as fault:
            found[i] = UserError(
                str(fault) if isinstance(fault, ValueError) else "other columns than it was trained on"
            )
            continue
        rows.append(row)
        labels.append(label)
        places.append(i)
    if rows:
        split = Split(rows, labels)
        task = known.of(split)
        most = cut_at(max_length or known.max_length, adapters.model)
        made, _ = predictions(adapters, task, split, tokenizer, most, batch_size, done)
        for i, row, prediction in zip(places, rows, made, strict=True):
            found[i] = objective.answer(task, row, prediction)
    return found
