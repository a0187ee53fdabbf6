"""What is live on a model, and `use`, which changes it for a while."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loralab.errors import UserError

if TYPE_CHECKING:
    from loralab.attach import Adapters


@dataclass(frozen=True)
class Stream:
    """The random numbers of one run, and how much of its equal part of a batch is its own and not padding."""

    generator: torch.Generator
    rows: int
    tokens: int


@dataclass
class Live:
    """What is live: no name means the base, one name every row, several names one per row through `ids` (rows,)."""

    names: tuple[str, ...] = ()
    ids: Tensor | None = None
    in_parts: bool = False  # the rows are in as many equal parts as there are names, in their order
    streams: tuple[Stream, ...] = ()  # of each name, where runs share a batch in equal parts; else torch's generator
    drawn: dict[str, Any] = field(default_factory=dict)  # adapter -> what its method drew for this training forward
    chosen: dict[str, Any] = field(default_factory=dict)  # adapter -> the rank to evaluate it at (see `Factors.at`)

    def check(self, rows: int) -> None:
        """Raises UserError for an input of another number of rows than `ids` name an adapter for."""
        if self.ids is not None and rows != len(self.ids):
            raise UserError(f"input of {rows} rows, but ids name an adapter for {len(self.ids)} rows")

    @contextmanager
    def changed(self, **given: Any) -> Iterator[None]:
        """Other values for a while."""
        before = dict(vars(self))
        vars(self).update(given)
        try:
            yield
        finally:
            vars(self).update(before)

    def only(self, place: int) -> AbstractContextManager[None]:
        """Makes the adapter at one place of the names the only one, for what sees its rows alone."""
        return self.changed(names=(self.names[place],), ids=None, streams=self.streams[place : place + 1])


@contextmanager
def use(
    handle: "Adapters", names: str | Sequence[str] | None, ids: Tensor | Sequence[int] | None, rank: int | None
) -> Iterator["Adapters"]:
    """See `Adapters.use`."""
    live, chosen = handle.live, () if names is None else (names,) if isinstance(names, str) else tuple(names)
    if unknown := [name for name in chosen if name not in handle.entries]:
        raise UserError(
            f"no adapter {', '.join(map(repr, unknown))} here: there are {', '.join(handle.names) or 'none'}"
        )
    if changed := [name for name, entry in handle.entries.items() if entry.base_names and chosen != (name,)]:
        raise UserError(f"adapter {changed[0]!r} trains the base in place, so there is no base beneath it to use")
    if (ids is None) != (len(chosen) < 2 and not isinstance(names, list | tuple)):
        raise UserError(f"use({names!r}, ids={ids!r}): a list of names goes with ids, a single name without")
    rows = None if ids is None else _rows(ids, len(chosen))
    in_parts = rows is not None and _in_parts(rows, len(chosen))
    ranked = {} if rank is None else {"chosen": {name: _at(handle, name, rank) for name in chosen}}
    with live.changed(names=chosen, ids=rows, in_parts=in_parts, streams=(), **ranked):
        yield handle


def _rows(ids: Tensor | Sequence[int], count: int) -> Tensor:
    """The place in the names of each row (rows,), on the CPU, where every layer reads it."""
    rows = torch.as_tensor(ids).cpu()
    if rows.ndim != 1 or len(rows) == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise UserError(f"ids: expected one whole number from 0 to {count - 1} per row, got {rows.tolist()}")
    return rows


def _in_parts(ids: Tensor, count: int) -> bool:
    return len(ids) % count == 0 and torch.equal(ids, torch.arange(count).repeat_interleave(len(ids) // count))


def _at(handle: "Adapters", name: str, rank: int) -> Any:
    factors = handle.entries[name].recipe.factors
    if factors is None:
        raise UserError(f"adapter {name!r} adapts no layer, so it has no rank")
    return factors.at(rank)
