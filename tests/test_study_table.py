"""What a study says it found: on runs written by hand, whose truth is known, against scipy and a loop."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from loralab.cli.study_tables import show
from loralab.data import METRICS
from loralab.study import ScheduledRun, comparisons, load, summaries
from loralab.study.run_study import json_of
from loralab.study.statistics import contrasts, holm, planned, remarks
from loralab.study.statistics.contrasts import paired
from loralab.study.statistics.table import verdict

ROWS = 400
SKILLS = {"good": 0.9, "same": 0.9, "bad": 0.6}


def written(folder: Path, cells, against=None, margin=0.02, alpha=0.05, **compare) -> Path:
    """A study folder; `cells` gives for (task, method) the runs as (seed, selected, best, predictions or None)."""
    planned = []
    for number, ((task, method), runs) in enumerate(cells.items()):
        for seed, selected, best, kept in runs:
            address = f"{number:08d}{seed:08d}"
            place = folder / "store" / address
            place.mkdir(parents=True)
            metric = {"name": "accuracy", "selected": selected, "last": selected, "best_on_validation": best}
            result = {
                "task": task, "model": "tiny", "method": method, "seed": seed, "metric": metric, "selected_epoch": 1,
                "metrics": {"accuracy": selected}, "warnings": [], "collapsed": False, "protocol": {}, "notes": [],
                "counts": dict.fromkeys(("adapter", "head", "base", "trainable"), 0),
                "time": {"train_s": 1.0, "examples_per_s": 1.0}, "memory": {"peak_bytes": 0, "ledger": {}},
            }  # fmt: skip
            (place / "result.json").write_text(json.dumps(result))
            (place / "run.json").write_text("{}")
            (place / "metrics.jsonl").write_text("")
            if kept is not None:
                tensors = {"validation/logits": kept[0].astype(np.float32), "validation/labels": kept[1]}
                save_file(tensors, place / "predictions.safetensors")
            planned.append(json_of(ScheduledRun(task, "tiny", method, seed, "final", {}, address, {})))
    margins = margin if isinstance(margin, dict) else {"default": margin}
    compare = {"alpha": alpha, "margin": margins, "against": against, **compare}
    study = {
        "name": "s",
        "about": "",
        "store": "store",
        "definition": {},
        "compare": compare,
        "notes": [],
        "planned": planned,
    }
    (folder / "study.json").write_text(json.dumps(study))
    return folder


def predicted(seeds=5):
    """Runs of three methods on one split, by skill: the second is the first with other luck."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, ROWS)
    cells = {}
    for method, skill in SKILLS.items():
        runs = []
        for seed in range(seeds):
            said = np.where(random.random(ROWS) < skill, labels, 1 - labels)
            logits = np.stack([1.0 - said, said], axis=1)
            score = METRICS["accuracy"](logits, labels)
            runs.append((seed, score, score + 0.01 * seed, (logits, labels)))
        cells["t", method] = runs
    return cells


def test_a_cell_is_the_mean_of_its_seeds_with_students_interval(tmp_path):
    found = {s.method: s for s in summaries(load(written(tmp_path, predicted())))}
    for (_, method), runs in predicted().items():
        scores = np.array([run[1] for run in runs])
        low, high = stats.t.interval(0.95, len(scores) - 1, scores.mean(), stats.sem(scores))
        s = found[method]
        assert (s.mean, s.sd, s.seeds_low, s.seeds_high) == pytest.approx(
            (scores.mean(), scores.std(ddof=1), low, high)
        )
        assert s.low <= s.seeds_low
        assert s.high >= s.seeds_high
        assert s.rows == ROWS
        assert s.inflation == pytest.approx(0.02)  # 0.01 times the seed, 0 to 4
        assert s.best_on_validation == pytest.approx(s.mean + 0.02)


