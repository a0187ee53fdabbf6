"""Statistics of studies: their intervals cover, their tests err as often as they say, and both agree with slow oracles.

Simulations have fixed seeds. A rate is compared with what was promised by an exact binomial test at the level LUCK, so
a correct method fails here once in a thousand choices of the seed.
"""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from loralab.data import METRICS
from loralab.data.counts import COUNTS
from loralab.study.statistics import MeanEstimate, holm, mcnemar, mean_estimate, resampled, smallest
from loralab.study.statistics.contrasts import paired
from loralab.study.statistics.resample import NUMBERS, RANGES, RATIOS, _drawn, _of_classes, _of_numbers, _weights

LUCK = 1e-3
ALPHA = 0.05
TIMES = 3000


def as_promised(hits, rate, sides="two-sided"):
    """Whether so many of `hits` are true as a rate says; with sides='greater' they must not be more."""
    hits = np.asarray(hits)
    return stats.binomtest(int(hits.sum()), len(hits), rate, alternative=sides).pvalue > LUCK


def draws(seeds, mean=0.0, sd=0.013, times=TIMES, seed=0):
    """Paired differences of a study, many times over: a list of (seeds,)."""
    return np.random.default_rng(seed).normal(mean, sd, (times, seeds))


# ---- over seeds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [3, 5, 12])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_over_seeds_covers(seeds, level):
    mean = 0.87
    bounds = np.array([mean_estimate(x).interval(level) for x in draws(seeds, mean)])
    assert as_promised((bounds[:, 0] < mean) & (mean < bounds[:, 1]), level)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_paired_test_is_the_t_test_and_errs_as_often_as_it_says(seeds):
    found = draws(seeds)
    p = np.array([mean_estimate(x).p() for x in found])
    np.testing.assert_allclose(p, stats.ttest_1samp(found, 0, axis=1).pvalue, rtol=1e-9)
    assert as_promised(p < ALPHA, ALPHA)


@pytest.mark.few(3)
@pytest.mark.parametrize("seeds", [3, 5, 12])
@pytest.mark.parametrize("tests", [1, 5, 84])
def test_the_smallest_difference_is_found_as_often_as_it_says(seeds, tests):
    sd, alpha = 0.013, ALPHA / tests
    least = smallest(MeanEstimate(0.0, sd, seeds), alpha)
    for times, rate, sides in ((1.0, 0.8, "two-sided"), (0.8, 0.8, "less"), (1.25, 0.8, "greater")):
        p = np.array([mean_estimate(x).p() < alpha for x in draws(seeds, times * least, sd, seed=seeds + tests)])
        assert as_promised(p, rate) == (sides == "two-sided")
        assert np.mean(p) < 0.8 or sides != "less"


def test_what_could_have_been_found_depends_on_seeds_rows_and_the_level():
    few, many = smallest(MeanEstimate(0.01, 0.004, 5), ALPHA), smallest(MeanEstimate(0.01, 0.004, 20), ALPHA)
    with_rows = smallest(MeanEstimate(0.01, 0.004, 5, of_rows=0.01**2, rows=300), ALPHA)
    assert many < few < with_rows
    assert smallest(MeanEstimate(0.01, 0.004, 5), ALPHA / 84) > few
    assert smallest(MeanEstimate(0.3, 0.004, 5), ALPHA) == few  # what was seen does not matter
    for unknown in (MeanEstimate(0.01, math.nan, 1), MeanEstimate(0.01, 0.004, 2), MeanEstimate(0.01, 0.0, 5)):
        assert math.isnan(smallest(unknown, ALPHA))


@pytest.mark.parametrize("seeds", [3, 5])
def test_equivalence_is_claimed_wrongly_no_more_often_than_alpha(seeds):
    """At the margin the rate is alpha itself, beyond it lower; well inside, equivalence is found."""
    margin, sd = 0.02, 0.003
    at = [
        np.array([mean_estimate(x).p_equivalent(margin) < ALPHA for x in draws(seeds, m, sd)])
        for m in (margin, -margin)
    ]
    assert all(as_promised(hits, ALPHA) for hits in at)
    assert as_promised(
        [mean_estimate(x).p_equivalent(margin) < ALPHA for x in draws(seeds, 1.5 * margin, sd)], ALPHA, "greater"
    )
    assert np.mean([mean_estimate(x).p_equivalent(margin) < ALPHA for x in draws(seeds, 0.0, sd)]) > 0.9


