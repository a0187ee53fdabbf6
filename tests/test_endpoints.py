"""Endpoints: area, likelihood and thresholds against other people's formulas; rows that no run trains on."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from loralab import UserError, data
from loralab.data import METRICS
from loralab.data.endpoints import PARTS, auc, best_threshold, endpoints, log_likelihood, moved, threshold_of
from loralab.run import Settings, train
from loralab.run.setup import prepare, splits
from loralab.study.statistics.resample import resampled


def rows(classes, n=80, seed=0, tied=False):
    """(logits (n, classes), labels) that tell something of each other; `tied` makes many margins equal."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    logits = (np.eye(classes)[labels] + random.normal(0, 1.2, (n, classes))).astype(np.float32)
    return (logits.round() if tied else logits), labels


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_auc_is_the_share_of_pairs_in_the_right_order(classes, tied):
    logits, labels = rows(classes, tied=tied)
    pairs = []
    for low, high in combinations(range(classes), 2):
        some = np.isin(labels, (low, high))
        pairs.append(roc_auc_score(labels[some] == high, (logits[:, high] - logits[:, low])[some]))
    assert auc(logits, labels) == pytest.approx(np.mean(pairs))
    assert auc(logits, np.zeros_like(labels)) == pytest.approx(0.5)  # one class: no pair to order


