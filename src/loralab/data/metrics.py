"""Metrics from logits (rows, outputs) and labels (rows,): those of GLUE and of own tasks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from loralab.errors import UserError

Array = NDArray[Any]


def _constant(values: Array) -> bool:
    return bool((values == values[0]).all())


def accuracy(logits: Array, labels: Array) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return float(accuracy_score(labels, logits.argmax(1)))


def matthews_correlation(logits: Array, labels: Array) -> float:
    """Return the correlation of predicted and true class; 0.0 when either is constant, where the formula is 0/0."""
    predicted = logits.argmax(1)
    return 0.0 if _constant(predicted) or _constant(labels) else float(matthews_corrcoef(labels, predicted))


def f1(logits: Array, labels: Array) -> float:
    """Return GLUE's F1: of the class with id 1, of two; 0.0 when no row has it or is predicted to."""
    if logits.shape[1] != 2:
        raise UserError(f"f1 is for 2 classes, the logits have {logits.shape[1]} outputs: use f1_macro")
    return float(f1_score(labels, logits.argmax(1), labels=[1], average=None, zero_division=0)[0])


def f1_macro(logits: Array, labels: Array) -> float:
    """Return the plain mean of the F1 of every class that is a label or a prediction of some row."""
    return float(f1_score(labels, logits.argmax(1), average="macro", zero_division=0))


def pearson(logits: Array, labels: Array) -> float:
    """Return the linear correlation of output and label; 0.0 when either is constant, where the formula is 0/0."""
    return _correlation(stats.pearsonr, logits, labels)


def spearman(logits: Array, labels: Array) -> float:
    """Return the rank correlation of output and label; 0.0 when either is constant, where the formula is 0/0."""
    return _correlation(stats.spearmanr, logits, labels)


def _correlation(function: Callable[[Array, Array], Any], logits: Array, labels: Array) -> float:
    predicted = logits[:, 0].astype(np.float64)  # scipy computes in the dtype it is given
    return 0.0 if _constant(predicted) or _constant(labels) else float(function(predicted, labels).statistic)


LOWER_IS_BETTER = {"loss", "perplexity"}


def upward(metric: str, score: float) -> float:
    """Return a score so that more is better: of a loss its negative."""
    return -score if metric in LOWER_IS_BETTER else score


def best(metric: str, scores: Sequence[float]) -> float:
    """Return the best of some scores of a metric."""
    return max(scores, key=lambda score: upward(metric, score))


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "matthews_correlation": matthews_correlation,
    "f1": f1,
    "f1_macro": f1_macro,
    "pearson": pearson,
    "spearman": spearman,
}


def score(metrics: Sequence[str], logits: Array, labels: Sequence[float] | Array) -> dict[str, float]:
    """Return every named metric. Raises UserError for an unknown name and for logits that are not finite."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UserError(f"unknown metric {', '.join(unknown)}: there are {', '.join(METRICS)}")
    truth = np.asarray(labels)
    if logits.ndim != 2 or len(logits) != len(truth) or not len(truth):
        raise ValueError(
            f"logits {logits.shape} for {len(truth)} labels: expected (rows, outputs) and a label for each row"
        )
    bad = int((~np.isfinite(logits)).any(1).sum())
    if bad:
        raise UserError(
            f"outputs of {bad} of {len(logits)} rows are not finite: training diverged, lower the learning rate"
        )
    return {name: METRICS[name](logits, truth) for name in metrics}


def is_regression(logits: Array) -> bool:
    """Tell whether logits (rows, outputs) are scores: a head of classes has two outputs or more."""
    return bool(logits.shape[1] == 1)


def is_constant(logits: Array) -> bool:
    """Tell whether one class is predicted for every row, or one value by a regression: nothing was learned."""
    return _constant(logits[:, 0] if is_regression(logits) else logits.argmax(1))


NARROW, UNRELATED = 0.2, 0.25  # of scores that learned nothing: spread over the labels' spread, and correlation


def is_flat(scores: Array, labels: Array) -> bool:
    """Tell whether scores (rows,) are nearly one value and hardly follow the labels (rows,): nothing was learned.

    Both are needed: early in training good scores are still narrow, and scores of a hard task follow little.
    """
    scores, labels = scores.astype(np.float64), labels.astype(np.float64)
    if _constant(labels) or labels.std() * NARROW <= scores.std():
        return False
    return _constant(scores) or abs(float(stats.pearsonr(scores, labels).statistic)) < UNRELATED
