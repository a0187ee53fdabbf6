"""What a comparison may look at beside a task's own metrics: likelihood, order of the rows, a threshold of its own.

Each number here is a sum over rows of a part that belongs to the row (`PARTS`), so that resampled rows give it by one
product: a mean of rows for the likelihood, placement values for the area under the curve (DeLong et al., 1988).
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import rankdata

from loralab.data.counts import COUNTS
from loralab.data.metrics import METRICS, is_regression

Array = NDArray[Any]

THRESHOLDED = ("matthews_correlation", "f1")  # of two classes: metrics of a decision, which has a threshold
THRESHOLD = "thresholded"  # the task's metric at the threshold that held-out rows chose
SMALLEST = 1e-12  # mean squared error below which a fit counts as perfect


def auc(logits: Array, labels: Array) -> float:
    """Return the chance that of two rows of different classes the logits order the pair rightly; ties count half.

    Of more than two classes the mean over pairs of those that have rows, by the difference of the two logits; 0.5 where
    all rows have one class.
    """
    return float(auc_parts(logits, labels).sum())


def auc_parts(logits: Array, labels: Array) -> Array:
    """Return (rows,): each row's part of the area, by its placement value among the rows of each other class.

    Both rows of a pair carry its whole luck, so the area is taken off once; the parts sum up to it.
    """
    parts = np.zeros(len(labels))
    pairs = list(combinations(np.unique(labels).astype(int), 2))
    if not pairs:
        return np.full(len(labels), 0.5 / len(labels))
    for low, high in pairs:
        below, above = np.flatnonzero(labels == low), np.flatnonzero(labels == high)
        margin = logits[:, high].astype(np.float64) - logits[:, low]  # (rows,)
        both = rankdata(np.concatenate([margin[below], margin[above]]))  # ties have their mean rank
        inside = np.concatenate([rankdata(margin[below]), rankdata(margin[above])])
        beaten = both - inside  # (rows of the two classes,) rows of the other class that lie below, ties half
        n, m = len(below), len(above)
        area = beaten[n:].sum() / (n * m)
        parts[below] += (m - beaten[:n]) / (n * m) - area / (n + m)
        parts[above] += beaten[n:] / (n * m) - area / (n + m)
    return parts / len(pairs)


def log_likelihood(logits: Array, labels: Array) -> float:
    """Return the mean log-probability of the labels; of scores under a normal error of the variance found here."""
    return float(likelihood_parts(logits, labels).sum())


def likelihood_parts(logits: Array, labels: Array) -> Array:
    """Return (rows,): each row's part of the mean."""
    rows = len(labels)
    if not is_regression(logits):
        chances = log_softmax(logits.astype(np.float64), axis=1)  # (rows, outputs)
        return np.asarray(chances[np.arange(rows), labels.astype(int)] / rows)
    errors = (logits[:, 0].astype(np.float64) - labels) ** 2
    mean = max(float(errors.mean()), SMALLEST)
    return np.asarray(-0.5 * (np.log(2 * np.pi * mean) + errors / mean) / rows)


PARTS: dict[str, Callable[[Array, Array], Array]] = {"auc": auc_parts, "log_likelihood": likelihood_parts}


# ---- a threshold -----------------------------------------------------------------------------------------------------


def best_threshold(metric: str, logits: Array, labels: Array) -> float:
    """Return the threshold on logit 1 - logit 0 with the best metric on these rows; of equal ones the nearest to 0."""
    margin = logits[:, 1].astype(np.float64) - logits[:, 0]  # (rows,)
    cuts, place = np.unique(margin, return_inverse=True)
    of_label = [np.bincount(place, weights=labels == label, minlength=len(cuts)) for label in (0, 1)]
    below = np.stack([np.concatenate([[0.0], counts.cumsum()]) for counts in of_label], axis=1)  # (cuts + 1, label)
    right = np.stack([below[:, 0], (below[-1] - below)[:, 1]], axis=1)  # (cuts + 1, class)
    said = np.stack([below.sum(1), (below[-1] - below).sum(1)], axis=1)
    middle = (cuts[1:] + cuts[:-1]) / 2
    thresholds = np.concatenate([[cuts[0] - 1.0], middle, [cuts[-1] + 1.0]])
    scores = COUNTS[metric](right, np.broadcast_to(below[-1], right.shape), said)
    if cuts[0] <= 0 < cuts[-1]:  # 0 itself, which argmax takes: it may lie anywhere between two cuts
        between = int(np.searchsorted(cuts, 0.0, side="right"))
        thresholds[between] = 0.0
    best = np.flatnonzero(scores == scores.max())
    return float(thresholds[best[np.abs(thresholds[best]).argmin()]])


def moved(logits: Array, threshold: float) -> Array:
    """Return logits of two classes whose argmax decides at the threshold."""
    return np.asarray(logits - np.array([0.0, threshold], dtype=logits.dtype))


# ---- all of a run ----------------------------------------------------------------------------------------------------


def threshold_of(metric: str, logits: Array, labels: Array) -> float | None:
    """Return the threshold that held-out rows choose; None where the metric is not of a decision between two."""
    if metric not in THRESHOLDED or logits.shape[1] != 2:
        return None
    return best_threshold(metric, logits, labels)


def endpoints(metric: str, logits: Array, labels: Array, threshold: float | None) -> dict[str, float]:
    """Return accuracy and auc (of classes), log_likelihood, and the metric at the threshold, if there is one."""
    found = {"log_likelihood": log_likelihood(logits, labels)}
    if not is_regression(logits):
        found |= {"accuracy": METRICS["accuracy"](logits, labels), "auc": auc(logits, labels)}
    if threshold is not None:
        found |= {THRESHOLD: METRICS[metric](moved(logits, threshold), labels), "threshold": threshold}
    return found