def test_methods_are_compared_on_common_seeds_by_the_paired_t_test(tmp_path):
    cells = {key: [(*run[:3], None) for run in runs] for key, runs in predicted().items()}
    cells["t", "bad"] = cells["t", "bad"][1:]
    found = comparisons(load(written(tmp_path, cells)))
    assert [(c.a, c.b) for c in found] == list(itertools.combinations(SKILLS, 2))
    for c in found:
        a, b = ({run[0]: run[1] for run in cells["t", m]} for m in (c.a, c.b))
        seeds = sorted(a.keys() & b.keys())
        test = stats.ttest_rel([a[s] for s in seeds], [b[s] for s in seeds])
        low, high = test.confidence_interval(0.95)
        assert (c.seeds, c.rows, c.mcnemar) == (len(seeds), 0, ())
        assert (c.p, c.low, c.high) == pytest.approx((test.pvalue, low, high))
        assert c.difference == pytest.approx(np.mean([a[s] - b[s] for s in seeds]))


def test_with_predictions_a_p_is_never_surer_and_mcnemar_is_told_for_each_seed(tmp_path):
    cells = predicted()
    with_rows = comparisons(load(written(tmp_path / "a", cells)))
    without = comparisons(load(written(tmp_path / "b", {k: [(*r[:3], None) for r in v] for k, v in cells.items()})))
    for c, plain in zip(with_rows, without, strict=True):
        assert c.rows == ROWS
        assert c.p >= plain.p
        assert len(c.mcnemar) == 5
        right = [[r[3][0].argmax(1) == r[3][1] for r in cells["t", m]] for m in (c.a, c.b)]
        for p, x, y in zip(c.mcnemar, *right, strict=True):
            assert p == pytest.approx(stats.binomtest(int((x & ~y).sum()), int((x ^ y).sum())).pvalue)


def test_verdicts_say_what_is_so(tmp_path):
    found = {(c.a, c.b): c for c in comparisons(load(written(tmp_path, predicted(), margin=0.1)))}
    assert found["good", "bad"].verdict == "better"
    assert found["good", "same"].verdict == "equivalent"
    assert found["good", "same"].within_margin
    assert not found["good", "bad"].within_margin
    assert comparisons(load(tmp_path)) == list(found.values())  # a second look says the same
    narrow = {(c.a, c.b): c for c in comparisons(load(written(tmp_path / "narrow", predicted(), margin=1e-4)))}
    assert narrow["good", "same"].verdict == "indistinguishable"


@pytest.mark.parametrize(
    ("given", "said"),
    [((0.1, 0.01, 1.0), "better"), ((-0.1, 0.01, 1.0), "worse"), ((0.1, 0.2, 0.01), "equivalent"),
     ((0.1, 0.01, 0.01), "better"), ((0.1, 0.2, 0.2), "indistinguishable")],
)  # fmt: skip
def test_a_verdict_is_the_first_that_holds(given, said):
    assert verdict(*given, alpha=0.05) == said


def test_the_correction_is_over_all_tasks(tmp_path):
    one = predicted()
    two = one | {("u", method): runs for (_, method), runs in one.items()}
    alone, both = comparisons(load(written(tmp_path / "1", one))), comparisons(load(written(tmp_path / "2", two)))
    assert len(both) == 2 * len(alone)
    assert {c.task for c in both} == {"t", "u"}
    for c in alone:
        twin = next(x for x in both if (x.task, x.a, x.b) == ("t", c.a, c.b))
        assert (twin.p, twin.difference) == (c.p, c.difference)
        assert twin.p_holm > c.p_holm or c.p_holm == 1


def test_intervals_stay_within_what_a_metric_can_be(tmp_path):
    scores = {"good": [0.99, 1.0, 0.9], "bad": [0.02, 0.0, 0.4]}
    cells = {("t", method): [(i, x, x, None) for i, x in enumerate(own)] for method, own in scores.items()}
    folder = written(tmp_path, cells)
    found = {s.method: s for s in summaries(load(folder))}
    assert (found["good"].high, found["bad"].low) == (1, 0)
    assert found["good"].low < 0.9
    (c,) = comparisons(load(folder))
    assert (c.high, c.low < 0.6) == (1, True)


