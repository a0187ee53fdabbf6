"""Which runs can share the passes of one loop.

They share a model, so all that the model itself is must be one: its weights and how they are kept, the precision, the
pieces that make it fast. What belongs to a row of the batch, or comes after it, may differ: method, rank, seed, task,
learning rate, epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loralab.methods import starts
from loralab.run.settings import Settings

MOST = 16  # runs over one model: a pass takes as many as its room lets in (see loop.py)
SMALL = 8  # ranks up to this go together; a larger one with its like, as short ones are padded with zeros to it


@dataclass(frozen=True)
class Group:
    """Runs over one model; `why` a run that cannot share is alone."""

    runs: tuple[Settings, ...]
    why: str | None = None


def grouped(many: Sequence[Settings], most: int = MOST) -> list[Group]:
    """The runs in groups of at most `most`, those of like data and seed together: their batches are the same."""
    shares: dict[Any, list[Settings]] = {}
    for s in many:
        if not alone(s):
            shares.setdefault(_base(s), []).append(s)
    groups = []
    for runs in shares.values():
        runs.sort(key=lambda s: (s.task, str(s.data), s.seed, s.batch_size))
        count = -(-len(runs) // most)
        places = [round(i * len(runs) / count) for i in range(count + 1)]  # groups of like size
        groups += [Group(tuple(runs[a:b])) for a, b in pairwise(places)]
    return [*groups, *(Group((s,), why) for s in many if (why := alone(s)))]


def alone(settings: Settings) -> str | None:
    """Why a run cannot share its passes, or None."""
    r = settings.recipe()
    if r.learn_base is not None:
        return f"{settings.method} trains the base itself"
    if r.factors is not None and not r.factors.low_rank:
        return f"{settings.method} adds no low-rank products, so its layers take the plain path"
    if r.dropout:
        return f"dropout={r.dropout} on the adapter's input has no stream of its own"
    if settings.speed != "auto":
        return f"speed is {settings.speed}"
    if settings.track:
        return f"{settings.track} tracks one run at a time"
    if r.store is not None and starts.looks_at_layer(r.start):
        return f"start {r.start} looks at the weight that {r.store} rounds away"
    return None


def _base(s: Settings) -> Any:
    """What must be the same."""
    r = s.recipe()
    rank = getattr(r.factors, "rank", 0) * (1 + bool(starts.added(r.start)))  # 0 where no layer is adapted
    like = rank and max(SMALL, 1 << (rank - 1).bit_length())
    return s.model, s.attention, s.precision, s.accumulate, s.threads, r.store, like