@pytest.mark.parametrize("scores", [[0.812227074235808] * 5, [0.3, 0.1 + 0.2, 0.3], [7e3, 7e3 * (1 + 2e-16), 7e3]])
def test_scores_that_differ_by_rounding_do_not_vary(scores):
    """0.1 + 0.2 is not 0.3: without this the interval has no width, and p of a difference is of the order of 1e-16."""
    found = mean_estimate(scores)
    assert found.exact
    assert all(math.isnan(x) for x in found.interval())
    difference = mean_estimate(np.array(scores) - 0.3)
    assert difference.p() in (1.0, 2.0 ** (1 - len(scores)))
    replicates = np.array([scores, scores[::-1], scores])
    assert mean_estimate(scores, replicates, rows=100).of_rows == 0


def test_one_seed_says_nothing_and_equal_differences_say_little():
    alone = mean_estimate([0.3])
    assert all(math.isnan(x) for x in (*alone.interval(), alone.p(), alone.p_equivalent(1)))
    for spread in ([0.1, 0.2], [0.3, 0.3], [0.3] * 5):  # two seeds, or nothing that varies: no interval
        assert all(math.isnan(x) for x in mean_estimate(spread).interval())
    for seeds in (2, 3, 6):  # all signs alike happens in 2 of 2^seeds flips
        flips = np.array(list(itertools.product([-1, 1], repeat=seeds)))
        extreme = np.mean(abs((flips * 0.01).sum(1)) >= seeds * 0.01 - 1e-12)
        assert mean_estimate([0.01] * seeds).p() == pytest.approx(extreme)
    assert mean_estimate([0.0] * 3).p() == 1


@pytest.mark.parametrize("differences", [[0.1] * 2, [0.1] * 3, [0.1] * 6, [0.1, 0.1025, 0.1], [0.0, 0.03, -0.01, 0.02]])
def test_rows_make_no_test_surer_than_its_seeds(differences):
    """Equal differences of three seeds had p 0.25, and 7e-11 where the runs had kept their predictions."""
    seeds = len(differences)
    of_rows = np.random.default_rng(3).normal(0.1, 0.015, 5000)
    replicates = np.repeat(of_rows[:, None], seeds, 1)
    alone, both = mean_estimate(differences), mean_estimate(differences, replicates, 400)
    assert both.of_rows > 0
    assert both.p() >= alone.p()
    for margin in (0.2, 1.0):
        assert both.p_equivalent(margin) >= alone.p_equivalent(margin)
    half, half_alone = (float(np.ptp(estimate.interval())) for estimate in (both, alone))
    assert half >= half_alone or (math.isnan(half) and math.isnan(half_alone))
    for known in (None, [0.015**2] * 2):
        (found, _) = paired(["a", "b"], [np.array(differences)] * 2, 0.01, rows=known)
        assert (found.verdict == "not tested") == (len(set(differences)) == 1)


# ---- over seeds and rows ---------------------------------------------------------------------------------------------

ROWS, SEEDS, OUTER = 150, 3, 500


def scored(random, skill, rows=ROWS, seeds=SEEDS):
    """(seeds, rows) of right and wrong: rows are hard or easy for every seed, seeds are lucky, the rest is chance."""
    hard = random.normal(0, 0.9, rows)
    luck = random.normal(0, 0.12, (len(skill), seeds, 1))
    own = random.normal(0, 0.5, (len(skill), seeds, rows))
    return np.asarray(skill)[:, None, None] + hard + luck + own > 0


def logits_of(right, labels):
    """Two columns whose larger is the label where right, the other one where wrong."""
    said = np.where(right, labels, 1 - labels)
    return np.stack([1 - said, said], axis=1).astype(np.float32)


