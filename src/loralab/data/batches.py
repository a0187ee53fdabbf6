"""Rows as token ids, and batches of rows of like length, so that little of a batch is padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.data import Split
from loralab.errors import UserError

OFFSET = {"roberta", "xlm-roberta", "camembert", "mpnet"}  # positions start after the padding id: two fewer are usable
POOL = 50  # batches whose rows are sorted by length together; more order, less padding


@dataclass(frozen=True)
class Rows:
    """Tokenized rows: columns of ragged token lists and the labels."""

    columns: dict[str, list[list[int]]]  # input_ids, attention_mask, perhaps token_type_ids
    labels: Tensor  # (rows,) int64 for classes, float32 for regression
    truncated: int  # rows cut to the maximal length
    max_length: int  # tokens

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([len(ids) for ids in self.columns["input_ids"]])


def longest(model: Any) -> int | None:
    """Tokens a model takes at most, or None if it sets no limit."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else positions - 2 * (config.model_type in OFFSET)


def encode(split: Split, tokenizer: Any, max_length: int, regression: bool) -> Rows:
    """Tokenizes a split; rows of more than `max_length` tokens are cut at the end, longest text first, and counted."""
    texts = [list(column) for column in zip(*split.texts, strict=True)]
    free = tokenizer(*texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    columns = dict(tokenizer(*texts, truncation=True, max_length=max_length, verbose=False))
    labels = torch.tensor(split.labels, dtype=torch.float32 if regression else torch.int64)
    return Rows(columns, labels, sum(len(ids) > max_length for ids in free), max_length)


def collate(rows: Rows, chosen: Sequence[int], tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    """The chosen rows padded to the longest of them, or a little more (see `padded`): tensors (rows, t)."""
    return collate_together([(rows, chosen)], tokenizer, device)[0]


def collate_together(
    parts: Sequence[tuple[Rows, Sequence[int]]], tokenizer: Any, device: torch.device
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """The chosen rows of K runs: tensors (K b, t) in K equal parts, and the (b, t) that each would have alone.

    Short rows are padded, and a part with fewer rows than the largest has its first row again.
    """
    sizes = [(len(chosen), width(rows, chosen)) for rows, chosen in parts]
    b, t = (max(column) for column in zip(*sizes, strict=True))
    picked: dict[str, list[list[int]]] = {key: [] for key in parts[0][0].columns}
    for rows, chosen in parts:
        filled = [*chosen, *chosen[:1] * (b - len(chosen))]
        for key, column in picked.items():
            column += [rows.columns[key][i] for i in filled]
    batch = tokenizer.pad(picked, padding="max_length", max_length=t, return_tensors="pt", verbose=False)
    return {key: tensor.to(device) for key, tensor in batch.items()}, sizes


def width(rows: Rows, chosen: Sequence[int]) -> int:
    """Tokens to which a batch of the chosen rows is padded."""
    return min(padded(int(rows.lengths[list(chosen)].max())), rows.max_length)


def padded(length: int) -> int:
    """The width of a batch: few different ones, as a product of a new shape takes milliseconds to prepare on CPU."""
    step = 4 if length <= 32 else 8
    return -(-length // step) * step


def epoch_batches(lengths: Sequence[int] | Any, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All rows once, in batches of like length and in an order that seed and epoch alone decide."""
    lengths = np.asarray(lengths)
    if not len(lengths):
        raise UserError("no rows to train on")
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pools = [order[i : i + POOL * batch_size] for i in range(0, len(order), POOL * batch_size)]
    ordered = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
    batches = [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def sorted_batches(lengths: Sequence[int] | Any, batch_size: int) -> Iterator[list[int]]:
    """All rows once, longest first: for evaluation, where the order does not matter."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    for i in range(0, len(order), batch_size):
        yield order[i : i + batch_size]