def test_rows_of_one_class_and_two_seeds_have_no_interval(tmp_path):
    """What does not vary among these rows and seeds is not known to be exact."""
    labels = np.ones(ROWS, dtype=int)
    logits = np.tile([0.0, 1.0], (ROWS, 1))
    one_class = {("t", m): [(i, 1.0, 1.0, (logits, labels)) for i in range(4)] for m in ("a", "b")}
    two_seeds = {("u", m): runs for (_, m), runs in predicted(seeds=2).items()}
    folder = written(tmp_path, one_class | two_seeds)
    for s in summaries(load(folder)):
        assert np.isnan([s.low, s.high, s.seeds_low, s.seeds_high]).all()
    for c in comparisons(load(folder)):
        assert np.isnan([c.low, c.high, c.smallest]).all()


def test_the_smallest_difference_is_that_of_holms_first_step(tmp_path):
    """With what the table's own error and degrees of freedom are; only seeds here."""
    cells = {key: [(*run[:3], None) for run in runs] for key, runs in predicted().items()}
    found = comparisons(load(written(tmp_path, cells)))
    for c in found:
        a, b = (np.array([run[1] for run in cells["t", m]]) for m in (c.a, c.b))
        error = (a - b).std(ddof=1) / np.sqrt(5)
        limit = stats.t.ppf(1 - 0.05 / len(found) / 2, 4)
        assert stats.nct.sf(limit, 4, c.smallest / error) == pytest.approx(0.8, abs=1e-3)


def test_two_names_of_the_same_runs_are_not_tested(tmp_path):
    folder = written(tmp_path, predicted())
    alone = {(c.a, c.b): c for c in comparisons(load(folder))}
    data = json.loads((folder / "study.json").read_text())
    twins = [planned | {"method": "good again"} for planned in data["planned"] if planned["method"] == "good"]
    (folder / "study.json").write_text(json.dumps(data | {"planned": [*data["planned"], *twins]}))
    found = {(c.a, c.b): c for c in comparisons(load(folder))}
    same = found["good", "good again"]
    assert (same.verdict, same.difference, same.seeds) == ("same runs", 0, 5)
    assert np.isnan([same.p, same.p_holm, same.p_equivalent_holm]).all()
    tested = [c for c in found.values() if not np.isnan(c.p)]
    assert len(tested) == len(found) - 1 == 5
    assert [c.p_holm for c in tested] == holm([c.p for c in tested])
    assert found["good", "bad"].p == alone["good", "bad"].p


def test_against_one_method_and_a_single_seed(tmp_path):
    found = comparisons(load(written(tmp_path, predicted(seeds=1), against="bad")))
    assert [(c.a, c.b, c.verdict) for c in found] == [("good", "bad", "one seed"), ("same", "bad", "one seed")]
    assert all(len(c.mcnemar) == 1 and np.isnan(c.p) for c in found)


def test_predictions_of_other_rows_are_not_paired(tmp_path):
    cells = predicted()
    seed, selected, best, (logits, labels) = cells["t", "bad"][0]
    cells["t", "bad"][0] = (seed, selected, best, (logits, 1 - labels))
    found = {(c.a, c.b): c for c in comparisons(load(written(tmp_path, cells)))}
    assert {key: c.rows for key, c in found.items()} == {("good", "same"): ROWS, ("good", "bad"): 0, ("same", "bad"): 0}


# ---- planned contrasts -----------------------------------------------------------------------------------------------


def of_two_tasks(predictions=True):
    one = predicted()
    cells = one | {("u", method): runs for (_, method), runs in predicted(seeds=4).items()}
    return cells if predictions else {key: [(*run[:3], None) for run in runs] for key, runs in cells.items()}


def test_the_first_family_is_on_the_mean_of_tasks_over_common_seeds(tmp_path):
    cells = of_two_tasks(predictions=False)
    mean, by_task = planned(load(written(tmp_path, cells, reference="bad", margin=0.03)))
    assert (mean.name, by_task.name) == ("mean of tasks", "by task")
    assert [c.method for c in mean.contrasts] == ["good", "same"]
    assert [c.method for c in by_task.contrasts] == ["good on t", "same on t", "good on u", "same on u"]
    assert (mean.seeds, by_task.seeds) == ((4, 4), (5, 5, 4, 4))

    def difference(method, task):
        return np.array([a[1] - b[1] for a, b in zip(cells[task, method], cells[task, "bad"], strict=True)])

    expected = [np.mean([difference(m, "t")[:4], difference(m, "u")], axis=0) for m in ("good", "same")]
    assert list(mean.contrasts) == contrasts.paired(["good", "same"], expected, 0.03)
    of_u = [difference(m, task) for task in ("t", "u") for m in ("good", "same")]
    assert [c.p_holm for c in by_task.contrasts] == [c.p_holm for c in contrasts.paired(["x"] * 4, of_u, 0.03)]
    assert planned(load(written(tmp_path / "none", cells))) == []
    (only,) = planned(load(written(tmp_path / "only", cells, reference="bad", family="by task")))
    assert only.name == "by task"


