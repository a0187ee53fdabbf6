"""Rows in, answers out: full batches of one adapter go alone, what is left of every adapter goes mixed, by length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralab.data import Split
from loralab.data.batches import Rows, collate, encode, longest, sorted_batches
from loralab.errors import UserError
from loralab.serve.folders import Known
from loralab.serve.pool import Loaded, Pool


class Row(NamedTuple):
    adapter: str
    texts: tuple[Any, ...]  # one or two


class Answer(NamedTuple):
    label: str | float  # a number from a regression
    probabilities: dict[str, float] | None  # by label; None from a regression


@dataclass
class Predictor:
    """Answers rows of any adapters; it never raises for a row, but gives a UserError in place of its answer."""

    pool: Pool
    tokenizer: Any
    adapters: Mapping[str, Known]
    """What a row may name."""
    batch_size: int = 32
    rank: int | None = None
    """Rank to evaluate at, for adapters that were trained for many."""
    max_length: int | None = None
    """Tokens after which a row is cut; None means as many as the base takes."""

    def fault(self, row: Row) -> str | None:
        """What is wrong with a row, as far as can be told without loading its adapter."""
        said = []
        known = self.adapters.get(row.adapter)
        if known is None:
            said.append(f"no adapter {row.adapter!r}")
        elif not row.texts:
            said.append("no text")
        elif known.sha256 not in (None, self.pool.base_sha256):
            here = self.pool.base_sha256[:12]
            said.append(f"adapter {row.adapter!r} is of another base ({known.base}, {known.sha256[:12]}; here {here})")
        if not all(isinstance(text, str) and text.strip() for text in row.texts):
            said.append("no text")
        return "; ".join(said) or None

    @torch.no_grad()
    def answer(self, rows: Sequence[Row]) -> list[Answer | UserError]:
        faults = [self.fault(row) for row in rows]
        out: list[Any] = [None if fault is None else UserError(fault) for fault in faults]
        good = [i for i, fault in enumerate(faults) if fault is None]
        if good:
            tokens = self._encoded([rows[i] for i in good])
            places = [self.adapters[rows[i].adapter].folder for i in good]
            for batch in self._batches(tokens, places):
                for j, answer in self._answered(batch, tokens, places):
                    out[good[j]] = answer
        return out

    def _encoded(self, rows: Sequence[Row]) -> Rows:
        """Rows of one text and of two, in the order given."""
        limits = [n for n in (self.max_length, longest(self.pool.any_model)) if n is not None]
        columns: dict[str, list[Any]] = {}
        width = min(limits, default=512)
        for count in sorted({len(row.texts) for row in rows}):
            mine = [i for i, row in enumerate(rows) if len(row.texts) == count]
            part = encode(Split([rows[i].texts for i in mine], [0] * len(mine)), self.tokenizer, width, False)
            for key, column in part.columns.items():
                whole = columns.setdefault(key, [None] * len(rows))
                for i, value in zip(mine, column, strict=True):
                    whole[i] = value
        return Rows(columns, torch.zeros(len(rows)), 0, width)

    def _batches(self, tokens: Rows, places: Sequence[Path]) -> Iterator[list[int]]:
        by_place: dict[Path, list[int]] = {}
        for j, place in enumerate(places):
            by_place.setdefault(place, []).append(j)
        left: list[int] = []
        for mine in by_place.values():
            for batch in sorted_batches(tokens.lengths[mine], self.batch_size):
                chosen = [mine[k] for k in batch]
                if len(batch) == self.batch_size:
                    yield chosen
                else:
                    left += chosen
        for batch in sorted_batches(tokens.lengths[left], self.batch_size) if left else ():
            yield sorted((left[k] for k in batch), key=lambda j: str(places[j]))

    def _answered(self, batch: list[int], tokens: Rows, places: Sequence[Path]) -> Iterator[tuple[int, Any]]:
        """The answers of a batch, in as many parts as the memory for adapters asks for."""
        waiting = list(dict.fromkeys(places[j] for j in batch))
        while waiting:
            there, waiting, failed = self._admitted(waiting)
            yield from ((j, failed[places[j]]) for j in batch if places[j] in failed)
            for kind in dict.fromkeys(adapter.kind for adapter in there.values()):
                mine = [j for j in batch if places[j] in there and there[places[j]].kind == kind]
                yield from zip(mine, self._forward(mine, tokens, [there[places[j]] for j in mine]), strict=True)

    def _admitted(self, wanted: Sequence[Path]) -> tuple[dict[Path, Loaded], list[Path], dict[Path, UserError]]:
        """What of the wanted is loaded together, what has to wait, and what cannot be used."""
        there: dict[Path, Loaded] = {}
        failed: dict[Path, UserError] = {}
        for at, place in enumerate(wanted):
            try:
                found = self.pool.admit(place, there)
                if found is None:
                    return there, list(wanted[at:]), failed
                with self.pool.handle(found.kind).use(found.slot, rank=self.rank):  # refuses a rank it does not have
                    there[place] = found
            except UserError as error:
                failed[place] = error
        return there, [], failed

    def _forward(self, mine: Sequence[int], tokens: Rows, adapters: Sequence[Loaded]) -> Iterator[Answer]:
        handle = self.pool.handle(adapters[0].kind)
        slots = list(dict.fromkeys(adapter.slot for adapter in adapters))
        ids = [slots.index(adapter.slot) for adapter in adapters]
        live = handle.use(slots[0], rank=self.rank) if len(slots) == 1 else handle.use(slots, ids, self.rank)
        device = next(handle.model.parameters()).device
        with live:
            logits = handle.model(**collate(tokens, mine, self.tokenizer, device)).logits.float().cpu()
        for row, adapter in zip(logits, adapters, strict=True):
            yield said(row[: len(adapter.labels)], adapter.labels)


def said(logits: Tensor, labels: Sequence[str]) -> Answer:
    """The answer that the logits (labels,) of a row are; one label alone is a score."""
    if len(labels) == 1:
        return Answer(float(logits[0]), None)
    shares = logits.softmax(-1).tolist()
    return Answer(labels[int(logits.argmax())], dict(zip(labels, shares, strict=True)))
