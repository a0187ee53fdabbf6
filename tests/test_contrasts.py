"""Planned contrasts: error rates by simulation, moderated variances against limma's equations, and `loralab judge`."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import simulation

from loralab.cli import main
from loralab.errors import UserError
from loralab.study.judge import judge
from loralab.study.statistics import contrasts
from loralab.study.statistics.contrasts import moderated, paired, proportions, smallest_difference

METHODS = ["full", "dora", "vera", "lora-fa", "qlora", "lora+", "delta-lora"]
SPREADS = {"equal": [0.01] * 7, "unequal": [0.004, 0.006, 0.008, 0.01, 0.013, 0.018, 0.03]}
TIMES = 600


def differences(random, spreads, seeds, means=(0.0,) * 7):
    """Of every method (seeds,), correlated as they share the reference's runs."""
    reference = random.normal(0, min(spreads) / 2, seeds)
    return [m + random.normal(0, s, seeds) - reference for s, m in zip(spreads, means, strict=True)]


def families(spreads, seeds=12, means=(0.0,) * 7, collapse=0.0, times=TIMES):
    random = np.random.default_rng(7)
    for _ in range(times):
        drawn = differences(random, spreads, seeds, means)
        kept = [d[random.random(seeds) >= collapse] for d in drawn]  # a collapsed run is counted, not averaged in
        yield paired(METHODS, kept, margin=0.01)


@pytest.mark.few(3)
@pytest.mark.parametrize("seeds", [3, 5, 12])
@pytest.mark.parametrize("collapse", [0.0, 0.05])
@pytest.mark.parametrize("spreads", SPREADS.values(), ids=SPREADS)
def test_a_family_without_differences_finds_one_in_at_most_five_of_a_hundred(spreads, collapse, seeds):
    false = np.mean([any(c.p_holm < 0.05 for c in f) for f in families(spreads, seeds, collapse=collapse)])
    assert false <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / TIMES), "more than chance allows at 99 %"


@pytest.mark.few(1)
@pytest.mark.parametrize("spreads", SPREADS.values(), ids=SPREADS)
def test_intervals_hold_the_truth_as_often_as_they_say(spreads):
    inside = [c.low <= 0 <= c.high for f in families(spreads) for c in f]
    assert np.mean(inside) >= 0.95 - 2.6 * math.sqrt(0.05 * 0.95 / TIMES)


def test_contrasts_of_a_study_err_no_more_than_they_say_with_rows_unequal_spreads_and_collapses():
    """The simulation of docs/studies.md at a smaller number of studies, where it is hardest."""
    found, times = simulation.rates("unequal", 12, 0.05, 150), 150
    chance = 2.6 * math.sqrt(0.05 * 0.95 / times)
    assert found.covered >= 0.93
    assert max(found.false, found.false_equal) <= 0.05 + chance
    assert found.power >= 0.8 - 2.6 * math.sqrt(0.8 * 0.2 / times)


def test_a_true_difference_of_the_smallest_that_can_be_found_is_found_as_often_as_it_says():
    """Of one contrast alone, where Holm's first step is the test."""
    random, found, seeds, sd = np.random.default_rng(3), [], 12, 0.01
    true = smallest_difference(sd / math.sqrt(seeds), seeds - 1)
    for _ in range(2000):
        (c,) = paired(["a"], [random.normal(true, sd, seeds)], margin=0.001)
        found.append(c.verdict == "better")
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("df", [1, 4, 11, 60])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 7])
def test_the_smallest_difference_has_the_power_it_says(df, alpha):
    effect = smallest_difference(1.0, df, alpha)
    limit = stats.t.ppf(1 - alpha / 2, df)
    draws = np.random.default_rng(1)
    t = (draws.normal(effect, 1, 200_000)) / np.sqrt(draws.chisquare(df, 200_000) / df)
    assert np.mean(t > limit) == pytest.approx(0.8, abs=0.01)


def test_equivalence_is_claimed_of_differing_methods_in_at_most_five_of_a_hundred():
    means = (0.01,) * 7  # at the margin
    false = np.mean([any(c.p_equivalent_holm < 0.05 for c in f) for f in families(SPREADS["equal"], means=means)])
    assert false <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / TIMES)


def test_moderated_variances_are_those_of_limma():
    """Against the equations of Smyth (2004), section 6.2, solved by a search instead of Newton's steps; d0 <= d."""
    random, d = np.random.default_rng(5), 9
    s2 = 2e-4 * random.chisquare(d, 40) / d * 3 / random.chisquare(3, 40)
    got, freedom = moderated(s2, [d] * 40)
    z = np.log(s2)
    e = z - special.digamma(d / 2) + np.log(d / 2)
    target = e.var(ddof=1) - special.polygamma(1, d / 2)
    grid = np.exp(np.linspace(-3, 6, 400_001))  # d0 / 2
    half = grid[np.abs(special.polygamma(1, grid) - target).argmin()]
    assert 0.5 < half < d / 2, "this case is one that the cap leaves alone"
    s0 = np.exp(e.mean() + special.digamma(half) - np.log(half))
    np.testing.assert_allclose(got, (2 * half * s0 + d * s2) / (2 * half + d), rtol=1e-3)
    np.testing.assert_allclose(freedom, 2 * half + d, rtol=1e-3)


