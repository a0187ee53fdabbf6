"""`loralab.pipeline`: an adapter folder as a function from rows to answers, whatever it was trained to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loralab import adapters, objectives
from loralab.adapters import Adapters
from loralab.data import chats
from loralab.data.batches import Done, unwatched
from loralab.data.reading import counted
from loralab.errors import UserError, hint
from loralab.objectives import generation, saved
from loralab.objectives.classification import SCORE
from loralab.objectives.generation import Decoding
from loralab.objectives.objective import WRITTEN
from loralab.objectives.saved import Saved
from loralab.serve.answers import answer_rows
from loralab.serve.loading import model_of, on_base
from loralab.serve.prompts import prompt_tokens


@dataclass
class Pipeline:
    """Answers rows with one adapter, in batches."""

    folder: Path
    adapters: Adapters
    tokenizer: Any
    known: Saved
    """What the adapter was trained to do: kind of task, columns, labels, length."""
    batch_size: int = 32
    rank: int | None = None
    """Rank to evaluate at, for an adapter that was trained for many."""
    max_length: int | None = None
    """Tokens after which a row is cut, in place of those of its training."""
    decoding: Decoding = field(default_factory=Decoding)
    """How texts are written, for an adapter that writes."""

    @cached_property
    def random(self) -> torch.Generator:
        """What sampled answers are drawn by; every call goes on with it."""
        return self.decoding.random()

    def __call__(self, rows: Any) -> Any:
        """Answer rows: a list of answers, in order; of one row alone, which is no list, its answer.

        A row is a text, a tuple of the cells of the columns that the adapter learned from, or a dict with these.
        An answer is a dict with the columns that `loralab predict` writes.
        Raises UserError that names the rows that cannot be answered.
        """
        one = isinstance(rows, str | tuple | Mapping)
        found = self.answers([self._cells(row) for row in ([rows] if one else rows)])
        faults: dict[str, list[int]] = {}
        for row, answer in enumerate(found, 1):
            if isinstance(answer, UserError):
                faults.setdefault(str(answer), []).append(row)
        if faults:
            raise UserError("; ".join(f"{what} in {counted(places)}" for what, places in faults.items()))
        return found[0] if one else found

    def answers(self, cells: Sequence[tuple[Any, ...]], done: Done = unwatched) -> list[dict[str, Any] | UserError]:
        """Answer rows given as the cells of the columns; a UserError for a row that cannot be answered.

        `done` is called with the number of rows of every batch that is answered.
        """
        with self.adapters.use(self.adapters.names[0], rank=self.rank):
            return self._written(cells, done) if self.known.writes else self._answered(cells, done)

    def _cells(self, row: Any) -> tuple[Any, ...]:
        if not isinstance(row, Mapping):
            return row if isinstance(row, tuple) else (row,)
        form = chats.asks(self.known.columns)
        columns = form.columns if self.known.writes else self.known.columns or ["text"]
        if absent := [name for name in columns if name not in row]:
            raise UserError(f"a row without {', '.join(absent)}: the adapter learned from {', '.join(columns)}")
        more = [name for name in form.optional if name in row] if self.known.writes else []
        return tuple(row[name] for name in (*columns, *more))

    def _answered(self, cells: Sequence[tuple[Any, ...]], done: Done) -> list[dict[str, Any] | UserError]:
        return answer_rows(self.adapters, self.known, cells, self.tokenizer, self.max_length, self.batch_size, done)

    def _written(self, cells: Sequence[tuple[Any, ...]], done: Done) -> list[dict[str, Any] | UserError]:
        """Let the model write an answer to each prompt."""
        found: list[Any] = [None] * len(cells)
        prompts: dict[int, list[int]] = {}
        for i, cell in enumerate(cells):
            try:
                prompts[i] = self._prompt(cell)
            except (UserError, ValueError) as fault:
                found[i] = fault if isinstance(fault, UserError) else UserError(str(fault))
        with self.adapters.caching():
            model, asked, ends = self.adapters.model, list(prompts.values()), self.known.ends(self.tokenizer)
            how = (self.decoding, self.batch_size, self.random, ends, done)
            texts = generation.in_batches(model, self.tokenizer, asked, *how)
        for i, (text, *_) in zip(prompts, texts, strict=True):
            found[i] = {WRITTEN: text}
        return found

    def _prompt(self, cells: tuple[Any, ...]) -> list[int]:
        """Return the tokens of a prompt: of a text, or of the cells of the columns that wait for an answer."""
        form = chats.asks(self.known.columns)
        if not 1 <= len(cells) <= len(form.columns) + len(form.optional):
            raise ValueError("other columns than it was trained on")
        make = chats.prompt if len(cells) == 1 and isinstance(cells[0], str) else form.row
        return prompt_tokens(make(*cells), self.known, self.adapters.model, self.tokenizer, self.decoding)


def pipeline(
    adapter: Path | str,
    model: str | None = None,
    *,
    batch_size: int = 32,
    rank: int | None = None,
    max_length: int | None = None,
    device: str | None = None,
    **decoding: Any,
) -> Pipeline:
    """Open an adapter folder: `loralab.pipeline("runs/reviews/adapter")(["a text", "another"])`.

    Base, tokenizer, labels, columns and length are those that the folder names; `model` names another place of the
    base. `device` is torch's, by default a GPU if there is one. `decoding` are settings of an adapter that writes, as
    max_new_tokens=50. Raises UserError for a folder, or a base, that does not fit or is not there.
    """
    names = [entry.name for entry in fields(Decoding)]
    if unknown := [name for name in decoding if name not in names]:
        meant = hint(unknown[0], names)
        raise UserError(f"no setting {unknown[0]!r}{meant}: a pipeline of texts takes {', '.join(names)}")
    folder = Path(adapter)
    file = adapters.read(folder)
    known = saved.read(folder, file.base.get("task_type"))
    if known.labels is None and file.labels and tuple(file.labels) != SCORE:
        known = replace(known, labels=list(file.labels))
    if decoding and not known.writes:
        raise UserError(f"{', '.join(decoding)} would do nothing: the adapter writes no texts, leave it out")
    whole = objectives.OBJECTIVES[known.objective].new_head
    name = model_of(model, folder, file)
    handle, tokenizer = on_base(name, file, folder, whole=whole, device=device or "auto")
    handle.model.eval()
    return Pipeline(folder, handle, tokenizer, known, batch_size, rank, max_length, Decoding(**decoding))