def simulated(skill, seed):
    """Scores (methods, seeds), replicates (times, methods, seeds) of one study of fresh rows and seeds."""
    random = np.random.default_rng([seed, 77])
    labels = random.permutation(np.arange(ROWS) % 2)
    right = scored(random, skill).reshape(-1, ROWS)
    replicates = resampled("accuracy", [logits_of(x, labels) for x in right], labels, 200, random)
    return right.mean(1).reshape(len(skill), SEEDS), replicates.reshape(-1, len(skill), SEEDS)


@pytest.fixture(scope="module")
def studies():
    """Two methods of equal skill, in OUTER studies."""
    return [simulated((0.6, 0.6), seed) for seed in range(OUTER)]


def test_the_interval_over_seeds_and_rows_covers_and_that_over_seeds_alone_does_not(studies):
    truth = stats.norm.cdf(0.6 / math.sqrt(0.9**2 + 0.12**2 + 0.5**2))
    both = np.array([mean_estimate(scores[0], r[:, 0], ROWS).interval() for scores, r in studies])
    seeds = np.array([mean_estimate(scores[0]).interval() for scores, _ in studies])
    assert as_promised((both[:, 0] < truth) & (truth < both[:, 1]), 0.95)
    assert not as_promised((seeds[:, 0] < truth) & (truth < seeds[:, 1]), 0.95)


def test_the_paired_test_over_seeds_and_rows_errs_no_more_often_than_it_says(studies):
    p = np.array([mean_estimate(s[0] - s[1], r[:, 0] - r[:, 1], ROWS).p() for s, r in studies])
    assert as_promised(p < ALPHA, ALPHA, "greater")
    differ = [simulated((0.6, 1.4), seed) for seed in range(60)]
    found = [mean_estimate(s[0] - s[1], r[:, 0] - r[:, 1], ROWS) for s, r in differ]
    assert np.mean([e.p() < ALPHA for e in found]) > 0.7
    assert all(e.mean < 0 for e in found)


# ---- families, pairs -------------------------------------------------------------------------------------------------


def test_holm_is_the_closure_of_bonferroni():
    """A hypothesis is rejected if every family that holds it is, each at its own Bonferroni level."""
    random = np.random.default_rng(0)
    for _ in range(20):
        p = random.choice([0.001, 0.01, 0.02, 0.02, 0.3, 1.0, *random.random(3)], 5)
        families = [f for n in range(1, 6) for f in itertools.combinations(range(5), n)]
        slow = [max(min(1.0, len(f) * min(p[list(f)])) for f in families if i in f) for i in range(5)]
        np.testing.assert_allclose(holm(p), slow)
    assert np.isnan(holm([0.01, math.nan, 0.02])).tolist() == [False, True, False]
    assert holm([0.01, math.nan, 0.02])[::2] == holm([0.01, 0.02])


def test_holm_keeps_the_chance_of_any_false_claim():
    random = np.random.default_rng(1)
    any_false = [min(holm([*random.random(6), *random.random(3) * 1e-3])[:6]) < ALPHA for _ in range(TIMES)]
    assert as_promised(any_false, ALPHA, "greater")
    assert np.mean(any_false) > ALPHA / 3  # and it is no test that never rejects


def test_mcnemar_counts_the_rows_where_only_one_is_right():
    random = np.random.default_rng(2)
    a, b = random.random((2, 37)) < [[0.8], [0.5]]
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    tails = sum(math.comb(only_a + only_b, k) for k in range(min(only_a, only_b) + 1)) / 2 ** (only_a + only_b)
    assert only_a != only_b
    assert mcnemar(a, b) == pytest.approx(2 * tails)
    assert mcnemar(a, b) == mcnemar(b, a)
    assert mcnemar(a, a) == 1


# ---- resamples -------------------------------------------------------------------------------------------------------


def split(classes, runs=3, rows=97):
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, rows) if classes > 1 else random.normal(50, 2, rows)
    signal = np.eye(classes)[labels] if classes > 1 else labels[:, None]
    return labels, [signal + random.normal(0, 1.1 + i, (rows, classes)) for i in range(runs)]