@pytest.mark.parametrize("y", [1e-7, 1e-3, 0.4, 3.0, 500.0, 1e8])
def test_the_inverse_of_trigamma(y):
    assert special.polygamma(1, contrasts._trigamma_inverse(y)) == pytest.approx(y, rel=1e-4)


def test_a_method_that_differs_by_rounding_leaves_the_others_as_they_are():
    others = [np.array([0.1, 0.2, 0.15]), np.array([0.02, 0.01, 0.05])]
    with_equal = paired(["a", "b", "same"], [*others, np.array([0.3, 0.1 + 0.2, 0.3]) - 0.3], margin=0.01)
    with_zero = paired(["a", "b", "same"], [*others, np.zeros(3)], margin=0.01)
    assert [c.error for c in with_equal] == pytest.approx([c.error for c in with_zero], rel=1e-9)


def test_one_seed_is_not_tested_and_the_others_are():
    found = paired(["a", "b"], [np.array([0.1]), np.array([0.1, 0.2, 0.15])], margin=0.01)
    assert found[0].verdict == "not tested"
    assert math.isnan(found[0].p)
    assert found[1].p == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.15], 0).pvalue)


def test_proportions_are_the_two_sample_test_of_shares():
    (c,) = proportions(["a"], [0.5262], 0.4784, 1319, margin=0.01)
    table = [[694, 1319 - 694], [631, 1319 - 631]]
    assert c.p == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue, abs=2e-3)


# ---- judge -----------------------------------------------------------------------------------------------------------


def results(folder, seeds=6, tasks=("cola", "mrpc"), text="csv"):
    random = np.random.default_rng(2)
    rows = [
        {"who": m, "task": t, "seed": s, "acc": round(0.8 + d + 0.01 * s + random.normal(0, 0.002), 4)}
        for t in tasks
        for m, d in (("lora", 0.0), ("dora", 0.05), ("vera", -0.05), ("qlora", 0.0))
        for s in range(seeds)
    ]
    file = folder / f"results.{text}"
    if text == "json":
        file.write_text(json.dumps(rows))
    elif text == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        comma = "\t" if text == "tsv" else ","
        file.write_text("\n".join(comma.join(map(str, row)) for row in [rows[0], *(r.values() for r in rows)]))
    return file


@pytest.mark.parametrize("text", ["csv", "tsv", "json", "jsonl"])
def test_judge_pairs_by_seed_and_task_the_mean_of_tasks_first(tmp_path, text):
    found = judge(results(tmp_path, text=text), "who", "acc", "seed", "task")
    assert [f.name for f in found.families] == ["mean of tasks", "cola", "mrpc"]
    assert found.reference == "lora"
    for family in found.families:
        verdicts = {c.method: c.verdict for c in family.contrasts}
        assert verdicts == {"dora": "better", "vera": "worse", "qlora": "equal within the margin"}


def test_judge_prints_a_table_and_json(tmp_path, capsys):
    argv = ["judge", str(results(tmp_path)), "--method", "who", "--score", "acc", "--seed", "seed", "--task", "task"]
    assert main(argv) == 0
    assert "3 methods against lora, tested over seeds" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["families"][0]["contrasts"][0]["method"] == "dora"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "whom"}, ["no column", "--method 'whom'", "did you mean 'who'", "acc"]),
        ({"score": "who"}, ["row 1", "no number"]),
        ({"seed": None}, ["second score of lora", "--seed"]),
        ({"reference": "dorra"}, ["--reference 'dorra'", "did you mean 'dora'"]),
        ({"seed": None, "task": "seed"}, ["second score", "--seed"]),
    ],
)
def test_judge_says_what_is_wrong(tmp_path, more, words):
    given = {"method": "who", "score": "acc", "seed": "seed", "task": "task", **more}
    with pytest.raises(UserError) as caught:
        judge(results(tmp_path), **given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_one_run_a_method_needs_the_number_of_rows(tmp_path):
    file = results(tmp_path, seeds=1, tasks=("cola",))
    with pytest.raises(UserError, match="--rows"):
        judge(file, "who", "acc")
    found = judge(file, "who", "acc", rows=200)
    assert found.by == "rows"
    assert {c.verdict for c in found.families[0].contrasts} == {"no difference found"}
    file.write_text("who,acc\nlora,48\ndora,49\n")
    with pytest.raises(UserError, match="share of the rows"):
        judge(file, "who", "acc", rows=200)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "who,acc\n", "no rows"),
        ("a.csv", "", "is empty"),
        ("a.json", "{", "a.json"),
        ("a.jsonl", "[1]\n", "a.jsonl"),
        ("a.txt", "who,acc\nlora,1\n", "ending in"),
    ],
)
def test_judge_refuses_a_file_that_holds_no_results(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        judge(tmp_path / name, "who", "acc", rows=10)
