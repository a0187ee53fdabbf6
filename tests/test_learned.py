"""What a model learned: by class, confusion, calibration, the rows that are most wrong, and classes that were lost."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss
from test_cli import adapter, cli, flags, refused  # noqa: F401  (fixtures)

from loralab import objectives
from loralab.data import Split
from loralab.data.batches import IGNORED, Rows
from loralab.data.task import build
from loralab.objectives import learned


def task(labels=("a", "b", "c"), objective="classification", metrics=("accuracy",), columns=("text",)):
    rows = Split([("x",), ("y",)], [0, 1])
    return build("t", labels, metrics, rows, {}, (), objective, {}, columns)


def drawn(rows, classes, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, classes)).astype(np.float32) * 2, random.integers(0, classes, rows)


# ---- against slow oracles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (50, 2), (200, 5)])
def test_confusion_and_wrongness_of_classes_equal_their_oracles(rows, classes):
    names = tuple("abcde"[:classes])
    logits, labels = drawn(rows, classes)
    found = learned.learned(task(names), logits, labels)
    counts = confusion_matrix(labels, logits.argmax(1), labels=range(classes))
    assert found["confusion"] == {"labels": list(names), "counts": counts.tolist()}
    how = objectives.OBJECTIVES["classification"].wrong(task(names), logits, labels)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for i in range(rows):
        right = logits[i].argmax() == labels[i]
        assert how[i] == pytest.approx(
            0 if right else log_loss([labels[i]], chances[i : i + 1], labels=range(classes)), rel=1e-5
        )


def test_calibration_is_the_mean_distance_of_what_is_said_from_what_is_right():
    chances = np.array([0.55, 0.58, 0.95, 0.97, 0.99, 1.0])
    right = np.array([True, False, True, True, True, False])
    found = learned.calibration(chances, right)
    assert [(b["from"], b["answers"]) for b in found["bins"]] == [(0.5, 2), (0.9, 4)]
    assert found["error"] == pytest.approx(2 / 6 * abs(0.565 - 0.5) + 4 / 6 * abs(0.9775 - 0.75))
    sharp = learned.calibration(np.full(100, 0.5), np.arange(100) % 2 == 0)
    assert sharp["error"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("answers", "lost"),
    [([0, 1, 2, 2], []), ([0, 1, 1, 1], ["c"]), ([0, 2, 1, 1], ["b", "c"]), ([0, 0, 0, 0], ["b", "c"])],
)
def test_a_class_that_is_there_and_found_in_no_row_is_lost(answers, lost):
    logits = np.eye(3, dtype=np.float32)[answers]
    assert learned.learned(task(), logits, np.array([0, 1, 2, 2]))["lost"] == lost


def test_a_class_without_rows_is_not_lost():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 1]]
    assert learned.learned(task(), logits, np.array([0, 1, 0]))["lost"] == []


# ---- the rows that are most wrong ------------------------------------------------------------------------------------


def encoded(labels, kept=None):
    count = len(labels)
    return Rows({"input_ids": [[1]] * count}, torch.as_tensor(labels), (), 8, kept=kept)


def test_the_worst_rows_have_their_numbers_in_the_file_and_their_texts():
    split = Split([(f"text {i}",) for i in range(6)], [0, 0, 1, 1, 2, 2], [11, 12, 14, 17, 19, 20])
    logits = np.array([[9, 0, 0], [0, 1, 0], [0, 9, 0], [8, 0, 0], [0, 0, 1], [0, 3, 0]], np.float32)
    found = learned.worst(task(), split, encoded(split.labels), logits)
    assert found["row"] == [17, 20, 12]  # the surest mistake first
    assert found["text"] == ["text 3", "text 5", "text 1"]
    assert list(zip(found["right"], found["answered"], strict=True)) == [("b", "a"), ("c", "b"), ("a", "b")]
    assert found["how_wrong"] == sorted(found["how_wrong"], reverse=True)
    assert learned.worst(task(), split, encoded(split.labels), logits, most=1)["row"] == [17]
    taken = split.take([5, 3, 1])
    assert taken.rows == [20, 17, 12]


def test_rows_that_were_dropped_do_not_shift_the_numbers():
    split = Split([("a",), ("b",), ("c",)], [None] * 3)
    made = np.array([[2.0, 1, 0], [9.0, 3, 0]], np.float32)  # loss, tokens, right ones, of the first and the last row
    found = learned.worst(task(None, "causal", ("loss",)), split, encoded([1.0, 3.0], kept=(0, 2)), made)
    assert (found["row"], found["how_wrong"]) == ([3, 1], [3.0, 2.0])


WRONG = {  # objective -> (labels of the task, predictions, labels of rows, rows from the worst to the last wrong one)
    "classification": (("a", "b"), [[9, 0], [0, 1], [0, 9]], [0, 0, 0], [2, 1]),
    "multi-label": (("a", "b"), [[5, -5], [5, 5], [-1, 1]], [[1, 0], [1, 0], [1, 0]], [1, 2]),
    "tagging": (("O", "B-X"), [[0, 1, IGNORED], [0, 0, 0], [1, 1, IGNORED]],
                [[0, 1, IGNORED], [1, 1, 0], [0, 1, IGNORED]], [1, 2]),
    "multiple-choice": (None, [[9, 0], [0, 1], [0, 9]], [[0, 2], [0, 2], [0, 2]], [2, 1]),
    "similarity": (None, [[0.9], [0.1], [0.4]], [0.9, 0.9, 0.9], [1, 2]),
    "causal": (None, [[4, 2, 1], [1, 2, 2], [9, 3, 0]], [2.0, 2.0, 3.0], [2, 0, 1]),
    "seq2seq": (None, [[4, 2, 1], [1, 2, 2], [9, 3, 0]], [2.0, 2.0, 3.0], [2, 0, 1]),
}  # fmt: skip


def test_every_objective_has_a_row():
    assert set(WRONG) == set(objectives.OBJECTIVES)


@pytest.mark.parametrize("name", WRONG)
def test_every_objective_says_which_rows_are_most_wrong(name):
    names, made, labels, order = WRONG[name]
    metrics = ("spearman", "pearson") if name == "similarity" else ("loss",)
    t = task(names, name, metrics)
    how = objectives.OBJECTIVES[name].wrong(
        t, np.array(made, np.float32), np.array(labels, np.float32 if name == "similarity" else None)
    )
    ranked = [i for i in np.argsort(-how, kind="stable") if how[i] > 0]
    assert ranked == order
    row = ("question", "first", "second") if name == "multiple-choice" else ("text",)
    told = objectives.OBJECTIVES[name].told(t, row, labels[order[0]], np.array(made[order[0]], np.float32))
    assert told[0] != told[1] or names is None


# ---- in a run, and on the command line -------------------------------------------------------------------------------


@pytest.fixture
def rare(own, tmp_path):
    """The task that a tiny model learns, with a third class for which it gives up one of the two."""
    rows = list(csv.reader(own["class"].open()))[1:] + [["a small dog likes", "odd"]] * 10
    (tmp_path / "rare.csv").write_text("sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return rows


def test_a_run_says_what_it_learned_and_lost(cli, tiny, own, tmp_path, rare):  # noqa: F811
    code, out, err = cli(*flags(tiny, own, task="rare.csv", epochs=10))
    assert code == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    what = result["learned"]
    assert what["split"] == "validation"
    (gone,) = what["lost"]  # of cat, dog and odd
    place = what["confusion"]["labels"].index(gone)
    counts = what["confusion"]["counts"]
    assert counts[place][place] == 0 < sum(counts[place])
    assert f"lost: {gone!r} ({sum(counts[place])}) of validation are found in no row" in " ".join(result["warnings"])
    assert f"warning: lost: {gone!r}" in err
    assert sum(map(sum, what["confusion"]["counts"])) == 50
    assert "by class or type" in out
    assert "confusion: a row a label, a column an answer" in out
    assert "calibration error" in out
    assert "rows that are most wrong: run/wrong.csv" in out
    listed = list(csv.DictReader((tmp_path / "run/wrong.csv").open()))
    assert len(listed) >= 2
    for row in listed:
        text, label = rare[int(row["row"]) - 1]
        assert (row["sentence"], row["right"]) == (text, label)
        assert row["answered"] != label


def test_evaluate_says_the_same_and_lists_rows_with_their_numbers(cli, tiny, own, tmp_path, rare):  # noqa: F811
    assert cli(*flags(tiny, own, task="rare.csv", epochs=10))[0] == 0
    command = ["evaluate", "run/adapter", "--task", "rare.csv", "--label", "label", "--text", "sentence"]
    code, out, err = cli(*command, "--wrong", "wrong.csv", "--out", "all.csv", "--json")
    assert code == 0
    result = json.loads(out)
    (gone,) = result["lost"]
    assert result["confusion"]["labels"] == ["cat", "dog", "odd"]
    assert sum(map(sum, result["confusion"]["counts"])) == len(rare)
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [row["row"] for row in rows] == [str(i + 1) for i in range(len(rare))]
    assert [row["text"] for row in rows] == [text for text, _ in rare]
    wrong = list(csv.DictReader((tmp_path / "wrong.csv").open()))
    mistakes = {i + 1 for i, row in enumerate(rows) if row["label"] != row["truth"]}
    assert {int(row["row"]) for row in wrong} <= mistakes
    assert len(wrong) == min(50, len(mistakes))
    code, out, err = cli(*command)
    assert f"warning: {gone!r} is found in no row" in err


# ---- the metric that selects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["f1_macro", "matthews_correlation", "f1"])
def test_the_metric_that_is_asked_for_selects_and_is_reported(cli, tiny, own, tmp_path, metric):  # noqa: F811
    code, out, _ = cli(*flags(tiny, own, epochs=3), "--select-by", metric, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["metric"]["name"] == metric
    history = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = [line["held_out"][metric] for line in history]
    assert result["selected_epoch"] == 1 + scores.index(max(scores))
    assert "accuracy" in result["metrics"]


def test_a_metric_that_the_task_has_not_is_refused(refused, tiny, own):  # noqa: F811
    told = refused(*flags(tiny, own), "--select-by", "f1_marco")
    assert "--select-by f1_marco: class has no such metric (did you mean 'f1_macro'?)" in told
    assert "it has pearson" in refused(*flags(tiny, own, task=own["value"]), "--select-by", "accuracy").replace(
        ", spearman", ""
    )
