"""Scores on resampled validation rows: the stratified bootstrap (Efron and Tibshirani, 1993), for many runs at once.

A resample is a weight for every row. Each metric is a function of weighted sums, so all scores of all resamples are
products: counts by class, moments for correlations. Rows that no run tells apart have one weight together
(multinomial), which makes 40,000 rows a few hundred patterns. Strata are the labels, so every resample has the classes
of the split. Spearman's ranks are those of the whole split.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.stats import rankdata

from loralab.data.counts import COUNTS, divide
from loralab.data.endpoints import PARTS
from loralab.objectives import Sums

Array = NDArray[Any]
AT_ONCE = 2**22  # weights held at a time: 32 MB
FEW = 8  # rows for each pattern, from which on patterns are drawn by their counts


def resampled(
    metric: str,
    logits: Sequence[Array],
    labels: Array,
    times: int,
    generator: Generator,
    sums: Sequence[Sums] | None = None,
) -> Array:
    """(times, runs): the metric of every run, whose logits are (rows, outputs), on the same resamples of the rows.

    `sums` are those of the runs, where the objective says its metric so.
    """
    if sums is not None:
        score, counts = _of_sums(sums), np.ones(len(labels), dtype=np.int64)
        strata = np.zeros(len(labels))
    elif metric in PARTS:
        parts = np.stack([PARTS[metric](x, labels) for x in logits], axis=1)  # (rows, runs)
        score, counts = _of_parts(parts), np.ones(len(labels), dtype=np.int64)
        strata = labels if logits[0].shape[1] > 1 else np.zeros(len(labels))
    elif metric in RATIOS:
        parts = np.stack([x[:, RATIOS[metric]] for x in logits], axis=1).astype(np.float64)  # (rows, runs)
        tokens = logits[0][:, 1].astype(np.float64)  # (rows,)
        score, counts = _of_ratios(metric, parts, tokens), np.ones(len(labels), dtype=np.int64)
        strata = np.zeros(len(labels))
    elif metric in COUNTS:
        table = np.stack([labels.astype(np.int64), *(x.argmax(1) for x in logits)], axis=1)
        patterns, counts = np.unique(table, axis=0, return_counts=True)
        score = _of_classes(metric, patterns, max(int(table.max()) + 1, *(x.shape[1] for x in logits)))
        strata = patterns[:, 0]
    else:
        values = np.stack([labels, *(x[:, 0] for x in logits)], axis=1).astype(np.float64)
        score = _of_numbers(rankdata(values, axis=0) if metric == "spearman" else values)
        counts, strata = np.ones(len(labels), dtype=np.int64), np.zeros(len(labels))
    return np.concatenate([score(w) for w in _weights(counts, strata, times, generator)])


def by_rows(metric: str, labels: Array) -> bool:
    """Whether a metric can be resampled from outputs and labels alone: of classes and scores a label for each row."""
    classes = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    scores = labels.ndim == 1 and not np.isnan(labels).any()
    return metric in RATIOS or (classes if metric in COUNTS else scores and metric in (*PARTS, *NUMBERS))


def _weights(counts: Array, strata: Array, times: int, generator: Generator) -> Iterator[Array]:
    """(some, patterns) at a time: how often each pattern is drawn, as many of each stratum as there are."""
    block = max(1, AT_ONCE // int(counts.sum()))
    for start in range(0, times, block):
        drawn = np.zeros((min(block, times - start), len(counts)))
        for stratum in np.unique(strata):
            inside = np.flatnonzero(strata == stratum)
            drawn[:, inside] = _drawn(counts[inside], len(drawn), generator)
        yield drawn


def _drawn(counts: Array, times: int, generator: Generator) -> Array:
    """(times, patterns): how often each is drawn in as many draws as there are rows.

    Few patterns are drawn by their counts, many row by row, which is as random and faster there.
    """
    total = int(counts.sum())
    if len(counts) * FEW < total:
        return np.asarray(generator.multinomial(total, counts / total, size=times))
    pattern = np.repeat(np.arange(len(counts)), counts)[generator.integers(0, total, (times, total))]  # (times, rows)
    pattern += len(counts) * np.arange(times)[:, None]
    return np.bincount(pattern.ravel(), minlength=times * len(counts)).reshape(times, len(counts))


def _of_classes(metric: str, patterns: Array, classes: int) -> Callable[[Array], Array]:
    """Weights (times, patterns) -> scores (times, runs); a pattern is a label and a prediction of each run."""
    one_hot = np.eye(classes)
    label = one_hot[patterns[:, 0]]  # (patterns, classes)
    of_run = [(label * predicted, predicted) for predicted in map(one_hot.__getitem__, patterns[:, 1:].T)]

    def score(weights: Array) -> Array:
        true = weights @ label  # (times, classes)
        scores = [COUNTS[metric](weights @ right, true, weights @ said) for right, said in of_run]
        return np.stack(scores, axis=1)

    return score


def _of_parts(parts: Array) -> Callable[[Array], Array]:
    """Weights (times, rows) -> scores (times, runs) that are sums over rows of their parts (rows, runs)."""
    return lambda weights: weights @ parts


def _of_sums(sums: Sequence[Sums]) -> Callable[[Array], Array]:
    """Weights (times, rows) -> scores (times, runs) of the weighted sums of each run."""
    return lambda weights: np.stack([of.score(weights @ of.parts) for of in sums], axis=1)


def _of_ratios(metric: str, parts: Array, tokens: Array) -> Callable[[Array], Array]:
    """Weights (times, rows) -> scores (times, runs): sums of parts (rows, runs) over sums of tokens (rows,)."""

    def score(weights: Array) -> Array:
        found: Array = (weights @ parts) / (weights @ tokens)[:, None]
        return np.exp(found) if metric == "perplexity" else found

    return score


def _of_numbers(values: Array) -> Callable[[Array], Array]:
    """Weights (times, rows) -> Pearson correlations (times, runs) of column 0 with the others."""
    x = values - values.mean(0)  # the sums below would cancel for values far from 0
    label, outputs = x[:, :1], x[:, 1:]

    def score(weights: Array) -> Array:
        w = weights / weights.sum(1, keepdims=True)
        mean_y, mean_x = w @ label, w @ outputs  # (times, 1), (times, runs)
        both = w @ (label * outputs) - mean_y * mean_x
        spread = (w @ label**2 - mean_y**2) * (w @ outputs**2 - mean_x**2)
        return divide(both, np.sqrt(np.maximum(spread, 0.0)))

    return score


RATIOS = {"loss": 0, "perplexity": 0, "token_accuracy": 2}  # metric of a language model -> column of its predictions
NUMBERS = ("pearson", "spearman")
UNBOUNDED = (-np.inf, np.inf)
RANGES = {  # the values a metric can take
    **dict.fromkeys(
        ("accuracy", "f1", "f1_macro", "f1_micro", "exact", "span_f1", "mrr", "ndcg_at_10", "token_accuracy", "auc"),
        (0.0, 1.0),
    ),
    **dict.fromkeys(("matthews_correlation", "pearson", "spearman"), (-1.0, 1.0)),
}
