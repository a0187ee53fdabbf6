"""Which runs share a model, which of them share a pass through it, and that pass.

What the model itself is must be the same for all runs over it: its weights and how they are stored, the precision, the
fast pieces. What belongs to a row of the batch, or comes after the model, may differ: method, rank, seed, task,
learning rate, epochs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from loralab.active import Stream
from loralab.adapters import Adapters
from loralab.data.batches import Rows, collate_together, width
from loralab.methods import starts
from loralab.objectives import by_row
from loralab.run.room import ON_GPU, PASS_BYTES
from loralab.run.settings import Settings
from loralab.run.setup import objective_of
from loralab.run.state import RunState

MOST = 16  # runs over one model; how many share a pass depends on PASS_BYTES
SMALL = 8  # ranks up to this share a model; a larger one only with its like, because shorter factors are zero-padded
EVALUATED = 8  # runs that are evaluated in one pass


# ---- a model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs over one model; `why` says why a run cannot share one."""

    runs: tuple[Settings, ...]
    why: str | None = None


def grouped(many: Sequence[Settings], most: int = MOST) -> list[Group]:
    """Divide runs into groups of at most `most`. Those with the same data and seed, and so the same batches, meet."""
    shares: dict[Any, list[Settings]] = {}
    for s in many:
        if not alone(s):
            shares.setdefault(_base(s), []).append(s)
    groups = []
    for runs in shares.values():
        runs.sort(key=lambda s: (s.task, str(s.data), s.seed, s.batch_size))
        count = -(-len(runs) // most)
        places = [round(i * len(runs) / count) for i in range(count + 1)]  # groups of nearly equal size
        groups += [Group(tuple(runs[a:b])) for a, b in pairwise(places)]
    return [*groups, *(Group((s,), why) for s in many if (why := alone(s)))]


def alone(settings: Settings) -> str | None:
    """Return why a run cannot share a model, or None if it can."""
    r = settings.recipe()
    if r.learn_base is not None:
        return f"{settings.method} trains the base itself"
    if r.factors is not None and not r.factors.low_rank:
        return f"{settings.method} adds no low-rank products, so its layers take the plain path"
    if r.dropout:
        return f"dropout={r.dropout} on the adapter's input has no stream of its own"
    if settings.checkpointing:
        return "its activations are recomputed, which only the plain path does"
    if settings.pack:
        return "its rows are packed"
    if settings.speed != "auto":
        return f"speed is {settings.speed}"
    if settings.track:
        return f"{settings.track} tracks one run at a time"
    if r.store is not None and starts.looks_at_layer(r.start):
        return f"start {r.start} looks at the weight that {r.store} rounds away"
    return None


def _base(s: Settings) -> Any:
    """Return what must be equal for runs to share a model."""
    r = s.recipe()
    rank = getattr(r.factors, "rank", 0) * (1 + bool(starts.added(r.start)))  # 0 where no layer is adapted
    like = rank and max(SMALL, 1 << (rank - 1).bit_length())
    objective = objective_of(s)
    kind = objective.task_type, objective.forward
    return s.model, kind, s.attention, s.precision, s.gpu, s.accumulate, s.threads, r.store, like


# ---- a pass ----------------------------------------------------------------------------------------------------------


def passes(states: Sequence[RunState], chosen: Sequence[list[int]], device: str = "cpu") -> list[list[int]]:
    """Divide runs, by their places, into passes of similar width that take at most PASS_BYTES of a device.

    `chosen` holds each run's rows of this step. A run is alone in its first step, in which its memory is counted.
    """
    sizes = [(len(rows), width(state.run.train, rows)) for state, rows in zip(states, chosen, strict=True)]
    most = PASS_BYTES.get(device, ON_GPU)
    groups: list[list[int]] = []
    largest = 0.0  # bytes of the largest part of the last pass; 0 if no other run may join it
    for i in sorted(range(len(states)), key=lambda i: sizes[i][::-1]):
        progress = states[i].progress
        needed = math.prod(sizes[i]) * progress.bytes_per_token
        if progress.step == 0 or not largest or (len(groups[-1]) + 1) * max(largest, needed) > most:
            groups.append([])
            largest = 0.0
        groups[-1].append(i)
        largest = 0.0 if progress.step == 0 else max(largest, needed)
    return groups


def with_same_rows(states: Sequence[RunState]) -> Iterator[list[RunState]]:
    """Yield the runs that are evaluated on the same rows, at most EVALUATED at a time."""
    same: dict[Any, list[RunState]] = {}
    for state in states:
        rows = [state.run.held_out, *state.run.validation.values()]
        same.setdefault((*map(id, rows), state.settings.batch_size), []).append(state)
    for runs in same.values():
        yield from (runs[i : i + EVALUATED] for i in range(0, len(runs), EVALUATED))


Outputs = tuple[Tensor, Tensor]  # of a run's rows: outputs (rows, ...), and the labels that its loss is of


def forward(
    model: nn.Module,
    adapters: Adapters,
    states: Sequence[RunState],
    parts: Sequence[tuple[Rows, list[int]]],
    device: torch.device,
) -> list[Outputs]:
    """Return for each run the outputs of its rows and their labels, from one forward pass of the model."""
    batch, sizes = collate_together(parts, states[0].run.tokenizer, device)  # (K b, t), and each run's own (b, t)
    names, b = [state.run.name for state in states], len(batch["input_ids"]) // len(states)
    ids = torch.arange(len(states)).repeat_interleave(b)  # (K b,)
    streams = tuple(Stream(s.generator, *size) for s, size in zip(states, sizes, strict=True))
    in_use = adapters.use(names, ids) if len(states) > 1 else adapters.use(names[0])
    with in_use, adapters.active.changed(streams=streams):
        outputs = model(batch)  # (K b, ...): of a head those of the widest head
    if "rows" in batch:  # packed, so of one run
        return [(outputs, parts[0][0].labels[parts[0][1]].to(device))]
    of_tokens = batch["labels"].split(b) if "labels" in batch else [None] * len(states)
    return [
        _of_run(state, out, labels, *part)
        for state, out, labels, part in zip(states, outputs.split(b), of_tokens, parts, strict=True)
    ]


def _of_run(state: RunState, outputs: Tensor, labels: Tensor | None, rows: Rows, chosen: list[int]) -> Outputs:
    """Return the outputs (b, ...) of a run without what other runs' widths added, sequences of a row together."""
    width = state.run.objective.outputs(state.run.task)
    own = by_row(outputs[: len(chosen) * rows.sequences], len(chosen), width)
    return own, rows.labels[chosen].to(own.device) if labels is None else labels[: len(own)]
