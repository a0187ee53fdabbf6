"""Rows as token ids, and batches of rows of similar length, so that little of a batch is padding."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.data.checks import BadRows
from loralab.data.reading import counted
from loralab.errors import UserError
from loralab.inputs import IGNORED

POOL = 50  # batches whose rows are sorted by length together: more give less padding and less chance
SPARE = 8  # rows that a table of positions may have above max_position_embeddings
LONGEST = 512  # tokens of a row where neither the user nor the model says


@dataclass(frozen=True)
class Rows:
    """Tokenized rows. A row is one sequence of tokens, or `sequences` of them: the choices of a question, say."""

    columns: dict[str, list[list[int]]]  # of each sequence: input_ids, attention_mask, ...; `labels` of its tokens
    labels: Tensor  # (rows, ...): int64 for classes, float32 for regression; what predictions are compared with
    uncut: Sequence[int]  # tokens of each sequence before any was cut; a row that was dropped counts too
    max_length: int  # tokens
    sequences: int = 1  # of a row, one after another in `columns`
    weights: Tensor | None = None  # (rows,) what a row counts in the loss, as its learned tokens; None: each row 1
    notes: tuple[str, ...] = ()  # what the user should know of how the rows were made
    packed: bool = False  # whether a batch has several rows in one sequence
    kept: tuple[int, ...] | None = None  # places of these rows in the split they are of, where some were dropped

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each row (rows,), without padding: of its longest sequence."""
        return self._sizes.max(1)  # type: ignore[no-any-return]

    @cached_property
    def _sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each sequence (rows, sequences)."""
        return np.array([len(ids) for ids in self.columns["input_ids"]]).reshape(-1, self.sequences)

    def cut(self, name: str = "") -> list[str]:
        """Return the note on the rows, those of the split `name`, that were cut, if any were."""
        widest = np.array(self.uncut, dtype=int).reshape(-1, self.sequences).max(1)  # (rows,)
        count = int((widest > self.max_length).sum())
        if not count:
            return []
        which = " ".join(filter(None, (f"{count} of {len(widest)}", name, "rows")))
        most = f"the longest has {widest.max()} (--max-length)"
        return [f"{which} are longer than {self.max_length} tokens and were cut; {most}"]

    def tokens(self, chosen: Sequence[int]) -> int:
        """Count the tokens of some rows, without padding."""
        return int(self._sizes[list(chosen)].sum())

    def weight(self, chosen: Sequence[int]) -> int:
        """Return what some rows count together in the loss of a step."""
        return len(chosen) if self.weights is None else int(self.weights[list(chosen)].sum())

    def places(self, chosen: Sequence[int]) -> list[int]:
        """Return the places in `columns` of the sequences of some rows."""
        return [row * self.sequences + i for row in chosen for i in range(self.sequences)]


def longest(model: Any) -> int | None:
    """Return the most tokens that a model takes, or None if it sets no limit.

    The model's own table of positions decides. Where it has a padding row or an offset, the first token has the
    position after it, so the model takes fewer tokens than its table has rows.
    """
    config_limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if config_limit is None or config_limit < 1:  # XLNet's is -1: its positions are relative
        return None
    limit = config_limit
    words = model.get_input_embeddings()
    for module in model.modules():
        weight = module._parameters.get("weight")  # (rows, values) of an embedding, whatever its class
        if weight is None or weight.ndim != 2 or module is words or not hasattr(module, "padding_idx"):
            continue
        if len(weight) - SPARE <= config_limit <= len(weight):
            first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, len(weight) - first)
    return limit


def unknown_tokens(ids: Sequence[int], model: Any) -> str | None:
    """Say that a model has no embedding of a token, as where its tokenizer was given more and it was not resized."""
    words = model.get_input_embeddings()
    size = getattr(words, "num_embeddings", None) or getattr(model.config, "vocab_size", None)
    if size is None or not ids or max(ids) < size:
        return None
    return (
        f"a token that the model does not know: it has {size} of them, and the tokenizer more; resize the model "
        "(resize_token_embeddings) and save it with the tokenizer, or use the tokenizer that it was saved with"
    )


def check_vocabulary(where: object, rows: Rows, numbers: Sequence[int], model: Any) -> None:
    """Raise BadRows for rows with tokens that the model has no embedding of.

    `numbers` are those of all rows of the split in the file.
    """
    sequences = rows.columns["input_ids"]
    fault = unknown_tokens([max(ids, default=0) for ids in sequences], model)
    if fault is None:
        return
    own = [numbers[place] for place in rows.kept] if rows.kept else numbers
    bad = {own[i // rows.sequences] for i, ids in enumerate(sequences) if unknown_tokens(ids, model)}
    raise BadRows(f"{where}: {counted(sorted(bad))}: {fault}", None, dict.fromkeys(sorted(bad), fault))


def cut_at(given: int | None, model: Any) -> int:
    """Return the tokens after which a row is cut: those given, but at most those that the model takes."""
    return min((n for n in (given, longest(model)) if n is not None), default=LONGEST)


def tokenized(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int
) -> tuple[dict[str, list[Any]], list[int]]:
    """Tokenize rows of one text or two; return (columns, tokens of each row before the cut).

    Rows of more than `max_length` tokens are cut at the end, longest text first.
    """
    parts = [list(column) for column in zip(*texts, strict=True)]
    free = tokenizer(*parts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    columns = dict(cutting_at_end(tokenizer)(*parts, truncation=True, max_length=max_length, verbose=False))
    return columns, [len(ids) for ids in free]


def cutting_at_end(tokenizer: Any) -> Any:
    """Return a tokenizer that cuts rows at the end, whichever side its folder names; the given one stays as it is."""
    other = copy(tokenizer)
    other.truncation_side = "right"
    return other


def collate(rows: Rows, chosen: Sequence[int], tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    """Return the chosen rows, padded to the longest or a little more (see `batch_width`): tensors (sequences, t)."""
    return collate_together([(rows, chosen)], tokenizer, device)[0]


def collate_together(
    parts: Sequence[tuple[Rows, Sequence[int]]], tokenizer: Any, device: torch.device
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Return the chosen rows of K runs: tensors (K b, t) in K equal parts, and the (b, t) of each part alone.

    b counts sequences. A part with fewer than the largest repeats its first. Short ones are padded on the right,
    whichever side the tokenizer names: then a token has the position that it has alone, and its label stays with it.
    """
    if parts[0][0].packed:
        ((rows, chosen),) = parts
        batch = pack(rows, chosen, tokenizer)
        return {key: tensor.to(device) for key, tensor in batch.items()}, [
            (len(batch["input_ids"]), batch["input_ids"].shape[1])
        ]
    places = [rows.places(chosen) for rows, chosen in parts]
    sizes = [(len(mine), width(*part)) for mine, part in zip(places, parts, strict=True)]
    b, t = (max(column) for column in zip(*sizes, strict=True))
    picked: dict[str, list[list[int]]] = {key: [] for key in parts[0][0].columns}
    for (rows, _), mine in zip(parts, places, strict=True):
        filled = [*mine, *mine[:1] * (b - len(mine))]
        for key, column in picked.items():
            column += [rows.columns[key][i] for i in filled]
    labels = picked.pop("labels", None)
    how = {"padding": "max_length", "max_length": t, "padding_side": "right"}
    batch = tokenizer.pad(picked, **how, return_tensors="pt", verbose=False)
    if labels is not None:
        wide = t if max(map(len, labels)) <= t else batch_width(max(map(len, labels)))  # a target may be longer
        batch["labels"] = _padded_labels(labels, wide)
    return {key: tensor.to(device) for key, tensor in batch.items()}, sizes


