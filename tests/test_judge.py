"""`loralab judge`: what it finds in tables of scores, what it says does not count, and what it refuses."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from loralab.cli import main
from loralab.errors import UserError
from loralab.study.judge import judge
from loralab.study.statistics.contrasts import MIRRORED, paired, proportions, with_signs


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


def test_of_a_loss_the_lower_is_better_and_differences_keep_their_units(tmp_path, capsys):
    file = file_of(tmp_path, [(m, t, s, x - 0.1 * (m == "dora")) for m, t, s, x in scores_of()])
    plain, lower = (judge(file, "who", "acc", "seed", "task", lower_is_better=x) for x in (False, True))
    for a, b in zip(plain.families, lower.families, strict=True):
        assert a.contrasts[0].verdict == "worse"
        assert [replace(c, verdict=MIRRORED.get(c.verdict, c.verdict)) for c in a.contrasts] == b.contrasts
    argv = ["judge", str(file), "--method", "who", "--score", "acc", "--seed", "seed", "--task", "task"]
    assert main([*argv, "--lower-is-better"]) == 0
    out = capsys.readouterr().out
    assert "lie below lora" in out or "lies below lora" in out
    assert out.index("dora") < out.index("vera"), "the best first"


@pytest.mark.parametrize(
    ("name", "told"),
    [("eval_loss", True), ("valLoss", True), ("WER", True), ("word error rate", True), ("test/ppl", True),
     ("perplexity", True), ("acc", False), ("lossless_accuracy", False), ("answer", False)],
)  # fmt: skip
def test_a_column_that_seems_a_loss_is_noted_unless_the_flag_is_given(tmp_path, name, told):
    file = file_of(tmp_path, scores_of())
    file.write_text(file.read_text().replace("acc", name, 1))
    for lower in (False, True):
        notes = judge(file, "who", name, "seed", "task", lower_is_better=lower).notes
        assert any("--lower-is-better" in note for note in notes) == (told and not lower)


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
        ({"score": "task", "task": None}, ["row 1", "no number"]),
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


@pytest.mark.parametrize("rows", [None, 300])
def test_methods_on_tasks_are_one_family_as_in_a_study(tmp_path, rows):
    """Else each further task is another chance of a false difference."""
    random = np.random.default_rng(3)
    names = [(m, t) for t in "abcd" for m in ("dora", "vera")]
    seeds = 1 if rows else 5
    drawn = {(m, t): random.normal(0.7, 0.02, seeds) for t in "abcd" for m in ("lora", "dora", "vera")}
    table = [(m, t, s, x) for (m, t), own in drawn.items() for s, x in enumerate(own)]
    found = judge(file_of(tmp_path, table), "who", "acc", None if rows else "seed", "task", rows=rows)
    by_task = [f for f in found.families if f.name != "mean of tasks"]
    assert [f.name for f in by_task] == list("abcd")
    assert {f.corrected_over for f in by_task} == {len(names)}
    ours = [c.p_holm for f in by_task for c in f.contrasts]
    base = [drawn["lora", t] for _, t in names]
    if rows:
        own = [float(drawn[name][0]) for name in names]
        expected = proportions([""] * len(names), own, [float(x[0]) for x in base], rows, 0.01)
    else:
        differences = [drawn[name] - x for name, x in zip(names, base, strict=True)]
        expected = with_signs(paired([""] * len(names), differences, 0.01), differences, 0.05)
        assert [c.p_signs for f in by_task for c in f.contrasts] == pytest.approx(
            [c.p_signs for c in expected], nan_ok=True
        )
    assert ours == pytest.approx([c.p_holm for c in expected])


def scores_of(methods=("lora", "dora", "vera"), tasks=("a", "b"), seeds=5, times=1.0, keep=lambda m, t, s: True):
    random = np.random.default_rng(6)
    rows = [(m, t, s) for m in methods for t in tasks for s in range(seeds) if keep(m, t, s)]
    return [(*row, times * (0.7 + random.normal(0, 0.01))) for row in rows]


def file_of(folder, rows):
    file = folder / "scores.csv"
    file.write_text("\n".join(",".join(map(str, row)) for row in [("who", "task", "seed", "acc"), *rows]) + "\n")
    return file


NOTED = {  # what does not count, or counts otherwise than a reader may think -> the note and the methods of the mean
    "a method lacks a task": (
        scores_of(keep=lambda m, t, s: (m, t) != ("vera", "b")),
        "not in the mean, without a seed on every task: vera",
        ["dora"],
    ),
    "a method lacks seeds": (
        scores_of(keep=lambda m, t, s: m != "vera" or s < 3),
        "compared on the seeds that lora has too: vera (mean of tasks), vera (a), vera (b)",
        ["dora", "vera"],
    ),
    "a method has one seed": (
        scores_of(keep=lambda m, t, s: m != "vera" or s < 1),
        "not tested, one seed, or differences that do not vary: vera (mean of tasks), vera (a), vera (b)",
        ["dora", "vera"],
    ),
    "the reference lacks a task": (
        scores_of(tasks=("a", "b", "c"), keep=lambda m, t, s: (m, t) != ("lora", "b")),
        "lora has no score on these tasks, which are left out: b",
        ["dora", "vera"],
    ),
    "other seeds": (
        [(m, t, s + 100 * (m == "vera"), x) for m, t, s, x in scores_of()],
        "left out, no seed in common with lora: vera (mean of tasks), vera (a), vera (b)",
        ["dora"],
    ),
    "scores in percent": (scores_of(times=100), "the margin of 0.01 is in the same units", ["dora", "vera"]),
}


@pytest.mark.parametrize("case", NOTED)
def test_judge_says_what_does_not_count(tmp_path, case):
    rows, note, methods = NOTED[case]
    found = judge(file_of(tmp_path, rows), "who", "acc", "seed", "task")
    assert note in "; ".join(found.notes)
    assert [c.method for c in found.families[0].contrasts] == methods
    assert all(f.contrasts for f in found.families)
    plain = judge(file_of(tmp_path, scores_of()), "who", "acc", "seed", "task")
    assert len(plain.notes) == 1, "nothing to say but the reference"


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        (scores_of(), {"margin": -1.0}, "--margin -1"),
        (scores_of(), {"margin": math.nan}, "--margin nan"),
        (scores_of(), {"alpha": 2.0}, "--alpha 2"),
        (scores_of(), {"alpha": math.nan}, "--alpha nan"),
        (scores_of(), {"seed": "who"}, "--method and --seed are both 'who'"),
        (scores_of(methods=("lora",)), {}, "one method, lora"),
        (scores_of(methods=("lora", " ")), {}, "row 11 has no who"),
        (scores_of(methods=("lora", " lora")), {}, "second score of lora"),
        ([(m, t, m + str(s), x) for m, t, s, x in scores_of()], {}, "nothing can be compared with lora"),
        (scores_of(), {"reference": "dora", "task": None, "seed": "task"}, "second score"),
    ],
)
def test_judge_refuses_what_it_cannot_judge(tmp_path, rows, more, words):
    given = {"method": "who", "score": "acc", "seed": "seed", "task": "task", **more}
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        judge(file_of(tmp_path, rows), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "cells", "name"),
    [("{},,", ",,", "a.csv"), ("{},note,note", ",x,y", "a.csv"), (",{}", None, "a.csv"), ("{}\t\t", "\t\t", "a.tsv")],
    ids=["trailing commas", "two columns of one name", "a nameless index", "trailing tabs"],
)  # fmt: skip
def test_columns_that_no_flag_names_may_be_anything(tmp_path, head, cells, name):
    plain = file_of(tmp_path, scores_of())
    first, *rows = plain.read_text().splitlines()
    lines = [head.format(first), *(f"{i},{row}" if cells is None else row + cells for i, row in enumerate(rows))]
    (tmp_path / name).write_text("\n".join(lines).replace(",", "\t" if name.endswith("tsv") else ","))
    given = ("who", "acc", "seed", "task")
    assert judge(tmp_path / name, *given) == judge(plain, *given)
    (tmp_path / name).write_text("who,acc,acc\nlora,0.1,0.2\n")
    with pytest.raises(UserError, match="more than one column 'acc'"):
        judge(tmp_path / name, "who", "acc", rows=10)


@pytest.mark.parametrize(
    ("name", "cell"),
    [("a.json", "true"), ("a.json", f"1{'0' * 400}"), ("a.json", "null"), ("a.json", '"high"'), ("a.json", "[1]"),
     ("a.json", "{}"), ("a.csv", "0.8_1"), ("a.csv", "true"), ("a.csv", "inf"), ("a.csv", "nan"), ("a.csv", "0x1p3")],
)  # fmt: skip
def test_a_score_that_is_no_number_is_named(tmp_path, name, cell):
    rows = [f'{{"who": "lora", "acc": {cell}}}', '{"who": "dora", "acc": 0.5}']
    text = f"[{', '.join(rows)}]" if name.endswith("json") else f"who,acc\nlora,{cell}\ndora,0.5\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="row 1 has acc .*, no number") as caught:
        judge(tmp_path / name, "who", "acc", rows=100)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("margin", [1, np.float32(1.0), np.int64(1)])
def test_a_margin_may_be_any_number(tmp_path, margin):
    file = file_of(tmp_path, scores_of(times=100))
    found, same = (judge(file, "who", "acc", "seed", "task", margin=x).families for x in (margin, 1.0))
    assert [c.p_equivalent for f in found for c in f.contrasts] == [c.p_equivalent for f in same for c in f.contrasts]


def test_what_judge_prints_for_machines_is_json(tmp_path, capsys):
    """JSON has no word for nan: what is not known is null."""
    file = file_of(tmp_path, scores_of(keep=lambda m, t, s: m != "vera" or s < 1))
    argv = ["judge", str(file), "--method", "who", "--score", "acc", "--seed", "seed", "--task", "task", "--json"]
    assert main(argv) == 0

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["families"][0]["contrasts"][1]["p"] is None


@pytest.mark.parametrize("times", [1e-5, 1e-3, 1.0, 100.0, 1e-12])
def test_numbers_of_any_unit_have_digits(tmp_path, capsys, times):
    """Two at least of the largest difference: scores in small units were +0.000 everywhere."""
    file = file_of(tmp_path, [(m, t, s, times * x) for m, t, s, x in scores_of()])
    given = {"seed": "seed", "task": "task", "margin": 0.01 * times}
    found = judge(file, "who", "acc", **given)
    flags = [word for key, x in given.items() for word in (f"--{key}", str(x))]
    assert main(["judge", str(file), "--method", "who", "--score", "acc", *flags]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    for family, shown in zip(found.families, tables, strict=False):
        largest = max(family.contrasts, key=lambda c: abs(c.difference))
        line = next(line for line in shown.splitlines() if line.startswith(largest.method))
        assert float(line.split()[1]) == pytest.approx(largest.difference, rel=0.05)


@pytest.mark.parametrize("task", ["all", "seeds", "mean of tasks"])
def test_a_task_may_have_any_name_but_that_of_the_mean(tmp_path, capsys, task):
    file = file_of(tmp_path, [(m, {"a": task}.get(t, t), s, x) for m, t, s, x in scores_of()])
    if task == "mean of tasks":
        with pytest.raises(UserError, match="row 1 has the task 'mean of tasks'"):
            judge(file, "who", "acc", "seed", "task")
        return
    assert [f.name for f in judge(file, "who", "acc", "seed", "task").families] == ["mean of tasks", task, "b"]
    assert main(["judge", str(file), "--method", "who", "--score", "acc", "--seed", "seed", "--task", "task"]) == 0
    assert f"{task}: 2 methods against lora" in capsys.readouterr().out


@pytest.mark.parametrize("times", [1.0, 1e5, 1e8])
def test_differences_that_differ_by_the_rounding_of_scores_do_not_vary(tmp_path, times):
    """Of scores of 1e5 equal differences had p < 0.001: their rounding was taken for luck of the seeds."""
    rows = [(m, "a", s, times * 0.1 * s + 0.3 * (m == "dora")) for m in ("lora", "dora") for s in range(1, 6)]
    assert len({rows[i + 5][3] - rows[i][3] for i in range(5)}) > 1, "rounding differs"
    (family,) = judge(file_of(tmp_path, rows), "who", "acc", "seed", "task").families
    assert [c.verdict for c in family.contrasts] == ["not tested"]
    varied = [(m, t, s, x + 1e-3 * (m == "dora") * s) for m, t, s, x in rows]
    (family,) = judge(file_of(tmp_path, varied), "who", "acc", "seed", "task").families
    assert [c.verdict for c in family.contrasts] == ["better"]


STEERS = "\x1b[31mred\x9b2J\x07\r"


def test_names_of_a_file_cannot_steer_the_terminal(tmp_path, capsys):
    """In tables, their titles and the notes below them: they are shown as escapes."""
    lacks = scores_of(keep=lambda m, t, s: (m, t, s) != ("vera", "b", 1))
    rows = [{"who": m + STEERS * (m != "lora"), "task": t + STEERS, "seed": s, "acc": x} for m, t, s, x in lacks]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))
    assert main(["judge", str(file), "--method", "who", "--score", "acc", "--seed", "seed", "--task", "task"]) == 0
    out = capsys.readouterr().out
    assert set(filter(lambda c: not c.isprintable(), out)) == {"\n"}
    assert "dora\\x1b[31mred\\x9b2J\\x07" in re.sub(r"\s", "", out)
    assert "vera\\x1b[31mred" in out.partition("note: ")[2]


def test_rows_beside_seeds_are_said_to_be_of_no_use(tmp_path):
    found = judge(file_of(tmp_path, scores_of()), "who", "acc", "seed", "task", rows=100)
    assert any("--rows is not used" in note for note in found.notes)


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
        ("a.json", "[]", "no rows"),
        ("a.json", "{", "a.json"),
        ("a.jsonl", "[1]\n", "a.jsonl"),
        ("a.txt", "who,acc\nlora,1\n", "ending in"),
    ],
)
def test_judge_refuses_a_file_that_holds_no_results(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        judge(tmp_path / name, "who", "acc", rows=10)
