"""Rows drawn by the data's hash: those held out of train to choose the epoch, and samples.

The draw is rule 1 of docs/protocol.md. It uses numpy's legacy generator, whose values numpy has frozen, so the same
data give the same rows with every version of every library. The rows are those of scikit-learn's `train_test_split`,
with which the first runs were made; a test compares the two.
"""

from collections import Counter
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from loralab.data.task import Split
from loralab.errors import UserError

SEED = 20210617  # any fixed number; this is the day LoRA appeared
UNUSED = 2000  # rows that no run trains on are enough to choose an epoch and a threshold by
BINS = 10  # quantile bins that stratify a regression

Ints = NDArray[np.int64]


def held_out(
    split: Split, sha256: str, classification: bool, fraction: float = 0.1, at_most: int = 1000
) -> tuple[list[int], list[int]]:
    """Divide the rows of a split by the hash of its task.

    Returns (indices to train on, indices held out), both sorted; stratified by label, for a regression by quantile. The
    first row of each class always stays in train, so no class vanishes from it. Raises UserError where too few rows are
    left for that.
    """
    rows = len(split)
    size = min(at_most, max(1, round(rows * fraction)))
    if not has_strata(split):
        groups: list[float] = [0.0] * rows
    else:
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


def held_out_unused(
    split: Split, sha256: str, classification: bool, train_rows: int | None
) -> tuple[list[int], list[int]]:
    """Divide rows of which `train_rows` will train: hold out up to UNUSED of the others, at least a tenth of all.

    Returns and raises as `held_out` does.
    """
    rows = len(split)
    unused = 0 if train_rows is None else min(UNUSED, rows - train_rows)
    if unused <= min(1000, round(rows * 0.1)):
        return held_out(split, sha256, classification)
    return held_out(split, sha256, classification, 1.0, unused)


def has_strata(split: Split) -> bool:
    """Tell whether the labels of a split are classes or scores, by which rows can be stratified."""
    return isinstance(next(iter(split.labels), None), int | float)


def sample(split: Split, sha256: str, classification: bool, rows: int) -> list[int]:
    """Return the indices of so many rows, sorted, and drawn and stratified like those held out."""
    return held_out(split, sha256, classification, 1.0, rows)[1]


def _quantiles(labels: list[int] | list[float], bins: int) -> list[float]:
    """Return the quantile bin of every row, by rank; ties are divided in file order."""
    order = np.argsort(labels, kind="stable")
    ranks = np.empty(len(labels), dtype=int)
    ranks[order] = np.arange(len(labels))
    return [float(bin) for bin in ranks * bins // len(labels)]


def _draw(rows: list[int], groups: list[float], size: int, seed: int) -> list[int]:
    """Draw `size` of the rows: stratified over groups of two rows or more, or plainly where the groups are too many."""
    if size == len(rows):
        return rows
    counts = Counter(groups)
    many = [row for row, group in zip(rows, groups, strict=True) if counts[group] > 1]
    strata = [group for group in groups if counts[group] > 1]
    random = RandomState(seed)
    if len(set(strata)) <= min(size, len(many) - size):
        return sorted(many[place] for place in _stratified(strata, size, random))
    return sorted(rows[place] for place in random.permutation(len(rows))[:size])


def _stratified(groups: list[float], size: int, random: RandomState) -> list[int]:
    """Return the places of `size` rows, of each group as large a share as of all rows."""
    _, group_of_row, counts = np.unique(groups, return_inverse=True, return_counts=True)
    stay = _shares(counts, len(groups) - size, random)  # (groups,) rows of each group that are not drawn
    drawn = _shares(counts - stay, size, random)  # (groups,)
    places: list[int] = []
    for group, count in enumerate(counts):
        shuffled = np.flatnonzero(group_of_row == group)[random.permutation(count)]
        places += shuffled[stay[group] : stay[group] + drawn[group]].tolist()
    return places


def _shares(counts: Ints, total: int, random: RandomState) -> Ints:
    """Divide `total` in proportion to `counts`: whole parts first, then the largest remainders, equal ones by lot."""
    exact: NDArray[Any] = counts / counts.sum() * total
    whole = np.floor(exact)
    missing, remainder = int(total - whole.sum()), exact - whole
    for value in np.unique(remainder)[::-1]:
        if missing <= 0:
            break
        equal = np.flatnonzero(remainder == value)
        chosen = random.choice(equal, size=min(len(equal), missing), replace=False)
        whole[chosen] += 1
        missing -= len(chosen)
    shares: Ints = whole.astype(np.int64)
    return shares