@pytest.mark.parametrize(
    ("metrics", "endpoint", "mean", "by_task"),
    [
        (("accuracy", "accuracy"), "selected", 0.05, (0.05, 0.05)),
        (("accuracy", "accuracy"), "thresholded", 0.05, (0.05, 0.05)),
        (("accuracy", "f1_macro"), "selected", 0.01, (0.05, 0.02)),
        (("accuracy", "f1_macro"), "accuracy", 0.05, (0.05, 0.05)),
        (("f1_macro", "f1_macro"), "selected", 0.02, (0.02, 0.02)),
    ],
)
def test_each_contrast_has_the_margin_of_its_metric_and_says_it(tmp_path, capsys, metrics, endpoint, mean, by_task):
    """The mean of tasks too, where they have one metric; of several the default."""
    margin = {"default": 0.01, "accuracy": 0.05, "f1_macro": 0.02}
    cells = of_two_tasks(predictions=False)
    folder = written(tmp_path, cells, reference="bad", margin=margin, endpoints=[endpoint])
    for file in folder.glob("store/*/result.json"):
        result = json.loads(file.read_text())
        result["metric"]["name"] = dict(zip(("t", "u"), metrics, strict=True))[result["task"]]
        file.write_text(json.dumps(result))
    families = planned(load(folder))
    assert [f.margins for f in families] == [(mean, mean), tuple(m for m in by_task for _ in range(2))]
    for f in families:
        for c, own in zip(f.contrasts, f.margins, strict=True):
            same = contrasts.contrast(c.method, c.difference, c.error, c.df, own)
            assert c.p_equivalent == pytest.approx(same.p_equivalent)
    show(load(folder))
    lines = [line for line in capsys.readouterr().out.splitlines() if " on " in line[:9]]
    assert [f" {m:g} " in line for m, line in zip(families[1].margins, lines, strict=True)] == [True] * 4


def test_names_of_a_study_cannot_steer_the_terminal(tmp_path, capsys):
    plain = of_two_tasks(predictions=False)
    cells = {(f"{task}\x1b[31m", m + "\x9b2J" * (m != "bad")): runs for (task, m), runs in plain.items()}
    folder = written(tmp_path, cells, reference="bad")
    data = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(data | {"notes": ["a note\x1b[2J"]}))
    show(load(folder))
    out = capsys.readouterr().out
    assert set(filter(lambda c: not c.isprintable(), out)) == {"\n"}
    assert "a note\\x1b[2J" in out


@pytest.mark.parametrize("times", [1.0, 1e5, 1e8])
def test_equal_differences_of_scores_of_any_size_do_not_vary(tmp_path, times):
    """What rounding leaves of them is no luck of the seeds; of the mean of tasks neither."""
    scores = {m: [times * 0.1 * s + 0.3 * (m == "a") for s in range(1, 6)] for m in ("a", "lora")}
    cells = {(t, m): [(i, x, x, None) for i, x in enumerate(own)] for t in ("t", "u") for m, own in scores.items()}
    assert np.ptp(np.subtract(scores["a"], scores["lora"])) > 0
    folder = written(tmp_path, cells, reference="lora")
    assert {c.p for c in comparisons(load(folder))} == {2.0**-4}, "the test of flipped signs"
    for family in planned(load(folder)):
        assert {c.verdict for c in family.contrasts} == {"not tested"}


