"""What a study says it found: on runs written by hand, whose truth is known, against scipy and a loop."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from loralab.data import METRICS
from loralab.study import Planned, comparisons, load, summaries
from loralab.study.conduct import json_of
from loralab.study.statistics import holm
from loralab.study.statistics.table import verdict

ROWS = 400
SKILLS = {"good": 0.9, "same": 0.9, "bad": 0.6}


def written(folder: Path, cells, against=None, margin=0.02, alpha=0.05) -> Path:
    """A study folder; `cells` gives for (task, method) the runs as (seed, selected, best, predictions or None)."""
    planned = []
    for number, ((task, method), runs) in enumerate(cells.items()):
        for seed, selected, best, kept in runs:
            address = f"{number:08d}{seed:08d}"
            place = folder / "store" / address
            place.mkdir(parents=True)
            metric = {"name": "accuracy", "selected": selected, "last": selected, "best_on_validation": best}
            result = {"metric": metric, "selected_epoch": 1, "warnings": []}
            (place / "result.json").write_text(json.dumps(result))
            (place / "run.json").write_text("{}")
            (place / "metrics.jsonl").write_text("")
            if kept is not None:
                tensors = {"validation/logits": kept[0].astype(np.float32), "validation/labels": kept[1]}
                save_file(tensors, place / "predictions.safetensors")
            planned.append(json_of(Planned(task, "tiny", method, seed, "final", {}, address, {})))
    compare = {"alpha": alpha, "margin": {"default": margin}, "against": against}
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
