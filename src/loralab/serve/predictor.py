"""Requests in, answers out: full batches of one adapter run alone, the rest of all adapters runs mixed, by length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loralab import models
from loralab.cache import Scope
from loralab.data.batches import (
    Done,
    Rows,
    check_vocabulary,
    collate,
    cut_at,
    sorted_batches,
    tokenized,
    unwatched,
)
from loralab.data.checks import BadRows, texts
from loralab.errors import UserError
from loralab.objectives import classification
from loralab.serve.loading import present, shared, torch_device
from loralab.serve.pool import AdapterFolder, LoadedAdapter, Pool, adapter_folders


class Request(NamedTuple):
    """A row to answer."""

    adapter: str
    texts: tuple[Any, ...]  # one or two


class Answer(NamedTuple):
    """What an adapter says of a row."""

    label: str | float  # a number from a regression
    probabilities: dict[str, float] | None  # by label; None from a regression


@dataclass
class Predictor:
    """Answers requests to any adapters. It never raises for a request, but gives a UserError in place of its answer."""

    pool: Pool
    tokenizer: Any
    adapters: Mapping[str, AdapterFolder]
    """What a request may name."""
    batch_size: int = 32
    rank: int | None = None
    """Rank to evaluate at, for adapters that were trained for many."""
    max_length: int | None = None
    """Tokens after which a text is cut, in place of those of each adapter's training."""
    scope: Scope = field(default_factory=Scope)
    """Where the updates that adapters are lowered to are kept; only the pool changes its models."""

    @classmethod
    def open(
        cls,
        adapters: Mapping[str, AdapterFolder] | Sequence[str | Path],
        model: str | None = None,
        memory: int | None = None,
        batch_size: int = 32,
        rank: int | None = None,
        max_length: int | None = None,
        device: str = "auto",
    ) -> "Predictor":
        """Make a predictor of classifiers, from adapter folders over one base, NAME=FOLDER, or `adapter_folders`.

        `model` is the base, by default the one the folders name; `memory` the most bytes that loaded adapters may take,
        `device` torch's, by default a GPU if there is one.
        Raises UserError for folders of another kind of task, and where no base is known or can be had.
        """
        found = adapters if isinstance(adapters, Mapping) else adapter_folders([str(entry) for entry in adapters])
        if others := sorted({folder.objective for folder in found.values()} - {"classification"}):
            raise UserError(f"adapters of {', '.join(others)} answer one at a time: open each with loralab.pipeline")
        name, place = shared(model, found.values()), torch_device(device)
        present(name, found.values())
        first, tokenizer = models.classifier(name, 2, False, torch.float32, seed=0)
        spare: list[Any] = [first]

        def new_base() -> Any:
            plain = spare.pop() if spare else models.classifier(name, 2, False, torch.float32, seed=0)[0]
            return plain.to(place)

        return cls(Pool(new_base, memory), tokenizer, found, batch_size, rank, max_length)

    def fault(self, request: Request) -> str | None:
        """Say what is wrong with a request, as far as that is known without loading its adapter; None if nothing."""
        faults = []
        adapter = self.adapters.get(request.adapter)
        if adapter is None:
            faults.append(f"no adapter {request.adapter!r}")
        elif not request.texts:
            faults.append("no text")
        elif len(request.texts) > 2:
            faults.append(f"{len(request.texts)} texts: give one or two")
        elif other := adapter.other_base(self.pool.base_sha256):
            faults.append(f"adapter {request.adapter!r} {other}")
        elif lack := classification.OBJECTIVE.lacking(request.texts, adapter.text):
            faults.append(f"texts: {lack}")
        faults += [fault] if (fault := _text_fault(request.texts)) else []
        return "; ".join(dict.fromkeys(faults)) or None

    @torch.no_grad()
    def answer(self, requests: Sequence[Request], done: Done = unwatched) -> list[Answer | UserError]:
        """Answer every request, in order; `done` is called with the number of rows of every batch that is answered."""
        faults = [self.fault(request) for request in requests]
        answers: list[Any] = [None if fault is None else UserError(fault) for fault in faults]
        good = [i for i, fault in enumerate(faults) if fault is None]
        tokens = self._encoded(requests, good)
        try:
            check_vocabulary("the input", tokens, good, self.pool.any_model)
        except BadRows as bad:
            for i, fault in bad.rows.items():
                answers[i] = UserError(fault)
            good = [i for i in good if i not in bad.rows]
            tokens = self._encoded(requests, good)
        if good:
            folders = [self.adapters[requests[i].adapter].folder for i in good]
            for batch in self._batches(tokens, folders):
                for j, answer in self._answered(batch, tokens, folders):
                    answers[good[j]] = answer
                done(len(batch))
        return answers

    def _encoded(self, given: Sequence[Request], good: Sequence[int]) -> Rows:
        """Tokenize the good ones of the requests given, in their order; each is cut where its adapter learned."""
        requests = [given[i]._replace(texts=texts(*given[i].texts)) for i in good]
        columns: dict[str, list[Any]] = {"input_ids": [None] * len(requests)}
        kinds = [(len(request.texts), self._most(request)) for request in requests]
        for kind in sorted(set(kinds)):
            mine = [i for i, other in enumerate(kinds) if other == kind]
            made, _ = tokenized([requests[i].texts for i in mine], self.tokenizer, kind[1])
            for key, column in made.items():
                whole = columns.setdefault(key, [None] * len(requests))
                for i, value in zip(mine, column, strict=True):
                    whole[i] = value
        return Rows(columns, torch.zeros(len(requests)), (), max((most for _, most in kinds), default=0))

    def _most(self, request: Request) -> int:
        """Return the tokens after which a request is cut."""
        return cut_at(self.max_length or self.adapters[request.adapter].max_length, self.pool.any_model)

    def _batches(self, tokens: Rows, folders: Sequence[Path]) -> Iterator[list[int]]:
        by_folder: dict[Path, list[int]] = {}
        for j, folder in enumerate(folders):
            by_folder.setdefault(folder, []).append(j)
        rest: list[int] = []
        for mine in by_folder.values():
            for batch in sorted_batches(tokens.lengths[mine], self.batch_size):
                chosen = [mine[k] for k in batch]
                if len(batch) == self.batch_size:
                    yield chosen
                else:
                    rest += chosen
        for batch in sorted_batches(tokens.lengths[rest], self.batch_size) if rest else ():
            yield sorted((rest[k] for k in batch), key=lambda j: str(folders[j]))

    def _answered(self, batch: list[int], tokens: Rows, folders: Sequence[Path]) -> Iterator[tuple[int, Any]]:
        """Answer a batch, in as many parts as the budget for adapters asks for."""
        waiting = list(dict.fromkeys(folders[j] for j in batch))
        while waiting:
            admitted, waiting, failed = self.pool.admit_all(waiting, self.rank)
            yield from ((j, failed[folders[j]]) for j in batch if folders[j] in failed)
            for kind in dict.fromkeys(adapter.kind for adapter in admitted.values()):
                mine = [j for j in batch if folders[j] in admitted and admitted[folders[j]].kind == kind]
                yield from zip(mine, self._forward(mine, tokens, [admitted[folders[j]] for j in mine]), strict=True)

    def _forward(self, mine: Sequence[int], tokens: Rows, adapters: Sequence[LoadedAdapter]) -> Iterator[Answer]:
        handle = self.pool.handle(adapters[0].kind)
        slots = list(dict.fromkeys(adapter.slot for adapter in adapters))
        ids = [slots.index(adapter.slot) for adapter in adapters]
        in_use = handle.use(slots[0], rank=self.rank) if len(slots) == 1 else handle.use(slots, ids, self.rank)
        device = next(handle.model.parameters()).device
        batch = collate(tokens, mine, self.tokenizer, device)
        with in_use, handle.caching(self.scope):
            logits = handle.model(**batch).logits.float().cpu()  # (rows, labels)
        for row, adapter in zip(logits, adapters, strict=True):
            yield to_answer(row[: len(adapter.labels)], adapter.labels)


def _text_fault(cells: tuple[Any, ...]) -> str | None:
    if not cells:
        return None
    if all(text is None or (isinstance(text, str) and not text.strip()) for text in cells):
        return "no text"
    try:
        texts(*cells)
    except ValueError as fault:
        return f"text has {fault}"
    return None


def to_answer(logits: Tensor, labels: Sequence[str]) -> Answer:
    """Return the answer that the logits (labels,) of a row are; one label alone is a score."""
    if len(labels) == 1:
        return Answer(float(logits[0]), None)
    return Answer(labels[int(logits.argmax())], classification.shares(labels, logits.numpy()))
