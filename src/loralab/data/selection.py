"""Rows of train held out to choose the epoch: by the data's hash and a fixed seed, so the same for every method."""

from collections import Counter

import numpy as np
from sklearn.model_selection import train_test_split

from loralab.data.task import Split
from loralab.errors import UserError

SEED = 20210617  # any fixed number; this is the day LoRA appeared
BINS = 10  # quantile bins that stratify a regression


def held_out(
    split: Split, sha256: str, classification: bool, fraction: float = 0.1, at_most: int = 1000
) -> tuple[list[int], list[int]]:
    """(indices to train on, indices held out), both sorted; stratified by label, for regression by quantile.

    The first row of each class always stays in train, so no class vanishes from it.
    """
    rows = len(split)
    size = min(at_most, max(1, round(rows * fraction)))
    groups = list(split.labels) if classification else _quantiles(split.labels, min(BINS, size))
    first = {group: row for row, group in reversed(list(enumerate(groups)))}
    spare = sorted(set(range(rows)) - set(first.values()))
    if size > len(spare):
        raise UserError(
            f"{size} of {rows} rows cannot be held out: one of each of {len(first)} classes stays; add rows"
        )
    seed = (int(sha256[:8], 16) + SEED) % 2**32
    out = _draw(spare, [groups[row] for row in spare], size, seed)
    return sorted(set(range(rows)) - set(out)), out


def sample(split: Split, sha256: str, classification: bool, rows: int) -> list[int]:
    """Indices of so many rows, sorted and stratified like those held out."""
    return held_out(split, sha256, classification, 1.0, rows)[1]


def _quantiles(labels: list[int] | list[float], bins: int) -> list[float]:
    """The quantile bin of every row, by rank; ties are split in file order."""
    order = np.argsort(labels, kind="stable")
    ranks = np.empty(len(labels), dtype=int)
    ranks[order] = np.arange(len(labels))
    return [float(bin) for bin in ranks * bins // len(labels)]


def _draw(rows: list[int], groups: list[float], size: int, seed: int) -> list[int]:
    """`size` of the rows: stratified over groups of two rows and more, or plainly random if too many groups."""
    if size == len(rows):
        return rows
    counts = Counter(groups)
    many = [row for row, group in zip(rows, groups, strict=True) if counts[group] > 1]
    strata = [group for group in groups if counts[group] > 1]
    if len(set(strata)) <= min(size, len(many) - size):
        _, out = train_test_split(many, test_size=size, random_state=seed, stratify=strata)
    else:
        _, out = train_test_split(rows, test_size=size, random_state=seed)
    return sorted(out)