def with_hard_rows(predictions):
    """Runs of two methods on two tasks: some rows are wrong in every seed of a method, some by luck of the seed."""
    random, cells = np.random.default_rng(3), {}
    for task in ("t", "u"):
        labels = random.integers(0, 2, ROWS)
        for method, share in (("a", 0.1), ("lora", 0.25)):
            hard, runs = random.random(ROWS) < share, []
            for seed in range(5):
                said = np.where(hard | (random.random(ROWS) < 0.05), 1 - labels, labels)
                logits = np.stack([1.0 - said, said], axis=1)
                score = METRICS["accuracy"](logits, labels)
                runs.append((seed, score, score, (logits, labels) if predictions else None))
            cells[task, method] = runs
    return cells


def test_rows_make_a_planned_contrast_less_sure_and_nothing_else(tmp_path):
    with_rows = planned(load(written(tmp_path / "a", with_hard_rows(True), reference="lora")))
    without = planned(load(written(tmp_path / "b", with_hard_rows(False), reference="lora")))
    for a, b in zip(with_rows, without, strict=True):
        for x, y in zip(a.contrasts, b.contrasts, strict=True):
            assert (x.method, x.difference, x.df) == (y.method, y.difference, y.df)
            assert x.error > 1.1 * y.error
            assert x.p > y.p
            assert x.smallest > y.smallest
    # rows of two tasks are independent: the mean has a quarter of the sum of their variances
    of_rows = [[x.error**2 - y.error**2 for x, y in zip(a.contrasts, b.contrasts, strict=True)]
               for a, b in zip(with_rows, without, strict=True)]  # fmt: skip
    assert of_rows[0][0] == pytest.approx(sum(of_rows[1]) / 4, rel=1e-6)


def test_a_collapsed_run_is_counted_and_not_averaged_in(tmp_path):
    cells = {("t", m): [(i, x + 0.001 * i * i, x, None) for i in range(6)] for m, x in (("a", 0.8), ("lora", 0.7))}
    cells["t", "a"][2] = (2, 0.1, 0.1, None)
    folder = written(tmp_path, cells, reference="lora")
    for address in ("0000000000000002", "0000000100000004"):
        file = folder / "store" / address / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"collapsed": True}))
    mean, _ = planned(load(folder))
    assert mean.seeds == (4,)
    assert mean.collapsed == (2,)
    assert mean.contrasts[0].difference == pytest.approx(0.1)


def test_endpoints_are_metrics_of_the_results(tmp_path):
    cells = {("t", m): [(i, x + 0.01 * i, x, None) for i in range(3)] for m, x in (("a", 0.8), ("lora", 0.7))}
    folder = written(tmp_path, cells, reference="lora", endpoints=["selected", "f1"])
    for number, file in enumerate(sorted(folder.glob("store/*/result.json"))):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {"f1": 0.1 * number}}))
    found = planned(load(folder))
    assert [(f.name, f.endpoint) for f in found] == [
        (name, endpoint) for endpoint in ("selected", "f1") for name in ("mean of tasks", "by task")
    ]
    assert found[2].contrasts[0].difference == pytest.approx(-0.3)  # a comes first, three seeds before lora


def test_a_method_without_a_task_has_no_mean_of_tasks_and_the_mean_names_its_tasks(tmp_path, capsys):
    """A mean of other tasks is no mean that can stand beside the others."""
    cells = of_two_tasks(predictions=False)
    del cells["u", "same"]
    mean, by_task = families = planned(load(written(tmp_path, cells, reference="bad", margin=0.03)))
    assert [c.method for c in by_task.contrasts] == ["good on t", "same on t", "good on u"]
    show(load(tmp_path))
    assert "nan" not in capsys.readouterr().out
    told = {c.method: (c.verdict, seeds) for c, seeds in zip(mean.contrasts, mean.seeds, strict=True)}
    assert told["same"] == ("not tested", 0)
    assert told["good"][1] == 4
    assert mean.tasks == ("t", "u")
    assert remarks(families, 0.05)[0] == "mean of tasks: t, u"