@pytest.mark.parametrize("metric", METRICS)
def test_a_weight_is_a_row_repeated(metric):
    """Every metric of tasks, on weighted rows, is that of the rows written out."""
    for classes in [c for c in (2, 4) if metric != "f1" or c == 2] if metric in COUNTS else [1]:
        labels, logits = split(classes)
        weights = np.random.default_rng(5).integers(0, 4, (6, len(labels))).astype(float)
        if metric in COUNTS:
            patterns = np.stack([labels, *(x.argmax(1) for x in logits)], axis=1)
            score = _of_classes(metric, patterns, classes)
        else:
            values = np.stack([labels, *(x[:, 0] for x in logits)], axis=1)
            score = _of_numbers(values if metric == "pearson" else stats.rankdata(values, axis=0))
        weights[0] = 1  # ranks are those of the whole split, so Spearman's is exact there only
        rows = weights.astype(int)[: 1 if metric == "spearman" else None]
        slow = [[METRICS[metric](np.repeat(x, w, 0), np.repeat(labels, w)) for x in logits] for w in rows]
        np.testing.assert_allclose(score(weights)[: len(slow)], slow, atol=1e-12)


def test_every_metric_of_tasks_can_be_resampled():
    of_sums = {"auc", "exact", "f1_micro", "mrr", "ndcg_at_10", "span_f1"}  # endpoints, and of other kinds
    assert sorted((*COUNTS, *NUMBERS)) == sorted(METRICS) == sorted(set(RANGES) - set(RATIOS) - of_sums)


@pytest.mark.parametrize("metric", METRICS)
def test_resamples_spread_as_those_of_a_loop_do(metric):
    labels, logits = split(2 if metric in COUNTS else 1)
    fast = resampled(metric, logits, labels, 2000, np.random.default_rng(3))
    random, slow = np.random.default_rng(4), []
    strata = [np.flatnonzero(labels == c) for c in np.unique(labels)] if metric in COUNTS else [np.arange(len(labels))]
    for _ in range(400):
        rows = np.concatenate([random.choice(s, len(s)) for s in strata])
        slow.append([METRICS[metric](x[rows], labels[rows]) for x in logits])
    np.testing.assert_allclose(fast.mean(0), np.mean(slow, 0), atol=0.03)
    np.testing.assert_allclose(np.cov(fast.T), np.cov(np.transpose(slow)), atol=0.3 * np.var(slow, 0).max())


@pytest.mark.parametrize("patterns", [3, 60])  # drawn by their counts, and row by row
def test_patterns_are_drawn_as_often_as_they_are_there(patterns):
    counts = np.random.default_rng(patterns).integers(1, 30 if patterns < 10 else 5, patterns)
    total, times = int(counts.sum()), 4000
    drawn = _drawn(counts, times, np.random.default_rng(1))
    assert drawn.shape == (times, patterns)
    assert (drawn.sum(1) == total).all()
    error = np.sqrt(counts * (1 - counts / total) / times)
    assert (abs(drawn.mean(0) - counts) < 5 * error).all()
    expected = np.diag(counts) - np.outer(counts, counts) / total  # the multinomial's
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.15 * counts.max())


def test_resamples_keep_the_classes_and_their_rows():
    counts, strata = np.array([5, 11, 2, 30]), np.array([0, 1, 0, 1])
    drawn = np.concatenate(list(_weights(counts, strata, 50, np.random.default_rng(0))))
    assert drawn.shape == (50, 4)
    assert set(drawn[:, [0, 2]].sum(1)) == {7}
    assert set(drawn[:, [1, 3]].sum(1)) == {41}
    labels, always_one = np.array([0, 1, 1, 1, 0, 1, 1]), np.tile([0.0, 1.0], (7, 1))
    scores = resampled("accuracy", [always_one], labels, 50, np.random.default_rng(0))
    assert set(scores[:, 0]) == {5 / 7}  # the share of a class is no chance


def test_resamples_of_many_classes_need_little_memory():
    """Counts are kept by class, not by pair of classes."""
    tracemalloc.start()
    labels, logits = split(150, runs=4, rows=600)
    resampled("f1_macro", logits, labels, 50, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
