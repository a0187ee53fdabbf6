"""Prompts in, written answers out: rows of different adapters, and of the base, over one decoder.

Rows of adapters over the same base share batches. Rows that want the base itself run without an adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from loralab.cache import Scope, caching
from loralab.data import chats
from loralab.data.batches import sorted_batches
from loralab.errors import UserError
from loralab.objectives import generation, saved
from loralab.objectives.generation import Decoding
from loralab.objectives.saved import Saved
from loralab.serve.pool import AdapterFolder, LoadedAdapter, Pool

BASE = "base"  # what a row says for the base itself

TEXTS = (["prompt"], ["prompt", "completion"], ["text"])  # columns of a training on texts as they are


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
    scope: Scope = field(default_factory=Scope)
    """Where the updates that adapters are lowered to are kept; only the pool changes its models."""

    @cached_property
    def known(self) -> dict[str, Saved | None]:
        """Name -> what that adapter was trained to do. The base is asked as the first adapter is."""
        found = {name: saved.read(folder.folder, "CAUSAL_LM") for name, folder in self.adapters.items()}
        return {BASE: next(iter(found.values()), None), **found}

    def fault(self, request: Request) -> str | None:
        """Say what is wrong with a request, as far as that is known without loading its adapter; None if nothing."""
        if request.adapter != BASE and request.adapter not in self.adapters:
            return f"no adapter {request.adapter!r}"
        known = self.known[request.adapter]
        if known is not None and known.objective != "causal":
            return f"adapter {request.adapter!r} is of {known.objective} and writes no texts: use loralab predict"
        adapter = self.adapters.get(request.adapter)
        if adapter is not None and adapter.sha256 not in (None, self.pool.base_sha256):
            here = f"the sha256 of this one begins {self.pool.base_sha256[:12]}"
            return f"adapter {request.adapter!r} was trained on another base ({here}); {adapter.wanted}"
        return None

    def answer(self, requests: Sequence[Request], streamer: Any = None) -> list[list[str] | UserError]:
        """Return the answers to every request, in order; `streamer` is transformers', for one request."""
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
        return found

    def tokens(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt. Raises UserError for one that cannot be answered."""
        if fault := self.fault(request):
            raise UserError(fault)
        known = self.known[request.adapter]
        asked = self._asked(request.prompt, known)
        ids = generation.prompt_ids(asked, self.tokenizer, self._template(known))
        generation.check_length(ids, self.pool.any_model, self.decoding)
        return ids

    def _asked(self, prompt: chats.Row, known: Saved | None) -> chats.Row:
        """Return a text as a turn of the user, unless its adapter was trained on texts as they are."""
        on_texts = known is not None and known.columns in TEXTS
        plain = self.as_it_is or on_texts or (self._template(known) or self.tokenizer.chat_template) is None
        return prompt if plain or chats.is_chat(prompt) else (("user", prompt[0]),)

    def _template(self, known: Saved | None) -> str | None:
        return self.template or (None if known is None else known.options.get("template"))

    def shows_chats(self) -> bool:
        """Tell whether there is a chat template for every adapter and the base."""
        return all(self._template(known) or self.tokenizer.chat_template for known in self.known.values())

    def _batch(
        self, mine: Sequence[int], requests: Sequence[Request], prompts: Mapping[int, list[int]], streamer: Any
    ) -> Iterator[tuple[int, Any]]:
        """Answer a batch: the rows of each base together, in as many parts as the budget for adapters asks for."""
        if rows := [i for i in mine if requests[i].adapter == BASE]:
            model = self.pool.plain
            yield from zip(rows, self._write(model, nullcontext(), rows, prompts, streamer), strict=True)
        folders = {i: self.adapters[requests[i].adapter].folder for i in mine if requests[i].adapter != BASE}
        waiting = list(dict.fromkeys(folders.values()))
        while waiting:
            admitted, waiting, failed = self.pool.admit_all(waiting, self.rank)
            yield from ((i, failed[folder]) for i, folder in folders.items() if folder in failed)
            for kind in dict.fromkeys(adapter.kind for adapter in admitted.values()):
                rows = [i for i, folder in folders.items() if folder in admitted and admitted[folder].kind == kind]
                used = self._use(kind, [admitted[folders[i]] for i in rows])
                texts = self._write(self.pool.models[kind], used, rows, prompts, streamer)
                yield from zip(rows, texts, strict=True)

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
        rows: Sequence[int],
        prompts: Mapping[int, list[int]],
        streamer: Any,
    ) -> list[list[str]]:
        with used, caching(self.scope):
            return generation.answers(model, self.tokenizer, [prompts[i] for i in rows], self.decoding, streamer)