@pytest.mark.parametrize(("predictions", "unknown"), [("both", []), ("one", [2 * 4]), ("none", [2 * 6])])
def test_contrasts_without_the_luck_of_rows_are_counted(tmp_path, predictions, unknown):
    """Of three contrasts the mean and that on a task do not know it where the runs of that task kept no predictions."""
    cells = {
        key: [(*run[:3], run[3] if (key[0] == "t" and predictions == "one") or predictions == "both" else None)
              for run in runs] for key, runs in with_hard_rows(True).items()
    }  # fmt: skip
    compare = {"reference": "lora", "endpoints": ["selected", "accuracy"]}
    folder = written(tmp_path, cells, **compare)
    for file in folder.glob("store/*/result.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"metrics": {"accuracy": result["metric"]["selected"]}}))
    families = planned(load(folder))
    told = [known for family in families for known in family.rows]
    assert told.count(False) == (unknown[0] // 2 if unknown else 0)
    assert len([line for line in remarks(families, 0.05) if "seeds alone" in line]) == len(unknown)


def test_planned_intervals_stay_within_what_a_difference_can_be(tmp_path):
    """Of a mean of tasks that is the mean of the tasks' ranges; with two seeds there is none."""
    scores = {"a": (0.0, 1.0, 1.0), "lora": (0.0, 0.0, 1.0)}
    cells = {(t, m): [(i, x, x, None) for i, x in enumerate(own)] for t in ("t", "u") for m, own in scores.items()}
    for family in planned(load(written(tmp_path / "three", cells, reference="lora"))):
        for c in family.contrasts:
            assert c.low >= -1
            assert c.high == 1
            assert c.difference + stats.t.ppf(0.975, c.df) * c.error > 1, "it would have gone beyond"
    two = {key: runs[:2] for key, runs in cells.items()}
    for family in planned(load(written(tmp_path / "two", two, reference="lora"))):
        for c in family.contrasts:
            assert np.isnan([c.low, c.high, c.smallest]).all()
            assert 0 < c.p <= 1


@pytest.mark.few(1)
@pytest.mark.parametrize("rows", [0.0, 0.004])
def test_a_family_errs_as_often_as_it_says(rows):
    """Seven methods that are the reference, spreads of one and of five sizes, 6 seeds: any claim in 5 % of studies."""
    random = np.random.default_rng(7)
    names, times = list("abcdefg"), 600
    for spreads in (np.full(7, 0.01), np.linspace(0.004, 0.02, 7)):
        wrong = 0
        for _ in range(times):
            d = [random.normal(random.normal(0, np.sqrt(rows) * 0.1), sd, 6) for sd in spreads]
            found = paired(names, d, 0.01, rows=[rows * 0.01] * 7)
            wrong += any(c.verdict in ("better", "worse") for c in found)
        assert stats.binomtest(wrong, times, 0.05, alternative="greater").pvalue > 1e-3


def test_the_reference_under_another_name_is_no_planned_test(tmp_path):
    """Its difference is 0, the others are tested as without it; where one task alone has the same runs, all counts."""
    folder = written(tmp_path, with_hard_rows(True), reference="lora")
    alone = planned(load(folder))
    data = json.loads((folder / "study.json").read_text())

    def with_twins(tasks):
        twins = [row | {"method": "twin"} for row in data["planned"]
                 if row["method"] == ("lora" if row["task"] in tasks else "a")]  # fmt: skip
        (folder / "study.json").write_text(json.dumps(data | {"planned": [*data["planned"], *twins]}))
        return [dict(zip(f.places, f.contrasts, strict=True)) for f in planned(load(folder))]

    for before, found in zip(alone, with_twins(("t", "u")), strict=True):
        for (method, task), c in found.items():
            if method == "twin":
                assert (c.difference, c.verdict) == (0, "not tested")
                assert np.isnan([c.p, c.p_holm, c.low, c.smallest]).all()
            else:
                assert c == before.contrasts[before.places.index((method, task))]
    mean, by_task = with_twins(("t",))
    assert mean["twin", None].difference == pytest.approx(mean["a", None].difference - by_task["a", "t"].difference / 2)
    assert mean["twin", None].p > 0
    assert (by_task["twin", "t"].verdict, by_task["twin", "t"].difference) == ("not tested", 0)
    assert by_task["twin", "u"].p == by_task["a", "u"].p