def _padded_labels(labels: list[list[int]], t: int) -> Tensor:
    """Return the labels of tokens as (sequences, t), IGNORED where there is padding."""
    return torch.tensor([ids + [IGNORED] * (t - len(ids)) for ids in labels])


def pack(rows: Rows, chosen: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
    """Return the chosen rows in as few sequences of `max_length` tokens as the longest-first rule finds.

    Rows do not see each other: the mask (s, 1, t, t) is added to attention scores, positions begin anew with each row,
    and no row predicts the first token of the next. `rows` (s, t) has the place of each token's row among the chosen;
    -1 is padding.
    """
    bins: list[list[int]] = []  # places among the chosen
    room: list[int] = []
    for place in sorted(range(len(chosen)), key=lambda i: -int(rows.lengths[chosen[i]])):
        size = int(rows.lengths[chosen[place]])
        fits = next((i for i, free in enumerate(room) if free >= size), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            room.append(rows.max_length)
        bins[fits].append(place)
        room[fits] -= size
    s, t = len(bins), min(batch_width(rows.max_length - min(room)), rows.max_length)
    pad = tokenizer.pad_token_id or 0
    batch = {key: torch.full((s, t), fill) for key, fill in (("input_ids", pad), ("labels", IGNORED), ("rows", -1))}
    batch["position_ids"] = torch.zeros(s, t, dtype=torch.long)
    for i, places in enumerate(bins):
        start = 0
        for place in places:
            ids, labels = (rows.columns[key][chosen[place]] for key in ("input_ids", "labels"))
            span = slice(start, start + len(ids))
            batch["input_ids"][i, span] = torch.tensor(ids)
            batch["labels"][i, span] = torch.tensor([IGNORED, *labels[1:]])
            batch["rows"][i, span] = place
            batch["position_ids"][i, span] = torch.arange(len(ids))
            start += len(ids)
    same = batch["rows"][:, :, None] == batch["rows"][:, None, :]  # (s, t, t)
    hidden = ~(same & torch.ones(t, t, dtype=torch.bool).tril())
    batch["attention_mask"] = torch.zeros(s, 1, t, t).masked_fill(hidden[:, None], torch.finfo(torch.float32).min)
    return batch


def width(rows: Rows, chosen: Sequence[int]) -> int:
    """Return the tokens to which a batch of the chosen rows is padded."""
    return min(batch_width(int(rows.lengths[list(chosen)].max())), rows.max_length)


def batch_width(length: int) -> int:
    """Return the width of a batch. There are few different ones: on CPU a new shape takes milliseconds to prepare."""
    step = 4 if length <= 32 else 8
    return -(-length // step) * step


def epoch_batches(lengths: Sequence[int] | Any, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return all rows once, in batches of similar length. Seed and epoch alone decide the order. Raises UserError."""
    lengths = np.asarray(lengths)
    if not len(lengths):
        raise UserError("no rows to train on")
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pools = [order[i : i + POOL * batch_size] for i in range(0, len(order), POOL * batch_size)]
    ordered = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
    batches = [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


Done = Callable[[int], None]  # called with the number of rows of every batch that is answered


def unwatched(rows: int) -> None:
    """Nobody asks how far it is."""


def sorted_batches(lengths: Sequence[int] | Any, batch_size: int) -> Iterator[list[int]]:
    """Yield all rows once, longest first: for evaluation, where the order does not matter."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    for i in range(0, len(order), batch_size):
        yield order[i : i + batch_size]
