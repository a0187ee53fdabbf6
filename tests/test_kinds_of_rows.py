"""Rows as the files of a user have them, kind by kind: each reading is told, and none is a silent mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_objectives import bases, files, run_json, settings  # noqa: F401

from loralab import models, objectives
from loralab.cli import main
from loralab.data.batches import IGNORED
from loralab.errors import UserError
from loralab.objectives import Encoding, tagging
from loralab.run import train


def written(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


# ---- choices ---------------------------------------------------------------------------------------------------------

NUMBERS = ["2", "1", "0", "3"]
ARC = {"text": ["a", "b", "the"], "label": ["1", "2", "3"]}
ANSWERS = [  # choices, answers, their places, how they are read
    (NUMBERS, [0, 1, 2, 3], [0, 1, 2, 3], "places"),  # a number is no text: it was taken for one
    (NUMBERS, ["2", "1", "3", "0"], [0, 1, 3, 2], "texts"),
    ([4, 5, 6], [5, 4, 6], [1, 0, 2], "texts"),
    (["B", "A"], ["A", "B", "A"], [1, 0, 1], "texts"),
    (["x", "y"], ["B", "A", "A"], [1, 0, 0], "letters"),
    (["x", "y"], ["1", "0", "0"], [1, 0, 0], "places"),
    (["x", "y"], [" y ", "x", "x"], [1, 0, 0], "texts"),
    (ARC, ["1", "3", "2"], [0, 2, 1], "labels"),  # their labels were places from 0, one too high
]


@pytest.mark.parametrize(("choices", "answers", "places", "way"), ANSWERS, ids=str)
def test_answers_of_a_file_are_read_in_one_way_that_is_told(choices, answers, places, way, tmp_path):
    rows = [{"question": "a", "choices": choices, "answer": answer} for answer in answers]
    task = objectives.load(written(tmp_path, rows), whole=True)
    assert [place for place, _ in task.train.labels] == places
    assert any(note.startswith(f"answers are read as {way}") for note in task.notes)


@pytest.mark.parametrize(
    ("choices", "answer", "words"),
    [(["x"], 0, "1 of at least two choices"), ("x", 0, "text instead of a list"), (["x", "y"], "y", "read as letters"),
     (["x", "y"], True, "none of its 2 choices in row 4"), (["x", "y"], None, "none of its 2 choices in row 4")],
)  # fmt: skip
def test_a_row_that_is_read_otherwise_is_named(choices, answer, words, tmp_path):
    good = [{"question": "a", "choices": ["x", "y"], "answer": letter} for letter in "ABA"]
    file = written(tmp_path, [*good, {"question": "a", "choices": choices, "answer": answer}])
    with pytest.raises(UserError, match=words):
        objectives.load(file, whole=True)


# ---- tags ------------------------------------------------------------------------------------------------------------


def test_spans_of_bilou_are_those_of_bioes_and_tags_without_types_are_of_one():
    random = np.random.default_rng(1)
    for _ in range(300):
        row = [str(tag) for tag in random.choice(["O", "B-A", "I-A", "E-A", "S-A", "B-B", "S-B"], 8)]
        other = [tag.replace("E-", "L-").replace("S-", "U-") for tag in row]
        assert [*tagging.spans(row)] == [*tagging.spans(other)]
        assert {*tagging.spans([t[0] for t in row])} == {*tagging.spans([t[0] + "-_" * (t != "O") for t in row])}
    for names in (["O", "B", "I"], ["B-X", "L-X", "U-Y"], ["O", "I-X"]):
        assert tagging.spans_are_marked(names)
    for names in (["O", "S"], ["NOUN", "O"], ["0", "1"], ["O"]):
        assert not tagging.spans_are_marked(names)


def test_tags_that_mark_no_spans_are_told(tmp_path):
    for tags, words in ((["NN", "V"], "mark no spans"), ([0, 1], "--label-map"), (["B-X", "O"], None)):
        notes = objectives.load(written(tmp_path, [{"tokens": ["a", "b"], "tags": tags}] * 9)).notes
        assert any(words in note for note in notes) if words else not any("mark no spans" in note for note in notes)


def test_a_word_that_is_nothing_to_the_tokenizer_has_its_tag_and_moves_no_other(minilm):
    """Its tag was left out, and in the answers the next word's stood at its place."""
    tokenizer = models.tokenizer(str(minilm))
    words = ("Anna", "\u200b", "likes", "\xad", "\ufe0f", "Rome", "\u200d")
    tags = [0, 1, 2, 3, 4, 5, 6]
    split = objectives.data.Split([words, ("only", "two")], [tags, [6, 5]])
    task = objectives.data.Task("t", tuple("abcdefg"), ("accuracy",), split, {}, "")
    rows = tagging.encode(task, split, tokenizer, Encoding(64, True))
    assert [tag for tag in rows.columns["labels"][0] if tag != IGNORED] == tags
    assert tagging.answer(task, words, rows.labels[0].numpy())["tags"] == list("abcdefg")
    cut = tagging.encode(task, split, tokenizer, Encoding(4, True))  # [CLS], two words, [SEP]
    assert [tag for tag in cut.columns["labels"][0] if tag != IGNORED] == tags[:2]
    assert tagging.answer(task, words, cut.labels[0].numpy())["tags"] == [*"ab", *[None] * 5]


