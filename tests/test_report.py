"""The report of a study and of a plain folder: every number again from the files, and the page in a real browser."""

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import synthetic

import loralab
from loralab.cli import main
from loralab.disk import size_text
from loralab.report import charts as ch
from loralab.report import findings, rank_charts, slugs, tables, write
from loralab.report import numbers as n
from loralab.report.tables import to_csv, to_latex, to_markdown
from loralab.study import comparisons, load, summaries

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NASTY = '<script>alert("x")</script> & a|b_{c} ../../up'
PUBLISHED = """paper_or_seed,method,model,task,metric,value,std,epochs,notes
A paper,LoRA,RoBERTa,CoLA,"matthews, best epoch",63.4,1.2,80,<b>copied</b>
A paper,LoRA,RoBERTa,STS-B,pearson,91.5,,,
A paper,LoRA,RoBERTa,QNLI,accuracy,93.3,,25,
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return synthetic.study(folder, seeds=3, tasks=("cola", "stsb"), methods=("full", "lora", "head"))


@pytest.fixture(scope="module")
def written(study):
    """The folder of the report of a study, published numbers beside it."""
    (study / "published.csv").write_text(PUBLISHED)
    return write(study, published=study / "published.csv").parent


@pytest.fixture
def plain(tmp_path):
    """A folder of runs: two seeds of lora at two rates, one of full, an unfinished one and a copy."""
    for seed in (0, 1):
        synthetic.run(tmp_path / f"a/{seed}", seed=seed, lr=1e-3)
        synthetic.run(tmp_path / f"b/{seed}", seed=seed, lr=2e-3)
    synthetic.run(tmp_path / "full", method="full", selection="validation")
    synthetic.run(tmp_path / "again", seed=1, lr=1e-3)
    synthetic.run(tmp_path / "open", seed=5)
    (tmp_path / "open/result.json").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/result.json").write_text('{"of": "something else"}')
    return tmp_path


def table(folder, name):
    return list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_every_number_of_the_results_is_that_of_the_runs(study, written):
    found = {(row["task"], row["method"]): row for row in table(written, "results")}
    for planned in json.loads((study / "study.json").read_text())["planned"]:
        if planned["method"] == "delta-lora":
            continue
        row = found[planned["task"], planned["method"]]
        runs = [
            json.loads((study / "store" / p["address"] / "result.json").read_text())
            for p in json.loads((study / "study.json").read_text())["planned"]
            if (p["task"], p["method"]) == (planned["task"], planned["method"])
        ]
        scores = [run["metric"]["selected"] for run in runs]
        best = [run["metric"]["best_on_validation"] for run in runs]
        assert float(row["mean"]) == pytest.approx(np.mean(scores))
        assert float(row["sd"]) == pytest.approx(np.std(scores, ddof=1))
        assert float(row["inflation"]) == pytest.approx(np.mean(best) - np.mean(scores))
        assert (row["seeds"], row["seed_list"], row["selection"]) == ("3", "0 1 2", "held-out")
        assert int(row["trainable"]) == runs[0]["counts"]["trainable"]
        for key, group in (("examples_per_s", "time"), ("train_s", "time"), ("peak_bytes", "memory")):
            assert float(row[key]) == pytest.approx(np.mean([run[group][key] for run in runs]))
            assert float(row[f"{key}_sd"]) == pytest.approx(np.std([run[group][key] for run in runs], ddof=1))
        assert float(row["step_bytes"]) == np.mean([sum(run["memory"]["ledger"].values()) for run in runs])
        assert int(row["together"]) == (1 if planned["method"] == "full" else 4)
    assert len(found) == 2 * 3 + 12


def test_statistics_are_those_of_the_study_and_each_verdict_is_of_its_own_method(study, written):
    expected = {(s.task, s.method): s for s in summaries(load(study))}
    for row in table(written, "results"):
        s = expected[row["task"], row["method"]]
        assert (float(row["low"]), float(row["high"])) == (pytest.approx(s.low), pytest.approx(s.high))
    tests = {(c.task, c.a): c for c in comparisons(load(study))}
    for row in table(written, "results"):
        c = tests.get((row["task"], row["method"]))
        assert row["verdict"] == (c.verdict if c else "")
        assert row["against"] == ("full" if c else "")
    assert [float(row["p_holm"]) for row in table(written, "comparisons")] == [c.p_holm for c in tests.values()]


def test_a_comparison_seen_from_the_other_side_is_mirrored(study):
    c = comparisons(load(study))[1]
    other = findings.with_first(c, c.b)
    assert (other.a, other.b, other.difference, other.low, other.high) == (c.b, c.a, -c.difference, -c.high, -c.low)
    assert {c.verdict, other.verdict} in ({"better", "worse"}, {c.verdict})
    assert findings.with_first(other, c.a) == c
    assert findings.with_first(c, c.a) is c


def test_the_pareto_front_is_what_nothing_beats():
    points = [(1, 0.5), (2, 0.7), (2, 0.6), (3, 0.7), (4, 0.9), (1, 0.5), (5, 0.1)]
    assert findings.pareto(points) == [True, True, False, False, True, True, False]


def test_numbers_read_as_people_write_them():
    assert n.mean_sd(0.12345, 0.01) == "0.123 ± 0.010"
    assert n.mean_sd(0.12345, math.nan) == "0.123"
    assert n.interval(-0.0123, 0.2) == "−0.012 to 0.200"
    assert [n.signed(math.nan), n.chance(math.nan), n.interval(math.nan, math.nan)] == ["–"] * 3
    assert [n.chance(1e-9), n.chance(0.0312)] == ["< 0.001", "0.031"]
    assert [n.count(887042), n.duration(90), n.duration(5400)] == ["887 k", "90 s", "90 min"]
    sizes = {0: "0 B", 999: "999 B", 999_600: "1 MB", 45_450_000: "45.5 MB", 1.5e9: "1.5 GB", 2.5e12: "2.5 TB"}
    assert {count: size_text(count) for count in sizes} == sizes
    assert n.spans((5, 0, 2, 1)) == "0–2, 5"
    assert (n.seeds([0]), n.seeds([1, 0, 2])) == ("seed 0", "seeds 0–2")
    assert n.spans([3, 5, 6, 7, 9], "-") == "3, 5-7, 9"


# ---- a folder of runs ------------------------------------------------------------------------------------------------


def test_a_plain_folder_mixes_no_two_settings(plain):
    study = findings.read(plain)
    cells = {key[2]: [run.seed for run in cell.runs] for key, cell in study.cells().items()}
    assert cells == {"lora lr=0.001": [0, 1], "lora lr=0.002": [0, 1], "full": [0]}
    assert [note.split()[:2] for note in study.notes] == [["1", "run"], ["1", "run"]]
    page = write(plain).read_text()
    assert "1 of 3 results are optimistic" in page
    assert "validation (optimistic)" in page
    assert "1 of 3 results have one seed" in page
    assert {row["method"] for row in table(plain / "report", "results")} == set(cells)


def test_runs_on_other_rows_or_another_base_are_never_one_cell(tmp_path):
    for name, key in (("a", None), ("b", "data"), ("c", "base_sha256")):
        facts = synthetic.run(tmp_path / name) / "run.json"
        data = json.loads(facts.read_text())
        if key:
            data[key] = {**data["data"], "sha256": "f00d00f00d"} if key == "data" else "beefbeef"
        facts.write_text(json.dumps(data))
    keys = {key[:2] for key in findings.read(tmp_path).cells()}
    assert len(keys) == 3
    assert "cola (data f00d00)" in {task for task, _ in keys}
    assert "mpnet (base beefbe)" in {model for _, model in keys}
    assert findings.findings(findings.read(tmp_path)).comparisons == []


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(loralab.UserError, match="holds no finished run"):
        write(tmp_path)
    with pytest.raises(loralab.UserError, match="no folder"):
        write(tmp_path / "nowhere")
    for text in ("[1, 2]", "{not json", "5", "\0"):  # of another tool
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(loralab.UserError, match="holds no finished run"):
            write(tmp_path)
    empty = synthetic.study(tmp_path, seeds=0)
    with pytest.raises(loralab.UserError, match="nothing to report yet"):
        write(empty)


# ---- published numbers -----------------------------------------------------------------------------------------------


def test_published_numbers_are_apart_and_keep_their_protocol(study, written):
    rows = table(written, "published")
    assert [row["task"] for row in rows] == ["CoLA", "STS-B"]
    assert rows[0]["metric"] == "matthews, best epoch"
    assert rows[0]["epochs"] == "80"
    page = (written / "index.html").read_text()
    before, _, rest = page.partition('<section id="published" class="foreign">')
    assert "63.4" not in before
    assert "63.4 ± 1.2" in rest
    assert "are not compared with the results above" in rest
    for file in ("results", "comparisons", "runs"):
        assert "RoBERTa" not in (written / f"{file}.csv").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("a,b\n1,2\n", "no column paper_or_seed"), (PUBLISHED[:70], "no row is about cola")],
)
def test_published_numbers_that_cannot_be_used_are_refused(study, tmp_path, text, message):
    file = tmp_path / "p.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(loralab.UserError, match=message):
        write(study, tmp_path / "out", file)
    assert not (tmp_path / "out").exists()


# ---- what names from data can do -------------------------------------------------------------------------------------


def test_names_from_data_are_text_and_no_markup_path_or_formula(tmp_path):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        synthetic.run(runs / f"a{seed}", task=NASTY, model="=1+1", seed=seed)
        synthetic.run(runs / f"b{seed}", task=NASTY, model="=1+1", seed=seed, method="full")
    page = write(runs, tmp_path / "out")
    text = page.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    for file in tmp_path.rglob("*"):
        assert file.is_relative_to(runs) or re.fullmatch(r"[a-z0-9-]+(\.[a-z]+)?", file.name), file
    (row, *_) = table(tmp_path / "out", "results")
    assert (row["task"], row["model"]) == (NASTY, "'=1+1")
    lines = (tmp_path / "out/results.md").read_text().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}) == 1
    latex = (tmp_path / "out/results.tex").read_text()
    assert r"\& a|b\_\{c\}" in latex
    assert "<script" not in latex.replace("$<$", "")


def test_file_names_are_each_their_own():
    assert slugs(["A b", "a-b", "ü/../x", "c"]) == ["a-b-0", "a-b-1", "x", "c"]


@pytest.mark.parametrize("writer", [to_csv, to_markdown, to_latex])
def test_every_table_has_a_line_for_every_row(study, writer):
    for made in tables.tables(findings.findings(findings.read(study))):
        lines = {
            to_csv: lambda text: len(text.splitlines()) - 1,
            to_markdown: lambda text: sum(line.startswith("| ") for line in text.splitlines()) - 2,
            to_latex: lambda text: text.count(r" \\") - text.count(r"\toprule"),
        }[writer](writer(made))
        assert lines == len(made.rows) > 0


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_there_when_the_data_has_them(study, written, plain):
    names = {file.stem for file in (written / "plots").iterdir()}
    assert {"bars-speed-mpnet", "bars-memory-mpnet"} <= names
    for what in ("scores-score", "scores-learning-curve", "ranks-rank-curve", "ranks-rank-and-targets-of-lora",
                 "costs-score-against-trainable-parameters", "costs-score-against-time",
                 "costs-score-against-memory"):  # fmt: skip
        assert f"{what}-cola-mpnet" in names
    assert "ranks-rank-curve-stsb-mpnet" not in names
    assert not [name for name in charts_of(plain) if "rank" in name]


def test_one_training_of_many_ranks_is_a_line_of_the_rank_curve(tmp_path):
    made = synthetic.study(tmp_path, seeds=3, tasks=("cola",), methods=("full", "dylora"))
    found = findings.findings(findings.read(made))
    _, figure = rank_charts.curve(findings.points(found.results), found.results)
    (line,) = [drawn for drawn in figure.axes[0].lines if drawn.get_label() == "dylora, one training"]
    (cell,) = [r.cell for r in found.results if r.label == "dylora"]
    for rank, mean in zip(*line.get_data(), strict=True):
        scores = [run.result["by_rank"][str(rank)]["matthews_correlation"] for run in cell.runs]
        assert mean == pytest.approx(np.mean(scores))
    assert list(line.get_xdata()) == [1, 2, 3, 4]


def test_results_of_one_rank_have_lines_of_their_own(tmp_path):
    for rank in (2, 8):
        for lr in (1e-3, 2e-3):
            for seed in (0, 1):
                synthetic.run(tmp_path / f"{rank}-{lr}-{seed}", seed=seed, rank=rank, lr=lr)
    found = findings.findings(findings.read(tmp_path))
    placed = findings.points(found.results)
    assert len(placed) == len(found.results) == 4
    caption, figure = rank_charts.curve(placed, found.results)
    assert "lines of their own" in caption
    drawn = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines}
    assert set(drawn) == {"lora lr=0.001", "lora lr=0.002"}
    for r in found.results:
        settings = r.cell.runs[0].facts["settings"]
        assert drawn[f"lora lr={settings['lr']}"][settings["rank"]] == r.summary.mean


def test_settings_that_change_with_the_rank_split_no_line(tmp_path):
    for rank in (2, 8):
        synthetic.run(tmp_path / str(rank), rank=rank, alpha=2.0 * rank, lr=1e-3 / rank)
    placed = findings.points(findings.findings(findings.read(tmp_path)).results)
    assert {(point.rank, point.variant) for point in placed} == {(2, ""), (8, "")}


def all_charts(found):
    return [*ch.charts(found), *rank_charts.rank_charts(found)]


def charts_of(folder):
    return [chart.name for chart in all_charts(findings.findings(findings.read(folder)))]


def test_a_curve_is_the_mean_of_the_seeds_in_a_band_of_them(study):
    found = findings.findings(findings.read(study))
    (chart,) = [c for c in all_charts(found) if (c.section, c.title) == ("scores", "cola, mpnet: learning curve")]
    (ax,) = chart.fig.axes
    runs = load(study).cells()["cola", "mpnet", "lora"].runs
    values = np.array([[row["validation"]["matthews_correlation"] for row in run.history] for run in runs])
    (line,) = [line for line in ax.lines if line.get_label() == "lora"]
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    bands = [band.get_paths()[0].vertices for band in ax.collections]
    assert any(np.isclose(b[:, 1].max(), values.max()) and np.isclose(b[:, 1].min(), values.min()) for b in bands)


def test_every_metric_that_was_taken_has_a_curve(tmp_path):
    study = synthetic.study(tmp_path, tasks=("mrpc", "cola"), methods=("full", "lora"))
    drawn = {c.title: c.fig.axes[0] for c in all_charts(findings.findings(findings.read(study))) if "curve" in c.title}
    labels = {title: ax.get_ylabel() for title, ax in drawn.items() if "learning" in title}
    assert labels == {
        "mrpc, mpnet: learning curve": "F1",
        "mrpc, mpnet: learning curve, accuracy": "accuracy",
        "cola, mpnet: learning curve": "Matthews",
    }
    of_f1, of_accuracy = (drawn[title].lines[0].get_ydata() for title in list(labels)[:2])
    np.testing.assert_allclose(of_accuracy, of_f1 - synthetic.ACCURACY)


def test_of_many_methods_the_best_and_the_reference_have_lines(tmp_path):
    study = synthetic.study(tmp_path, tasks=("cola",))
    data = json.loads((study / "study.json").read_text())
    renamed = {"full": "the reference", "lora": "another"}  # then no row varies a method that is there
    for planned in data["planned"]:
        planned["method"] = renamed.get(planned["method"], planned["method"])
    (study / "study.json").write_text(json.dumps(data | {"compare": data["compare"] | {"against": "vera"}}))
    found = findings.findings(findings.read(study))
    assert len(found.results) > ch.MANY
    drawn = {c.title.partition(": ")[2]: c for c in all_charts(found)}
    best = sorted(found.results, key=lambda r: -r.summary.mean)[: ch.BEST]
    lines = [line.get_label() for ax in drawn["learning curve"].fig.axes for line in ax.lines]
    assert {label for label in lines if not label.startswith("_")} == {r.label for r in best} | {"vera"}
    assert f"The {ch.BEST} best of {len(found.results)}" in drawn["learning curve"].caption
    cost = drawn["score against trainable parameters"].fig
    points = [(r.cost.trainable, r.summary.mean) for r in found.results]
    front = [r.label for r, on in zip(found.results, findings.pareto(points), strict=True) if on]
    assert [text.get_text() for text in cost.legends[0].get_texts()] == front


def test_pictures_of_memory_are_of_one_runs_step(study):
    found = findings.findings(findings.read(study))
    drawn = {c.title: c.fig.axes[0] for c in all_charts(found)}
    main = [r for r in found.results if " " not in r.label]
    texts = [text.get_text() for text in drawn["mpnet: memory"].texts]
    for r in main:
        assert size_text(r.cost.step_bytes) in texts
        assert size_text(r.cost.peak_bytes) not in texts
    points = {line.get_label(): line.get_xdata()[0] for line in drawn["cola, mpnet: score against memory"].lines}
    assert {r.label: points[r.label] for r in main} == {
        r.label: r.cost.step_bytes for r in main if r.place[0] == "cola"
    }


def test_what_shared_passes_is_said_wherever_time_is_shown(study, written):
    shared = "Runs of lora, head shared passes; each has an equal part of their time."
    drawn = {c.title: c.caption for c in all_charts(findings.findings(findings.read(study)))}
    titles = {title for title, caption in drawn.items() if shared in caption}
    assert titles == {"cola, mpnet: score against time", "stsb, mpnet: score against time", "mpnet: speed"}
    assert "in 16 of 18 results runs shared passes" in (written / "index.html").read_text()


@pytest.mark.parametrize(
    ("head", "cut"), [(0.2, True), (0.59, False)], ids=["far below the others: cut off", "beside them: shown"]
)
def test_a_result_far_below_does_not_press_the_others_together(tmp_path, monkeypatch, head, cut):
    monkeypatch.setitem(synthetic.GOOD, "head", head)
    study = synthetic.study(tmp_path, tasks=("mrpc",), methods=("full", "lora", "dora", "head"))
    shown = [r for r in findings.findings(findings.read(study)).results if " " not in r.label]
    near, far = ch.outliers(shown, "f1")
    assert [r.label for r in far] == ["head"] * cut
    assert [r.label for r in near] == ["full", "lora", "dora", "head"][: 4 - cut]
    styles = ch.styles_of([r.label for r in shown])
    low, high = shown[-1].summary.low, shown[-1].summary.high
    for draw, limits in (
        (ch.intervals, "get_xlim"),
        (ch.by_epoch("f1"), "get_ylim"),
        (ch.against("time"), "get_ylim"),
    ):
        _, _, caption, fig = draw(shown, styles)
        (ax,) = fig.axes
        bottom, top = getattr(ax, limits)()
        assert (high < bottom) == cut
        assert (bottom < low and high < top) == (not cut)
        assert all(bottom < r.summary.mean < top for r in near)
        assert ("Arrow" in caption or "Off the scale: head" in caption) == cut
        assert (n.score(shown[-1].summary.mean) in {text.get_text() for text in ax.texts}) == (
            cut and draw is ch.intervals
        )


# ---- the page --------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [value for key, value in attrs if key == "id"]


def test_the_page_is_whole_in_itself(written):
    text = (written / "index.html").read_text()
    links = Links()
    links.feed(text)
    assert [link for link in links.found if not link.startswith(("#", "data:"))] == []
    assert len(links.ids) == len(set(links.ids))
    assert {link[1:] for link in links.found if link.startswith("#")} <= set(links.ids)
    assert re.findall(r"url\((?!#)[^)]*\)|@import|https?://(?!www\.w3\.org)", text) == []


def test_the_command_says_where_the_page_is(study, tmp_path, capsys):
    assert main(["report", str(study), "--out", str(tmp_path / "out")]) == 0
    assert f"report: {tmp_path / 'out/index.html'}" in capsys.readouterr().out
    assert main(["report", str(study), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["files"]) == {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    assert main(["report", str(tmp_path / "nowhere")]) == 2


PROBE = """
<script>
const table = document.getElementById("t-results"), shown = () => [...table.tBodies[0].rows].filter(r => !r.hidden);
const column = name => [...table.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === name);
const cells = name => shown().map(row => row.cells[column(name)].textContent.trim());
const press = name => table.tHead.rows[0].cells[column(name)].querySelector("button").click();
const out = { theme: document.documentElement.dataset.theme, given: cells("score") };
press("score"); out.falling = cells("score");
press("score"); out.rising = cells("score");
press("score"); out.back = cells("score");
press("method"); out.methods = cells("method");
const filter = document.querySelector('input[data-for="t-results"]');
filter.value = "stsb LORA"; filter.dispatchEvent(new Event("input")); out.filtered = cells("method");
out.count = document.querySelector('.count[data-for="t-results"]').textContent;
document.querySelector('.columns[data-for="t-results"]').click();
out.wide = getComputedStyle(table.tHead.rows[0].cells[column("training")]).display;
document.getElementById("theme").click(); out.switched = document.documentElement.dataset.theme;
out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
out.outside = [...document.querySelectorAll("td, h1, h2, h3, figure, dd, button")].filter(e =>
  e.getClientRects().length && !e.closest(".scroll, nav") && e.getBoundingClientRect().right > innerWidth + 1).length;
