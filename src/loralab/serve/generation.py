"""Prompts in, written answers out: rows of different adapters, and of the base, over one model that writes.

Rows of adapters over the same base share batches. Rows that want the base itself run without an adapter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loralab import objectives
from loralab.cache import Scope, caching
from loralab.data import chats
from loralab.data.batches import Done, sorted_batches, unwatched
from loralab.errors import UserError
from loralab.objectives import generation, saved
from loralab.objectives.generation import Decoding
from loralab.objectives.saved import Saved
from loralab.serve.pool import AdapterFolder, LoadedAdapter, Pool
from loralab.serve.prompts import prompt_tokens, template_of

BASE = "base"  # what a row says for the base itself


class Request(NamedTuple):
    """A row to answer."""

    adapter: str  # its name, or BASE
    prompt: chats.Row  # a text, or a chat that ends with the user


@dataclass
class Generator:
    """Answers requests to any adapters. A request that cannot be answered gets a UserError in place of its answers."""

    pool: Pool
    tokenizer: Any
    adapters: Mapping[str, AdapterFolder]
    """What a request may name."""
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = 8
    rank: int | None = None
    """Rank to evaluate at, for adapters that were trained for many."""
    as_it_is: bool = False
    """Take texts as they are, without the chat template."""
    template: str | None = None
    """A chat template to use in place of the adapters' and the tokenizer's."""
    task_type: str = "CAUSAL_LM"
    """What the base does, in PEFT's words; or SEQ_2_SEQ_LM."""
    scope: Scope = field(default_factory=Scope)
    """Where the updates that adapters are lowered to are kept; only the pool changes its models."""

    @cached_property
    def known(self) -> dict[str, Saved | None]:
        """Name -> what that adapter was trained to do. The base is asked as the first adapter is."""
        found = {name: saved.read(folder.folder, self.task_type) for name, folder in self.adapters.items()}
        return {BASE: next(iter(found.values()), None), **found}

    @cached_property
    def ends(self) -> dict[str, tuple[int, ...]]:
        """Name -> the tokens that end its answers, besides those of the model."""
        return {name: () if known is None else known.ends(self.tokenizer) for name, known in self.known.items()}

    @cached_property
    def random(self) -> torch.Generator:
        """What sampled answers are drawn by; every call goes on with it."""
        return self.decoding.random()

    def fault(self, request: Request) -> str | None:
        """Say what is wrong with a request, as far as that is known without loading its adapter; None if nothing."""
        if request.adapter != BASE and request.adapter not in self.adapters:
            return f"no adapter {request.adapter!r}"
        known = self.known[request.adapter]
        if known is None:
            return None
        objective = objectives.OBJECTIVES[known.objective]
        if not objective.own_words:
            return f"adapter {request.adapter!r} is of {known.objective} and writes no texts: use loralab predict"
        if objective.task_type != self.task_type:
            return f"adapter {request.adapter!r} is of {known.objective}, which the base does not do"
        adapter = self.adapters.get(request.adapter)
        other = None if adapter is None else adapter.other_base(self.pool.base_sha256)
        return None if other is None else f"adapter {request.adapter!r} {other}"

    def answer(
        self, requests: Sequence[Request], streamer: Any = None, done: Done = unwatched
    ) -> list[list[str] | UserError]:
        """Return the answers to every request, in order; `streamer` is transformers', for one request.

        `done` is called with the number of rows of every batch that is answered.
        """
        found: list[Any] = [None] * len(requests)
        prompts: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            try:
                prompts[i] = self.tokens(request)
            except UserError as problem:
                found[i] = problem
        places = list(prompts)
        for batch in sorted_batches([len(prompts[i]) for i in places], self.batch_size) if places else ():
            mine = [places[j] for j in batch]
            for i, texts in self._batch(mine, requests, prompts, streamer):
                found[i] = texts
            done(len(mine))
        return found

    def tokens(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt. Raises UserError for one that cannot be answered."""
        if fault := self.fault(request):
            raise UserError(fault)
        return prompt_tokens(
            request.prompt,
            self.known[request.adapter],
            self.pool.any_model,
            self.tokenizer,
            self.decoding,
            self.template,
            self.as_it_is,
        )

    def shows_chats(self) -> bool:
        """Tell whether there is a chat template for every adapter and the base."""
        own = self.tokenizer.chat_template
        return all(template_of(known, self.template) or own for known in self.known.values())

    def _batch(
        self, mine: Sequence[int], requests: Sequence[Request], prompts: Mapping[int, list[int]], streamer: Any
    ) -> Iterator[tuple[int, Any]]:
        """Answer a batch: the rows of each base together, in as many parts as the budget for adapters asks for."""
        if rows := [i for i in mine if requests[i].adapter == BASE]:
            model = self.pool.plain
            texts = self._write(model, nullcontext(), [prompts[i] for i in rows], self.ends[BASE], streamer)
            yield from zip(rows, texts, strict=True)
        folders = {i: self.adapters[requests[i].adapter].folder for i in mine if requests[i].adapter != BASE}
        waiting = list(dict.fromkeys(folders.values()))
        while waiting:
            admitted, waiting, failed = self.pool.admit_all(waiting, self.rank)
            yield from ((i, failed[folder]) for i, folder in folders.items() if folder in failed)
            for kind in dict.fromkeys(adapter.kind for adapter in admitted.values()):
                whole = [i for i, folder in folders.items() if folder in admitted and admitted[folder].kind == kind]
                for rows in self._parts(whole, folders, requests):
                    used = self._use(kind, [admitted[folders[i]] for i in rows])
                    asked, ends = [prompts[i] for i in rows], self.ends[requests[rows[0]].adapter]
                    texts = self._write(self.pool.models[kind], used, asked, ends, streamer)
                    yield from zip(rows, texts, strict=True)

    def _parts(self, rows: list[int], folders: Mapping[int, Path], requests: Sequence[Request]) -> Iterable[list[int]]:
        """Divide rows that cannot share a batch: those with other end tokens, and with beams, which repeat the rows of
        a decoder alone, those of other adapters."""
        apart = self.decoding.copies > 1 and self.task_type != "CAUSAL_LM"
        parts: dict[Any, list[int]] = {}
        for i in rows:
            parts.setdefault((self.ends[requests[i].adapter], folders[i] if apart else None), []).append(i)
        return parts.values()

    def _use(self, kind: Any, adapters: Sequence[LoadedAdapter]) -> AbstractContextManager[Any]:
        """Use the adapter of each row; a row is repeated next to itself by beams and by answers, and so is its id."""
        handle, slots = self.pool.handle(kind), list(dict.fromkeys(adapter.slot for adapter in adapters))
        if len(slots) == 1:
            return handle.use(slots[0], rank=self.rank)
        ids = [slots.index(adapter.slot) for adapter in adapters for _ in range(self.decoding.copies)]
        return handle.use(slots, ids, self.rank)

    def _write(
        self,
        model: Any,
        used: AbstractContextManager[Any],
        asked: Sequence[list[int]],
        ends: Sequence[int],
        streamer: Any,
    ) -> list[list[str]]:
        with used, caching(self.scope):
            return generation.answers(model, self.tokenizer, asked, self.decoding, self.random, ends, streamer)
