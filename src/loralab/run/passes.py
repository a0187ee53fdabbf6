"""Passes: which runs go through the model in one forward, and that forward."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.active import Stream
from loralab.adapters import Adapters
from loralab.data.batches import Rows, collate_together, width
from loralab.run.state import Member

ROOM = 400e6  # bytes of activations of a pass that runs share; more gains no time (docs/benchmarks.md)
EVALUATED = 8  # runs that predict in one pass


def passes(going: Sequence[Member], chosen: Sequence[list[int]]) -> list[list[int]]:
    """The places of members in passes: of like width, as many as ROOM takes, and each alone in its first step, where
    what it keeps is counted."""
    sizes = [(len(rows), width(m.run.train, rows)) for m, rows in zip(going, chosen, strict=True)]
    found: list[list[int]] = []
    wide = 0.0  # bytes of the widest part of the last pass; 0 if no other run may join it
    for i in sorted(range(len(going)), key=lambda i: sizes[i][::-1]):
        progress = going[i].progress
        room = math.prod(sizes[i]) * progress.room
        if progress.step == 0 or not wide or (len(found[-1]) + 1) * max(wide, room) > ROOM:
            found.append([])
            wide = 0.0
        found[-1].append(i)
        wide = 0.0 if progress.step == 0 else max(wide, room)
    return found


def forward(
    model: nn.Module,
    adapters: Adapters,
    members: Sequence[Member],
    parts: Sequence[tuple[Rows, list[int]]],
    device: torch.device,
) -> list[Tensor]:
    """The logits (rows, outputs) of the rows of each member, from one forward of the model."""
    batch, sizes = collate_together(parts, members[0].run.tokenizer, device)  # (K b, t), and the own (b, t) of each
    names, b = [member.run.name for member in members], len(batch["input_ids"]) // len(members)
    ids = torch.arange(len(members)).repeat_interleave(b)
    with adapters.use(names, ids) if len(members) > 1 else adapters.use(names[0]):
        adapters.active.streams = tuple(Stream(m.generator, *size) for m, size in zip(members, sizes, strict=True))
        logits = model(**batch).logits.float()  # (K b, widest)
    return [out[:rows] for out, (rows, _) in zip(logits.split(b), sizes, strict=True)]


def of_like_rows(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members with the same rows to predict, a few at a time."""
    like: dict[Any, list[Member]] = {}
    for m in members:
        rows = [m.run.held_out, *m.run.validation.values()]
        like.setdefault((*map(id, rows), m.settings.batch_size), []).append(m)
    for same in like.values():
        yield from (same[i : i + EVALUATED] for i in range(0, len(same), EVALUATED))
