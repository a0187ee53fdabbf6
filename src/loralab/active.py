"""Which adapter every row of a batch uses, and how that is changed for a while."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loralab.errors import UserError


@dataclass(frozen=True)
class Stream:
    """The random numbers of one run, and how much of its equal part of a batch is its own and not padding."""

    generator: torch.Generator
    rows: int
    tokens: int


@dataclass
class Active:
    """The adapters in use: no name means the base, one name every row, several names one per row through `ids`."""

    names: tuple[str, ...] = ()
    ids: Tensor | None = None  # (rows,) index into names
    equal_parts: bool = False  # the rows are in as many equal parts as there are names, in their order
    streams: tuple[Stream, ...] = ()  # one per name where runs share a batch in equal parts; else torch's generator
    drawn: dict[str, Any] = field(default_factory=dict)  # adapter -> what its method drew for this training forward
    chosen: dict[str, Any] = field(default_factory=dict)  # adapter -> the rank to evaluate it at (see `Factors.at`)

    def check(self, rows: int) -> None:
        """Raise UserError if the input has another number of rows than `ids` name an adapter for."""
        if self.ids is not None and rows != len(self.ids):
            raise UserError(f"input of {rows} rows, but ids name an adapter for {len(self.ids)} rows")

    @contextmanager
    def changed(self, **values: Any) -> Iterator[None]:
        """Set these fields inside the block; restore all fields afterwards."""
        before = dict(vars(self))
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    def only(self, place: int) -> AbstractContextManager[None]:
        """Activate the adapter at one place of the names alone, for a module that sees its rows alone."""
        return self.changed(names=(self.names[place],), ids=None, streams=self.streams[place : place + 1])


def row_ids(ids: Tensor | Sequence[int], count: int) -> Tensor:
    """The index of each row's adapter (rows,), on the CPU, where every layer reads it.

    Raises UserError unless `ids` holds one whole number from 0 to count - 1 per row.
    """
    rows = torch.as_tensor(ids).cpu()
    if rows.ndim != 1 or len(rows) == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise UserError(f"ids: expected one whole number from 0 to {count - 1} per row, got {rows.tolist()}")
    return rows


def in_equal_parts(ids: Tensor, count: int) -> bool:
    """Whether the rows are `count` equal blocks, block i of adapter i."""
    return len(ids) % count == 0 and torch.equal(ids, torch.arange(count).repeat_interleave(len(ids) // count))
