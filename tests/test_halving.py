"""Halving over seeds, what a study that uses it keeps, and what it says it can find before it runs."""

import dataclasses
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import synthetic
from scipy import stats

from loralab import UserError
from loralab.run.loop import Loop
from loralab.study import load
from loralab.study.bar import StudyBar
from loralab.study.definition import KEPT, grid_points
from loralab.study.failures import message
from loralab.study.halving import EXTENSION, beyond, halving
from loralab.study.packed import FILE, PREDICTIONS
from loralab.study.power import power, upper
from loralab.study.record import Run, ScheduledRun
from loralab.study.results import as_data, outline
from loralab.study.run_study import run_study
from loralab.study.runners import runner
from loralab.study.schedule import can_be, cells, schedule
from loralab.study.search import WORST
from loralab.study.statistics import planned
from loralab.study.toml import define

RATES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
POINTS = [{"lr_times": x} for x in RATES]
SEEDS = (1000, 1001)


def carried_on(truth):
    """Run what halving asks for until it asks for nothing more; (state, {(rate, seed): score} of what was run)."""
    known: dict[tuple[float, int], float] = {}

    def score(point, seed):
        return known.get((point["lr_times"], seed))

    while True:
        state = halving(POINTS, SEEDS, score)
        wanted = {(t.tried["lr_times"], t.seed) for t in state.trials if t.tried is not None} - known.keys()
        if not wanted:
            return state, known
        known |= {key: truth(*key) for key in wanted}


# ---- the search ------------------------------------------------------------------------------------------------------


def test_the_best_of_one_seed_go_on_to_the_second_and_the_mean_of_both_decides():
    first = dict(zip(RATES, [0.1, 0.5, 0.8, 0.7, 0.6, 0.0], strict=True))
    second = {1.0: 0.3, 3.0: 0.9, 10.0: 0.8}
    state, known = carried_on(lambda rate, seed: first[rate] if seed == 1000 else second[rate])
    assert {rate for rate, seed in known if seed == 1001} == {1.0, 3.0, 10.0}
    assert state.chosen == {"lr_times": 3.0}  # 0.8, where the leader of the first seed has 0.55
    assert [t.rung for t in state.trials] == ["1"] * 6 + ["2"] * 3


@pytest.mark.parametrize("best", [0, 5])
def test_a_winner_at_the_edge_extends_the_grid_there_once(best):
    edge = RATES[best]
    state, known = carried_on(lambda rate, seed: -abs(math.log(rate / (edge * (30 if best else 1 / 30)))))
    more = [rate for rate, _ in known if rate not in RATES]
    assert len(set(more)) == 2
    assert all((rate > 30) if best else (rate < 0.1) for rate in more)
    assert {t.rung for t in state.trials if t.tried["lr_times"] in more} == {EXTENSION}
    assert state.chosen == {"lr_times": (max if best else min)(more)}  # and it is not extended again
    within = sorted([edge, *set(more)])
    ratios = [b / a for a, b in pairwise(within)]
    assert ratios == pytest.approx([(30 / 0.1) ** (1 / 5)] * 2, rel=0.05)


def test_an_extension_that_is_worse_leaves_the_winner():
    state, _ = carried_on(lambda rate, seed: rate if rate <= 30 else 0.0)
    assert state.chosen == {"lr_times": 30.0}
    assert beyond(POINTS, {"lr_times": 1.0}) == []


@pytest.mark.parametrize(
    ("grid", "best", "expected"),
    [
        ({"rank": [1, 2, 4]}, 4, [8, 16]), ({"rank": [1, 2, 4]}, 1, []), ({"rank": [4, 8, 16]}, 4, [2, 1]),
        ({"rank": [8, 9, 10]}, 10, [11, 13]), ({"rank": [2, 3, 4]}, 2, [1]), ({"batch_size": [10, 20, 40]}, 10, [5, 2]),
        ({"epochs": [2, 3, 4]}, 4, [6, 8]), ({"dropout": [0.2, 0.5, 0.9]}, 0.9, []),
        ({"dropout": [0.1, 0.2, 0.5]}, 0.1, [0.045, 0.02]), ({"warmup": [0.1, 0.2, 0.4]}, 0.4, [0.8]),
        ({"lr_times": [1, 2, 4]}, 4, [8.0, 16.0]),
    ],
    ids=str,
)  # fmt: skip
def test_an_extension_has_values_that_the_setting_can_have(grid, best, expected):
    """Whole numbers stay whole and differ, and what no run can have is left out: with it the study could not go on."""
    ((key, values),) = grid.items()
    table = {"tasks": ["cola"], "methods": ["lora"], "tune": {"search": "halving", **grid}}
    (cell,) = cells(define(table, "x", Path()))
    score = {x: -abs(math.log(x / best)) for x in values}
    asked = grid_points(cell.grid), SEEDS, lambda point, seed: score.get(point[key], -9.0)
    state = halving(*asked, lambda point: can_be(cell, point))
    more = [t.tried[key] for t in state.trials if t.rung == EXTENSION and t.seed == 1000]
    assert more == expected
    assert [type(x) for x in more] == [type(x) for x in expected]
    assert state.chosen == {key: best}