out.sideways = Math.max(...[...document.querySelectorAll(".scroll")].map(e => e.scrollWidth - e.clientWidth));
out.width = innerWidth; out.errors = window.failed || [];
const send = document.createElement("pre"); send.id = "outcome"; send.textContent = JSON.stringify(out);
document.body.append(send); parent.postMessage(JSON.stringify(out), "*");
</script>
"""


def browse(page, tmp_path, width):
    """What the page does in a browser window of that width, driven by a script at its end."""
    text = page.read_text()
    catch = "<script>window.failed=[];addEventListener('error',e=>failed.push(e.message));</script></head>"
    (tmp_path / "page.html").write_text(text.replace("</head>", catch, 1).replace("</body>", PROBE + "</body>", 1))
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="outcome"></pre>'
    catch = "addEventListener('message', e => document.getElementById('outcome').textContent = e.data)"
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}<script>{catch}</script></body>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--window-size=1400,1000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    found = re.search(r'<pre id="outcome">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(found[1])


def natural(text):
    """r=2 comes before r=16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_sorts_filters_and_fits_in_a_browser(written, tmp_path, width):
    out = browse(written / "index.html", tmp_path, width)
    assert (out["errors"], out["width"]) == ([], width)
    assert out["theme"] in ("light", "dark")
    assert out["switched"] == {"light": "dark", "dark": "light"}[out["theme"]]
    assert out["falling"] == sorted(out["given"], reverse=True) != out["given"]
    assert out["rising"] == sorted(out["given"])
    assert out["back"] == out["given"]
    assert out["methods"] == sorted(out["methods"], key=natural)
    assert out["filtered"] == ["lora"]
    assert out["count"] == "1 of 18 rows"
    assert out["wide"] != "none"
    assert (out["overflow"], out["outside"]) == (0, 0)
    assert width > 700 or out["sideways"] == 0  # on a telephone a row is a card
