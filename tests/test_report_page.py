"""What a reader of a report meets first: alarms, legends, many curves, tables of a paper."""

import json

import numpy as np
import pytest
import synthetic

from loralab.report import charts as ch
from loralab.report import findings, multiples, page, published, style, tables
from loralab.report.tables import to_latex


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return synthetic.study(tmp_path_factory.mktemp("study"), seeds=3, tasks=("cola", "stsb"), methods=("full", "lora"))


def test_columns_that_are_the_same_in_every_row_go_into_the_caption_of_latex(study):
    made = tables.tables(findings.findings(findings.read(study)))[0]
    text = to_latex(made)
    caption = next(line for line in text.splitlines() if line.startswith(r"\caption"))
    head = text.split(r"\toprule")[1].splitlines()[1]
    for column in (c for c in made.columns if c.short):
        shown = {column.show(row) for row in made.rows}
        same = len(shown) == 1
        told = f"{column.title}: {min(shown)}".translate(tables.LATEX)
        assert (told in caption) == same, column.title
        assert (column.title.translate(tables.LATEX) in head.removesuffix(r" \\").split(" & ")) == (not same)
    assert "model: mpnet" in caption


@pytest.mark.parametrize("rows", [0, 1, 39, 40, 41, 93])
def test_many_rows_of_latex_are_divided_into_tables_of_a_page(rows):
    columns = [tables.Column("row", lambda i: f"row{i}"), tables.Column("half", lambda i: str(i / 2), lambda i: i / 2)]
    text = to_latex(tables.Table("t", "Rows", columns, range(rows), lambda i: {"row": i}, ["A note"]))
    parts = text.split(r"\begin{table}")[1:]
    assert len(parts) == max(1, -(-rows // tables.LATEX_ROWS))
    assert all(part.count("row") - 1 <= tables.LATEX_ROWS and r"\end{table}" in part for part in parts)
    assert [f"row{i} &" in text for i in range(rows)] == [True] * rows
    assert "A note" in parts[0]
    assert all(f"continued ({i} of {len(parts)})" in part for i, part in enumerate(parts[1:], start=2))


def test_a_file_of_published_numbers_may_begin_with_a_byte_order_mark(tmp_path):
    text = "paper_or_seed,method,model,task,metric,value\nA paper,LoRA,RoBERTa,CoLA,matthews,63.4\n"
    made = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "p.csv").write_text(text, encoding=encoding)
        made.append(published.table(tmp_path / "p.csv", ["cola"]).rows)
    assert made[0] == made[1] != []


def test_runs_that_did_not_learn_are_the_first_alarm(tmp_path):
    for seed in (0, 1, 2):
        folder = tmp_path / f"runs/a{seed}"
        synthetic.run(folder, seed=seed)
        if seed != 1:
            result = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps(result | {"collapsed": True}))
    first, *_ = page.warnings(findings.findings(findings.read(tmp_path / "runs")))
    assert "2 of 3 runs did not learn, one answer for every row (seeds 0, 2)" in first


@pytest.mark.parametrize("count", [2, 5, 6, 7])
def test_more_curves_than_can_be_told_apart_become_small_pictures(tmp_path, count):
    names = ["full", "lora", "dora", "vera", "lora-fa", "qlora", "head"][:count]
    made = synthetic.study(tmp_path, seeds=2, tasks=("mrpc", "cola"), methods=names)  # the first has more methods
    found = findings.findings(findings.read(made))
    results = found.places()["cola", "mpnet"]
    styles = ch.styles_of(found.methods)
    with style.styled():
        *_, figure = ch.by_epoch("matthews_correlation")(results, styles)
    seen = [ax for ax in figure.axes if ax.get_visible()]
    if count <= multiples.CURVES:
        assert len(seen) == 1
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names
        return
    assert [ax.get_title(loc="left") for ax in seen] == [r.label for r in results if r.label != "head"]  # far below
    assert not figure.legends
    for ax, r in zip(seen, results, strict=False):
        own = [line for line in ax.lines if line.get_color() == styles[r.label][0]]
        others = [line for line in ax.lines if line.get_color() == style.GRID]
        assert (len(own), len(others)) == (1, len(seen) - 1)
        values = [[row["validation"]["matthews_correlation"] for row in run.history] for run in r.cell.runs]
        expected = np.mean(values, axis=0)
        np.testing.assert_allclose(own[0].get_ydata(), expected)


def test_a_legend_names_only_what_has_a_point():
    with style.styled():
        figure = style.figure()
        ax = figure.subplots()
        ax.plot([1, 2], [3, 4], label="there")
        ax.plot([1, 2], [np.nan, np.nan], label="not a number")
        ax.plot([], [], label="empty")
        ch.legend(figure, ax)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["there"]
