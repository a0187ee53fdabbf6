"""The report of planned contrasts: every number again from the runs, and what the pictures show."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic

from loralab.errors import UserError
from loralab.report import write
from loralab.report.charts import after_epochs, read_once, styles_of
from loralab.report.findings import findings
from loralab.report.planned_charts import FAR, _chosen, forest, rates, reach, tried
from loralab.report.planned_table import contrasts
from loralab.report.style import styled
from loralab.study import load
from loralab.study.record import collapses, read_run
from loralab.study.search import score

TASKS = ("cola", "mrpc", "stsb")
METHODS = ("lora", "full", "dora", "vera", "head")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return load(synthetic.planned(tmp_path_factory.mktemp("planned"), seeds=5, tasks=TASKS, methods=METHODS))


@pytest.fixture(scope="module")
def found(study):
    return findings(study)


def differences(study, method, task):
    """Seed by seed, of the runs that learned something on both sides."""
    a, b = (
        {r.seed: r.selected for r in study.cells()[task, "mpnet", label].runs if not r.result["collapsed"]}
        for label in (method, "lora")
    )
    return np.array([a[s] - b[s] for s in sorted(a.keys() & b.keys())])


def test_the_table_has_each_contrast_with_its_numbers(study, found):
    table = contrasts(found)
    rows = {(r.method, r.task): r for r in table.rows}
    others = [m for m in METHODS if m != "lora"]
    assert list(rows) == [(m, "mean of tasks") for m in others] + [(m, t) for t in TASKS for m in others]
    shown = {column.title: column for column in table.columns}
    for (method, task), row in rows.items():
        if task != "mean of tasks":
            expected = differences(study, method, task)
            assert row.contrast.difference == pytest.approx(expected.mean())
            assert shown["difference"].sort(row) == pytest.approx(expected.mean())
            tuned = study.cells()[task, "mpnet", method].tuning
            assert row.tuning_collapsed == sum(run.result["collapsed"] for run in tuned)
            costs = [sum(r.result["memory"]["ledger"].values()) for r in study.cells()[task, "mpnet", method].runs]
            assert row.mean("step_bytes") == pytest.approx(np.mean(costs))
    lost = {key: row.family.collapsed[row.place] for key, row in rows.items()}
    assert lost["vera", "cola"] == lost["vera", "mean of tasks"] == 1
    assert sum(lost.values()) == 2
    assert rows["vera", "cola"].family.seeds[rows["vera", "cola"].place] == 4
    best = {"vera": 0.09, "full": 1e-4}
    for method, rate in best.items():
        assert shown["best rate"].show(rows[method, "cola"]) == f"{rate:g}"


def test_an_interval_over_seeds_is_no_wider_than_one_over_seeds_and_rows(found):
    for family in found.planned:
        for c, of_seeds in zip(family.contrasts, family.errors_of_seeds, strict=True):
            assert 0 < of_seeds <= c.error


def test_the_forest_has_a_line_for_each_contrast_and_arrows_for_those_far_off(found):
    with styled():
        ax = forest(found.planned).axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["mean of tasks", *TASKS] * 4
    arrows = [text.get_text() for text in ax.texts if text.get_text().startswith(("−", "+"))]
    far = [c for f in found.planned for c in f.contrasts if c.method.startswith("head")]
    assert len(arrows) == len(far) == 4  # the head lies 0.4 below; the others within 0.05
    assert ax.get_xlim()[1] < 0.1
    low, high = ax.get_xlim()
    near = [c for f in found.planned for c in f.contrasts if not c.method.startswith("head")]
    assert all(low < c.low and c.high < high for c in near)


def test_a_bar_that_goes_on_beyond_the_axis_ends_in_an_arrow(found):
    """A bar that is cut at the edge looks like one that ends there."""
    family = found.planned[0]
    wide = replace(family.contrasts[0], low=-9.0, high=9.0)
    rest = [replace(c, low=c.difference - 0.01, high=c.difference + 0.01) for c in family.contrasts[1:]]
    with styled():
        ax = forest([replace(family, contrasts=(wide, *rest))]).axes[0]
    marks = sorted(line.get_marker() for line in ax.lines if line.get_marker() in "<>" and line.get_markersize() == 4)
    assert marks == ["<", ">"]
    assert ax.get_xlim()[1] < 1


@pytest.mark.parametrize("methods", [METHODS[:2], tuple(synthetic.GOOD)], ids=["one picture", "small pictures"])
def test_the_axis_of_rates_has_numbers(tmp_path, methods):
    """Over a decade or five, of one method or of seven with rates of their own."""
    found = findings(load(synthetic.planned(tmp_path, seeds=2, tasks=("cola",), methods=methods)))
    with styled():
        _, fig = rates(found.places()["cola", "mpnet"], styles_of(found.methods))
    fig.canvas.draw()
    low, high = fig.axes[0].get_xlim()
    below = [
        ax for ax in fig.axes if ax.get_visible() and any(t.label1.get_visible() for t in ax.xaxis.get_major_ticks())
    ]
    assert len(below) == min(len(methods), 3) if len(methods) > 5 else 1
    for ax in below:
        shown = [t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high and t.get_text()]
        assert 2 <= len(shown) <= 6


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_study_that_knows_little_makes_its_page(tmp_path):
    """Two seeds, a method without a task, one whose every tuning run collapsed: no warning, and the table says so."""
    folder = synthetic.planned(tmp_path, seeds=2, tasks=("cola", "mrpc"), methods=METHODS)
    data = json.loads((folder / "study.json").read_text())
    for entry in data["planned"]:
        if entry["method"] == "dora" and entry["role"] == "tune" and entry["task"] == "cola":
            synthetic._edit(folder / "store" / entry["address"], 0.0, lost=True)
    data["planned"] = [p for p in data["planned"] if (p["method"], p["task"]) != ("full", "mrpc")]
    (folder / "study.json").write_text(json.dumps(data))
    write(folder, tmp_path / "report")
    rows = {(row["method"], row["task"]): row for row in csv.DictReader((tmp_path / "report/planned.csv").open())}
    assert {row["low"] for row in rows.values()} == {"nan"}
    assert rows["full", "mean of tasks"]["verdict"] == "not tested"
    assert rows["dora", "cola"]["collapsed_in_tuning"] == "9"


@pytest.mark.parametrize(
    ("compare", "reference"),
    [({}, "full"), ({"reference": "dora"}, "dora"), ({"reference": "dora", "against": "vera"}, "vera")],
)
def test_verdicts_are_against_the_method_that_the_study_names(study, compare, reference):
    plain = {key: value for key, value in study.compare.items() if key not in ("reference", "against")}
    found = findings(replace(study, compare=plain | {"against": None} | compare))
    assert {r.against for r in found.results} == {reference, None}
    for r in found.results:
        assert (r.against is None) == (r.label == reference)
        assert r.comparison is None or (r.comparison.a, r.comparison.b) == (r.label, reference)


def test_an_axis_of_one_contrast_holds_it(found):
    c = found.planned[0].contrasts[0]
    assert reach([(c, 0.01, 0.01, "x")]) >= max(abs(c.low), abs(c.high), 0.01)
    assert FAR > 1


@pytest.mark.parametrize("lines", [None, [], [1], [1, 3]], ids=["no file", "empty", "cut off", "without the selected"])
def test_a_tuning_run_without_its_epochs_is_named(tmp_path, lines):
    """With what to do: the report, and the study that would choose by it, ended in a StopIteration."""
    folder = synthetic.planned(tmp_path, seeds=2, tasks=("cola",), methods=("lora", "head"))
    run = load(folder).cells()["cola", "mpnet", "lora"].tuning[1]
    file = run.folder / "metrics.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    assert run.result["selected_epoch"] == 2
    file.unlink() if lines is None else file.write_text("".join(rows[epoch - 1] for epoch in lines))
    for look in (lambda: write(folder, tmp_path / "report"), lambda: score(read_run(run.folder.parent, run.scheduled))):
        with pytest.raises(UserError, match=f"{run.folder}: metrics.jsonl .* epoch 2: remove the folder"):
            look()


def test_rates_are_drawn_as_they_were_tried(found):
    results = found.places()["cola", "mpnet"]
    with styled():
        caption, fig = rates(results, styles_of(found.methods))
    ax = fig.axes[0]
    drawn = {line.get_label(): line.get_xydata() for line in ax.lines if not line.get_label().startswith("_")}
    assert {r.label for r in results} - drawn.keys() == {r.label for r in results if f"scale: {r.label}," in caption}
    for r in results:
        if r.label not in drawn:
            continue
        expected = {}
        for rate, runs in tried(r).items():
            if not any(map(collapses, runs)):
                name = runs[0].result["metric"]["name"]
                expected[rate] = np.mean([x.history[x.result["selected_epoch"] - 1]["held_out"][name] for x in runs])
        assert dict(map(tuple, drawn[r.label])) == pytest.approx(expected)
        assert _chosen(r) in expected
    assert {1e-3, 3e-3}.isdisjoint(drawn["full"][:, 0])  # two of its rates collapsed
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert sorted(x for line in crosses for x in line.get_xdata()) == pytest.approx([1e-3, 3e-3])


def test_a_learning_curve_is_of_held_out_rows_where_validation_was_read_once(found):
    run = found.results[0].cell.runs[0]
    rows = [row | {"validation": row["validation"] if row["epoch"] == 2 else {}} for row in run.history]
    once = replace(run, history=rows)
    assert [read_once(run), read_once(once)] == [False, True]
    assert after_epochs(once) == [row["held_out"] for row in rows]
    assert after_epochs(run) == [row["validation"] for row in run.history]


def test_the_page_leads_with_the_answer(study, tmp_path):
    page = write(study.folder, tmp_path / "report").read_text()
    places = [page.index(f'<section id="{name}"') for name in ("contrasts", "planned", "rates", "results")]
    assert places == sorted(places)
    rows = list(csv.DictReader((tmp_path / "report/planned.csv").open()))
    assert len(rows) == 4 * (1 + len(TASKS))
    assert all(math.isfinite(float(row["difference"])) for row in rows)
    assert (tmp_path / "report/planned.md").read_text().count("\n| ") == len(rows) + 2