def test_log_likelihood_is_that_of_the_labels():
    logits, labels = rows(3)
    chances = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)
    assert log_likelihood(logits, labels) == pytest.approx(-log_loss(labels, chances))
    scores, truth = logits[:, :1], logits[:, 0] + np.linspace(-1, 1, len(logits))
    sigma = math.sqrt(np.mean((scores[:, 0] - truth) ** 2))
    normal = -0.5 * ((scores[:, 0] - truth) / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
    assert log_likelihood(scores, truth) == pytest.approx(normal.mean(), rel=1e-6)
    assert log_likelihood(scores, truth * 2) < log_likelihood(scores, truth)


@pytest.mark.parametrize("endpoint", PARTS)
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_resampled_parts_vary_as_the_endpoint_does_on_resampled_rows(endpoint, classes):
    """The linear form against the endpoint itself, of two runs: their variances, and their covariance."""
    if endpoint == "auc" and classes == 1:
        return
    random = np.random.default_rng(4)
    logits, labels = rows(max(classes, 2), 300)
    more = logits + random.normal(0, 0.7, logits.shape).astype(np.float32)
    if classes == 1:
        logits, more, labels = logits[:, :1], more[:, :1], labels + random.normal(0, 0.3, len(labels))
    strata = [np.flatnonzero(labels == c) for c in np.unique(labels)] if classes > 1 else [np.arange(len(labels))]
    plain = {"auc": auc, "log_likelihood": log_likelihood}[endpoint]
    slow = []
    for _ in range(600):
        chosen = np.concatenate([random.choice(stratum, len(stratum)) for stratum in strata])
        slow.append([plain(x[chosen], labels[chosen]) for x in (logits, more)])
    fast = resampled(endpoint, [logits, more], labels, 4000, random)
    assert fast.mean(0) == pytest.approx([plain(logits, labels), plain(more, labels)], abs=0.01)
    assert np.cov(fast, rowvar=False) == pytest.approx(np.cov(np.array(slow), rowvar=False), rel=0.25)


@pytest.mark.parametrize("metric", ["matthews_correlation", "f1"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_threshold_is_the_best_of_all_there_are(metric, tied):
    for seed in range(5):
        logits, labels = rows(2, 60, seed, tied)
        margin = (logits[:, 1] - logits[:, 0]).astype(float)
        cuts = np.unique(margin)
        tries = [cuts[0] - 1, *((cuts[1:] + cuts[:-1]) / 2), cuts[-1] + 1]
        scores = [METRICS[metric](np.stack([np.zeros_like(margin), margin - t], 1), labels) for t in tries]
        found = best_threshold(metric, logits, labels)
        assert METRICS[metric](moved(logits, found), labels) == pytest.approx(max(scores))
        near = min(abs(t) for t, s in zip(tries, scores, strict=True) if s == max(scores))
        assert abs(found) <= near + 1e-6  # of equal ones the nearest to argmax's own


def test_a_threshold_that_argmax_has_found_already_is_0():
    labels = np.array([0, 0, 1, 1])
    logits = np.stack([-np.array([-3.0, -1.0, 2.0, 5.0]), np.array([-3.0, -1.0, 2.0, 5.0])], 1)
    assert best_threshold("f1", logits, labels) == 0.0
    assert threshold_of("accuracy", logits, labels) is None
    assert threshold_of("f1", logits[:, :1], labels) is None


def test_endpoints_of_classes_and_of_scores():
    logits, labels = rows(2)
    found = endpoints("f1", logits, labels, 0.7)
    assert found == {
        "accuracy": METRICS["accuracy"](logits, labels), "auc": auc(logits, labels),
        "log_likelihood": log_likelihood(logits, labels), "thresholded": METRICS["f1"](moved(logits, 0.7), labels),
        "threshold": 0.7,
    }  # fmt: skip
    assert set(endpoints("pearson", logits[:, :1], labels, None)) == {"log_likelihood"}


# ---- rows that no run trains on --------------------------------------------------------------------------------------


def test_unused_rows_are_held_out_and_none_of_them_trains(glue):
    def parts(**given):
        s = Settings(task="cola", data=glue, **given)
        return splits(data.load("cola", glue), s)[0]

    new, old = parts(train_rows=2400, held_out="unused"), parts(train_rows=2400)
    assert (len(new["train"]), len(new["held-out"]), len(old["held-out"])) == (2400, 2000, 855)
    texts = data.load("cola", glue).train.texts
    assert len(set(texts)) > 8000
    assert len(new["held-out"]) + len(new["train"]) <= len(texts)
    both = set(new["train"].texts) & set(new["held-out"].texts)
    assert len(both) < 10  # sentences that CoLA itself has twice
    few = parts(train_rows=8000, held_out="unused")
    assert len(few["held-out"]) == 855  # fewer than a tenth are unused: a tenth, as before
    assert parts(held_out="unused")["train"].texts == parts()["train"].texts


def test_held_out_unused_needs_selection_by_held_out_rows():
    with pytest.raises(UserError, match="held_out='unused' with selection='last'"):
        Settings(task="cola", held_out="unused", selection="last")


def own_run(tiny, own, out, **given):
    usual = {"epochs": 3, "max_length": 32, "batch_size": 20, "lr": 2e-2, "rank": 3}
    return Settings(
        task=str(own["class"]), text=("sentence",), label="label", model=str(tiny), out=out, **usual | given
    )


def test_validation_is_read_once_at_the_selected_epoch(tiny, own, tmp_path):
    """The same training twice: what is reported is what the other run has at the epoch that both select."""
    once = train(own_run(tiny, own, tmp_path / "once", held_out="unused"))
    each = train(own_run(tiny, own, tmp_path / "each"))
    assert once["selected_epoch"] == each["selected_epoch"]
    for key in ("metrics", "endpoints"):
        assert once[key] == each[key]
    assert once["metric"]["selected"] == each["metric"]["selected"]
    assert once["metric"]["best_on_validation"] is None
    lines = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    read = [bool(line["validation"]) for line in lines]
    assert read == [line["epoch"] == once["selected_epoch"] for line in lines]


def test_the_reported_rows_are_a_fixed_sample(tiny, own, tmp_path):
    s = own_run(tiny, own, tmp_path / "a", held_out="unused", validation_rows=7)
    first, second = prepare(s), prepare(s)
    assert len(first.validation["validation"]) == 7
    assert first.validation["validation"].columns == second.validation["validation"].columns