@pytest.mark.parametrize("place", range(6))
def test_a_rate_that_is_out_on_the_first_seed_is_not_tried_on_the_second(place):
    state, known = carried_on(lambda rate, seed: WORST if rate == RATES[place] else -abs(math.log(rate / RATES[place])))
    assert (RATES[place], 1001) not in known
    assert state.chosen is not None
    assert state.chosen["lr_times"] != RATES[place]


def test_a_leader_that_is_out_on_the_second_seed_is_not_chosen():
    state, _ = carried_on(lambda rate, seed: WORST if (rate, seed) == (3.0, 1001) else -abs(math.log(rate / 3)))
    assert state.chosen in ({"lr_times": 1.0}, {"lr_times": 10.0})


def test_where_every_rate_is_out_nothing_is_chosen():
    state, known = carried_on(lambda rate, seed: WORST)
    assert state.stuck
    assert (state.chosen, len(known)) == (None, 6)


@pytest.mark.parametrize(("failed", "alive"), [(0, 0), (0, 1), (1, 0), (1, 1), (9, 0)])
def test_the_end_of_tuning_without_a_winner_says_what_it_was(tmp_path, failed, alive):
    """--retry is named where a run failed; where values collapsed, on a second seed perhaps, it runs nothing again."""
    folder = synthetic.planned(tmp_path, seeds=2, tasks=("cola",), methods=("lora", "head"))
    data = json.loads((folder / "study.json").read_text())
    own = [entry for entry in data["planned"] if entry["method"] == "lora"]
    for place, entry in enumerate(e for e in own if e["role"] == "tune"):
        run = folder / "store" / entry["address"]
        if not failed <= place < failed + alive:
            synthetic._edit(run, 0.0, lost=True)
        if place < failed:
            (run / "result.json").unlink()
            (run / "failed.json").write_text(json.dumps({"error": "loss is nan"}))
    for entry in own:
        if entry["role"] == "final":
            entry.update(address=None, settings=None)
    (folder / "study.json").write_text(json.dumps(data))
    said = message(load(folder))
    assert "cola mpnet lora" in said
    assert ("--retry" in said) == (failed > 0)
    assert ("gives the same for every row on a seed of tuning" in said) == (failed == 0)
    assert ("no tuning run worked" in said) == (failed > 0)


# ---- a study ---------------------------------------------------------------------------------------------------------


def table(tiny, own, **given):
    """The verdict study at toy size: two methods, two tasks, two seeds, everything else as it is registered."""
    columns = {"text": "sentence", "label": "label"}
    return {
        "tasks": [
            {"name": "animals", "task": str(own["class"]), "train_rows": 150, **columns},
            {"name": "scores", "task": str(own["value"]), "train_rows": 150, **columns},
        ],
        "models": [str(tiny)], "seeds": [0, 1], "registered": True, "packed": True, "adapters": False,
        "protocol": {"epochs": 4, "max_length": 32, "batch_size": 20, "held_out": "unused", "lr": 1e-2},
        "methods": [{"name": "LoRA", "method": "lora", "rank": 3}, {"name": "DoRA", "method": "dora", "rank": 3}],
        "tune": {"search": "halving", "lr_times": [0.5, 1.0, 2.0]},
        "compare": {"reference": "LoRA", "endpoints": ["thresholded", "auc-or-pearson", "log_likelihood"], "sd": 0.02},
        **given,
    }  # fmt: skip


def study(tiny, own, **given):
    return define(table(tiny, own, **given), "verdict", Path())


def carried_out(definition, out):
    return run_study(definition, out, runner("together"), StudyBar())


def compared(found):
    """What two ways to the same study must share: the score of every run, and the contrasts."""
    runs = {(s.key, s.seed, s.role, str(s.tried)): found.run(s).selected for s in found.schedule}
    return runs, [c.difference for family in planned(found) for c in family.contrasts]


@pytest.fixture(scope="module")
def whole(tiny, own, tmp_path_factory):
    """The study, done without a break, in a folder with its store; its runs keep their predictions."""
    folder = tmp_path_factory.mktemp("whole")
    return carried_out(study(tiny, own, packed=False, store=str(folder / "store")), folder / "out")


