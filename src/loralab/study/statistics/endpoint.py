"""The endpoints that planned contrasts may name, of a run: its value, and its rows for resampling.

selected          the task's own metric at the selected epoch
thresholded       the same at the threshold that held-out rows chose; where the task is no decision it is `selected`
auc-or-pearson    how well outputs order the rows: AUC of classes, Pearson correlation of scores
auc, log_likelihood, or a metric by its name
"""

from loralab.data.endpoints import PARTS, THRESHOLD, THRESHOLDED, moved
from loralab.data.metrics import upward
from loralab.objectives import OBJECTIVES, Sums
from loralab.study.record import Predictions, Run
from loralab.study.statistics.resample import NUMBERS, by_rows

SELECTED = "selected"
ORDER = "auc-or-pearson"
NAMES = (SELECTED, THRESHOLD, ORDER, *PARTS)  # beside the metrics


def metric_of(run: Run, endpoint: str) -> str:
    """The formula behind an endpoint of a run."""
    own = str(run.result["metric"]["name"])
    if endpoint in (SELECTED, THRESHOLD):
        return own
    if endpoint == ORDER:
        return "pearson" if own in NUMBERS else "auc"
    return endpoint


def value(run: Run, endpoint: str) -> float | None:
    """The endpoint of a run, of a loss its negative: more is better. None where the run does not have it."""
    found = _value(run, endpoint)
    return None if found is None else upward(metric_of(run, endpoint), found)


def _value(run: Run, endpoint: str) -> float | None:
    name = metric_of(run, endpoint)
    known = {**run.result.get("metrics", {}), **run.result.get("endpoints", {})}
    if endpoint == SELECTED or (endpoint == THRESHOLD and name not in THRESHOLDED):
        return run.selected
    if endpoint == THRESHOLD:
        return known.get(THRESHOLD)
    split = run.reported
    if name not in known and name in PARTS and split is not None:  # a run of an older version, which kept its rows
        return float(PARTS[name](split.logits, split.labels).sum())
    return known.get(name)


def rows_of(run: Run, endpoint: str) -> Predictions | None:
    """The predictions of the reported split as the endpoint decides; None where a run kept none, or does not say what
    they are of."""
    split, threshold = run.reported, run.result.get("endpoints", {}).get("threshold")
    if split is None:
        return None
    metric = metric_of(run, endpoint)
    if sums_of(run, metric, split) is None and not by_rows(metric, split.labels):
        return None
    if endpoint != THRESHOLD or threshold is None:
        return split
    return Predictions(moved(split.logits, threshold), split.labels)


def sums_of(run: Run, metric: str, split: Predictions) -> Sums | None:
    """The metric of a run as sums over the rows of a split, where its objective says it so."""
    objective = OBJECTIVES.get(run.result.get("objective", ""))  # a run of an older version does not say it
    names = run.result.get("labels") or ()
    return None if objective is None else objective.sums(metric, split.logits, split.labels, names)