# ---- several labels --------------------------------------------------------------------------------------------------


def test_names_of_columns_as_label_are_several_labels(bases, tmp_path, capsys):  # noqa: F811
    """Without --objective; evaluate knows them, and refuses a file without one of them."""
    rows = [{"text": "the cat", "red": 1, "big": i % 2, "old": 0} for i in range(20)]
    flags = {"text": ("text",), "label": "red,big", "epochs": 1}
    s = settings("rows", bases, {"rows": written(tmp_path, rows)}, tmp_path / "run", **flags)
    train(s)
    folder = tmp_path / "run/adapter"
    found = run_json(capsys, "evaluate", folder, "--task", written(tmp_path, rows), "--json")
    assert (found["objective"], set(found["parts"])) == ("multi-label", {"red", "big"})
    fewer = written(tmp_path, [{"text": "the cat", "red": 1, "old": 0}], "fewer.jsonl")
    assert main(["evaluate", str(folder), "--task", fewer]) == 2
    assert "no column 'big'" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--task", s.task, "--label", "red,old"]) == 2
    assert "no column of big, which the adapter tells" in capsys.readouterr().err


def test_a_label_that_joins_others_is_told(tmp_path):
    (tmp_path / "rows.csv").write_text('text,labels\nthe cat,"red, big"\na dog,red\nthe dog,big;red\n' * 5)
    notes = objectives.load(str(tmp_path / "rows.csv")).notes
    assert any("'red, big'" in note and "; stands between labels" in note for note in notes)


# ---- similarity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "columns"), [("similarity", 1), ("triplets", 2), ("pairs", 1)])
def test_answers_of_evaluate_are_cosines(kind, columns, bases, files, tmp_path, capsys):  # noqa: F811
    """Of triplets that of the negative too; their product was written, and a score's cosine as an embedding."""
    train(settings(kind, bases, files, tmp_path / "run", epochs=1))
    flags = ("--adapters", tmp_path / "run/adapter", "--input", files[kind], "--json")
    rows = run_json(capsys, "predict", *flags)
    words = ["evaluate", tmp_path / "run/adapter", "--task", files[kind], "--out", tmp_path / "a.json"]
    assert main([*map(str, words)]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    capsys.readouterr()
    for name, text in (("similarity", None), ("similarity_of_negative", ("anchor", "negative")))[:columns]:
        if text:
            rows = run_json(capsys, "predict", *flags, "--text", *text)
        assert [row[name] for row in found] == pytest.approx([row["similarity"] for row in rows], abs=1e-5)
    assert "embedding" not in found[0]


# ---- the column of labels --------------------------------------------------------------------------------------------

NAMED = {  # objective -> a row, its columns of text and of labels
    "classification": ({"body": "the cat", "stars": "x"}, ("body",), "stars"),
    "similarity": ({"one": "the cat", "two": "a dog", "how": 0.5}, ("one", "two"), "how"),
    "tagging": ({"words": ["the", "cat"], "pos": ["O", "B-X"]}, ("words",), "pos"),
    "multi-label": ({"body": "the cat", "topics": ["red", "big"]}, ("body",), "topics"),
    "seq2seq": ({"de": "the cat", "en": "a dog"}, ("de",), "en"),
}


@pytest.mark.parametrize("objective", NAMED)
def test_an_adapter_knows_the_columns_that_it_learned_from(objective, bases, tmp_path, capsys):  # noqa: F811
    """evaluate needs its folder and a file; the column of labels had to be named again."""
    row, text, label = NAMED[objective]
    other = {"x": "y", 0.5: 1.5}.get(row[label] if isinstance(row[label], str | float) else None, row[label])
    file = written(tmp_path, [row, {**row, label: other}] * 15)
    kind = "seq2seq" if objective == "seq2seq" else "rows"
    more = {"objective": objective, "text": text, "label": label, "epochs": 1}
    train(settings(kind, bases, {kind: file}, tmp_path / "run", **more))
    found = run_json(capsys, "evaluate", tmp_path / "run/adapter", "--task", file, "--json")
    assert (found["objective"], found["rows"]) == (objective, 30)