def test_the_dry_run_of_a_study_by_halving_names_runs_and_power(tiny, own, tmp_path):
    d = study(tiny, own, store=str(tmp_path / "store"))
    before = outline(d, schedule(d))
    assert before["runs"] == 2 * 2 * (3 + KEPT + 2)
    assert [(p["family"], p["tests"]) for p in before["power"]] == [("mean of tasks", 1), ("by task", 2)]


def test_halving_chooses_among_what_it_ran_and_the_contrasts_are_planned(whole):
    for cell in whole.cells().values():
        rungs = [run.scheduled.rung for run in cell.tuning]
        assert (rungs.count("1"), 1 <= rungs.count("2") <= KEPT) == (3, True)
        tried = {run.scheduled.tried["lr_times"] for run in cell.tuning}
        chosen = {run.scheduled.tried["lr_times"] for run in cell.runs}
        assert (len(chosen), chosen <= tried) == (1, True)
        assert not {run.seed for run in cell.tuning} & {0, 1}
    families = planned(whole)
    assert [(f.name, f.endpoint) for f in families] == [
        (name, endpoint)
        for endpoint in ("thresholded", "auc-or-pearson", "log_likelihood")
        for name in ("mean of tasks", "by task")
    ]
    assert [len(f.contrasts) for f in families[:2]] == [1, 2]
    assert len(json.loads(json.dumps(as_data(whole)))["planned_contrasts"]) == 6


def test_predictions_of_reported_runs_are_in_one_file_and_tuning_keeps_scores(whole, tiny, own, tmp_path):
    shutil.copytree(whole.folder.parent, tmp_path / "copy")
    packed = carried_out(study(tiny, own, store=str(tmp_path / "copy/store")), tmp_path / "copy/out")
    assert not list((tmp_path / "copy/store").rglob(PREDICTIONS))
    plain = sum(file.stat().st_size for file in whole.store.rglob(PREDICTIONS))
    assert 0 < (packed.folder / FILE).stat().st_size < plain / 4
    for key, cell in packed.cells().items():
        for run, same in zip(cell.runs, whole.cells()[key].runs, strict=True):
            assert run.predictions.keys() == same.predictions.keys()
            for split, kept in run.predictions.items():
                np.testing.assert_array_equal(kept.labels, same.predictions[split].labels)
                np.testing.assert_allclose(kept.logits, same.predictions[split].logits, rtol=1e-3, atol=1e-3)
        assert all(run.predictions is None for run in cell.tuning)
    assert compared(packed) == compared(whole)
    (packed.folder / FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        _ = load(packed.folder).packed


@pytest.mark.parametrize(
    ("said", "out"),
    [({"collapsed_held_out": True}, True), ({"collapsed": True}, False), ({"collapsed": True, "older": True}, True)],
    ids=["held-out rows", "reported rows", "reported rows of an older version"],
)
def test_a_rate_whose_run_collapsed_on_the_second_seed_is_not_chosen(whole, tiny, own, tmp_path, said, out):
    """The stored study with one word more in a result: the winner of a cell predicts one class on seed 1001."""
    shutil.copytree(whole.folder.parent, tmp_path / "copy")
    d = study(tiny, own, store=str(tmp_path / "copy/store"))

    def rates():
        return {s.key: s.tried.get("lr_times") for s in schedule(d) if s.role == "final"}

    before = rates()
    (key, cell) = next(iter(whole.cells().items()))
    lost = next(r for r in cell.tuning if r.seed == 1001 and r.scheduled.tried["lr_times"] == before[key])
    file = tmp_path / "copy/store" / lost.scheduled.address / "result.json"
    result = json.loads(file.read_text()) | said
    assert result["collapsed_held_out"] is not None
    if result.pop("older", False):
        del result["collapsed_held_out"]
    file.write_text(json.dumps(result))
    after = rates()
    assert (after.pop(key) != before.pop(key)) == out
    assert after == before
    counted = [load(folder).cells()[key].tuning_collapsed for folder in (whole.folder, tmp_path / "copy/out")]
    assert counted[1] == counted[0] + out


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_end(whole, tiny, own, tmp_path, monkeypatch):
    """In the first rung, in a later one, and among the reported runs: after so many steps of the loop."""
    d = study(tiny, own, store=str(tmp_path / "store"))
    step, left = Loop.step, [20]

    def counted(self):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return step(self)

    monkeypatch.setattr(Loop, "step", counted)
    stages = []
    for after in (20, 75, 90):
        left[0] = after
        with pytest.raises(Killed):
            carried_out(d, tmp_path / "out")
        stages.append({(s.role, s.rung) for s in load(tmp_path / "out").schedule if s.address is not None})
    assert stages[0] < stages[-1]  # they were different stages
    resumed = carried_out(d, tmp_path / "out")
    first, second = compared(resumed), compared(whole)
    assert first[0].keys() == second[0].keys()
    for key, score in first[0].items():
        assert score == pytest.approx(second[0][key], abs=1e-4)


def test_a_grid_that_halving_cannot_order_is_named(tiny, own):
    for grid in ({"lr_times": [1.0, 2.0]}, {"rank": [1, 2, 3], "lr_times": [1.0, 2.0, 3.0]}, {"schedule": ["linear"]}):
        with pytest.raises(UserError, match="search = 'halving' takes one setting with 3 or more numbers"):
            study(tiny, own, tune={"search": "halving", **grid})


# ---- power -----------------------------------------------------------------------------------------------------------


def test_what_a_study_can_find_is_found_as_often_as_promised(tiny, own):
    """By simulation: normal differences of the stated spread, tested at Holm's first step."""
    d = study(tiny, own, seeds=list(range(12)), methods=[{"name": f"m{i}", "rank": i + 1} for i in range(5)],
              compare={"reference": "m0", "sd": 0.02})  # fmt: skip
    for found in power(d, []):
        tasks = 2 if found.family == "mean of tasks" else 1
        random = np.random.default_rng(3)
        draws = random.normal(0, found.sd / math.sqrt(tasks), (4000, found.seeds))

        def p(shift, draws=draws):
            return stats.ttest_1samp(draws + shift, 0, axis=1).pvalue

        assert np.mean(p(found.smallest) < 0.05 / found.tests) == pytest.approx(0.8, abs=0.03)
        low, high = (
            stats.ttest_1samp(draws, bound, axis=1, alternative=side).pvalue
            for bound, side in ((-found.margin, "greater"), (found.margin, "less"))
        )
        assert np.mean(np.maximum(low, high) < 0.05 / found.tests) == pytest.approx(0.8, abs=0.04)
        assert found.source == "the file"
    assert {p.source for p in power(study(tiny, own, compare={"reference": "LoRA"}), [])} == {"unknown"}


def finished(method, scores, role="final", task="a"):
    """Finished runs of a method, as far as `power` looks at them."""
    return [
        Run(ScheduledRun(task, "m", method, seed, role, {}, "x", {}), Path(), {"metric": {"selected": x}}, [], {})
        for seed, x in enumerate(scores)
    ]


def found_with(tiny, own, runs, **compare):
    d = study(tiny, own, seeds=list(range(12)), methods=[{"name": n, "rank": i + 1} for i, n in enumerate("rab")],
              compare={"reference": "r", **compare})  # fmt: skip
    return power(dataclasses.replace(d, models=("m",)), runs)[0]


def test_few_runs_do_not_replace_what_the_file_expects(tiny, own):
    base, five, six = [0.5] * 7, [0.51, 0.50, 0.52, 0.50, 0.51], [0.51, 0.50, 0.52, 0.50, 0.51, 0.53]
    for runs, expected in (
        ([], ("the file", 0.02, 0)),
        (finished("r", base) + finished("a", five), ("the file", 0.02, 0)),
        (finished("r", base, "tune") + finished("a", six + six[:1], "tune"), ("the file", 0.02, 0)),
        (finished("r", base) + finished("a", six), ("finished runs", None, 6)),
        (finished("r", base) + finished("a", six) + finished("b", five), ("finished runs", None, 11)),
    ):
        got = found_with(tiny, own, runs, sd=0.02)
        assert (got.source, got.differences) == (expected[0], expected[2])
        if expected[1] is not None:
            assert got.sd == expected[1]
    few = found_with(tiny, own, finished("r", base) + finished("a", five[:2]))
    assert (few.source, few.differences) == ("finished runs", 2)
    assert few.sd > 3 * np.std(five[:2], ddof=1)  # two differences say little
    assert found_with(tiny, own, finished("r", base) + finished("a", base)).source == "unknown"  # all equal


@pytest.mark.parametrize("freedom", [1, 3, 5, 20])
def test_the_spread_that_runs_show_is_above_the_true_one_four_times_in_five(freedom):
    """By simulation; so power that is promised from few runs is kept, instead of missed in half of the studies."""
    squares = 0.02**2 * np.random.default_rng(freedom).chisquare(freedom, 4000)
    above = np.mean([upper(s, freedom) >= 0.02 for s in squares])
    assert above == pytest.approx(0.8, abs=0.025)
    assert upper(0.02**2 * 1e4, 10**4) == pytest.approx(0.02, rel=0.01)
