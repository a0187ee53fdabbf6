"""Rows as the files of a user have them, kind by kind: each reading is told, and none is a silent mistake."""

import json
import shutil
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
from loralab.run.result import lost_classes
from loralab.run.setup import prepare


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


# ---- what a model or its tokenizer cannot take -----------------------------------------------------------------------


def changed(base: Path, folder: Path, change) -> Path:
    """A copy of a base whose tokenizer is changed."""
    shutil.copytree(base, folder)
    tokenizer = models.tokenizer(str(base))
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def chat(*texts: str, system: bool = False) -> dict:
    roles = ["system"] * system + ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def of_one_turn(tokenizer):
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template


def forgets(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("%}<{{", "%}{{ messages | length }} <{{")


PLAIN_CHAT, NEW = chat("the cat", "a dog"), chat("the zebra29", "a dog")
REFUSED = {  # what is changed, rows that are refused, words of the error
    "a template without system": (of_one_turn, chat("big", "the cat", "a dog", system=True), "no system"),
    "a template that forgets": (forgets, PLAIN_CHAT, "changes earlier messages"),
    "a vocabulary that was not resized": (lambda t: t.add_tokens([f"zebra{i}" for i in range(30)]), NEW, "resize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_a_model_or_its_template_cannot_take_are_named_in_every_split(
    case, bases, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    """They ended in an IndexError of torch, or in an error that named no row."""
    change, bad, words = REFUSED[case]
    base = changed(bases["llama"], tmp_path / "base", change)
    rows = [bad if i % 3 == 2 or change is forgets else PLAIN_CHAT for i in range(15)]  # forgets: of no row by itself
    flags = ["--model", base, "--max-length", 40, "--batch-size", 4, "--out", tmp_path / "run"]
    validation = written(tmp_path, rows[:3], "validation.jsonl")
    more = ["--task", written(tmp_path, rows), "--validation", validation, "--selection", "last"]
    assert main(["train", *map(str, [*flags, *more])]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") <= 2
    if change is not forgets:
        assert "3, 6, 9, 12, 15" in said
        assert "validation" in said
    assert not (tmp_path / "run/result.json").exists()


def test_a_token_that_a_model_does_not_know_is_a_bad_row_of_every_command(bases, files, tmp_path, capsys):  # noqa: F811
    for kind, row in (("chat", NEW), ("seq2seq", {"source": "zebra29"}), ("multi-label", {"text": "a zebra29"})):
        train(settings(kind, bases, files, tmp_path / kind, epochs=1))
        old = {"chat": "llama", "seq2seq": "t5"}.get(kind, "bert")
        base = changed(bases[old], tmp_path / f"{kind}-base", lambda t: t.add_tokens([f"zebra{i}" for i in range(30)]))
        rows = json.loads(files[kind].read_text().splitlines()[0])
        file = written(tmp_path, [rows, row], f"{kind}.jsonl")
        for command in ("predict", "generate") if kind != "multi-label" else ("predict",):
            words = [command, "--adapters", tmp_path / kind / "adapter", "--model", base, "--input", file]
            words += ["--prefix", "own "]
            assert main([*map(str, words)]) == 2
            said = capsys.readouterr().err
            assert "row 2" in said
            assert "resize" in said


def test_the_metric_of_written_answers_names_rows_and_reads_what_training_reads(bases, tmp_path):  # noqa: F811
    rows = [{"prompt": "the cat", "completion": " a dog" if i == 4 else " [1]"} for i in range(15)]
    more = {"generate_metric": "json", "selection": "last", "generate_rows": 15}
    file = written(tmp_path, rows[:9], "validation.jsonl")
    s = settings("text", bases, {"text": written(tmp_path, rows)}, tmp_path / "run", validation=Path(file), **more)
    with pytest.raises(UserError, match=r"is no JSON: choose exact in row 5"):
        prepare(s)
    rows = [{"source": "the cat " * n, "target": "a dog"} for n in (1, 30)] * 8
    more = {"generate_metric": "exact", "max_length": 7}
    s = settings("seq2seq", bases, {"seq2seq": written(tmp_path, rows)}, tmp_path / "run", **more)
    asked = prepare(s).asked
    assert max(len(question.ids) for question in asked) == 7  # as predict and the loss cut the source


def test_generate_says_at_once_what_writes_no_texts(bases, files, tmp_path, capsys):  # noqa: F811
    train(settings("tagging", bases, files, tmp_path / "run", epochs=1))
    assert main(["generate", "--adapters", str(tmp_path / "run/adapter"), "--prompt", "the cat"]) == 2
    assert "tagging (tagging) writes no texts: use loralab predict" in capsys.readouterr().err
    train(settings("seq2seq", bases, files, tmp_path / "s2s", epochs=1))
    assert main(["generate", "--adapters", str(tmp_path / "s2s/adapter"), "--chat"]) == 2
    assert "an encoder-decoder reads one text" in capsys.readouterr().err


def test_the_advice_for_a_lost_class_is_a_flag_that_the_kind_takes():
    told = {}
    for kind in ("tagging", "classification"):
        result = {
            "objective": kind, "collapsed": False,
            "learned": {"split": "v", "lost": ["a"], "parts": {"a": {"rows": 3.0}}, "confusion": {}},
        }  # fmt: skip
        (told[kind],) = lost_classes(result)
    assert "--class-weights" in told["classification"]
    assert "--class-weights" not in told["tagging"]  # it was advised, and is refused there


# ---- flags that name columns -----------------------------------------------------------------------------------------


def test_a_classification_of_ones_own_is_learned_as_completions(bases, tmp_path, capsys):  # noqa: F811
    """--label was ignored, and the texts alone were learned."""
    rows = [{"review": "the cat" if i % 2 else "a dog", "stars": ["red", "blue"][i % 2]} for i in range(40)]
    more = {"objective": "causal", "text": ("review",), "label": "stars", "epochs": 12}
    file = written(tmp_path, rows)
    result = train(settings("chat", bases, {"chat": file}, tmp_path / "run", **more))
    assert result["metrics"]["accuracy"] == 1
    folder = tmp_path / "run/adapter"
    assert run_json(capsys, "evaluate", folder, "--task", file, "--json")["metrics"]["accuracy"] == 1
    found = run_json(capsys, "predict", "--adapters", folder, "--input", file, "--json")
    assert [row["label"] for row in found] == [row["stars"] for row in rows]


IDLE = [  # kind, flags that would do nothing
    ("multiple-choice", {"objective": "multiple-choice", "text": ("question",), "label": "other"}),
    ("similarity", {"objective": "similarity", "text": ("other",)}),
    ("tagging", {"objective": "tagging", "text": ("other",)}),
    ("seq2seq", {"objective": "seq2seq", "text": ("other",)}),
    ("chat", {"objective": "causal", "text": ("other",)}),
    ("tagging", {"objective": "tagging", "problem_type": "classification"}),
]


@pytest.mark.parametrize(("kind", "more"), IDLE, ids=str)
def test_a_column_that_is_named_and_not_read_is_refused(kind, more, bases, files, tmp_path):  # noqa: F811
    rows = [{**json.loads(line), "other": "the cat"} for line in files[kind].read_text().splitlines()]
    s = settings(kind, bases, {kind: written(tmp_path, rows)}, tmp_path / "run", **more)
    with pytest.raises(UserError, match="'other', which .* does not read|--problem-type with objective"):
        prepare(s)


def test_a_file_that_counts_its_words_is_no_file_of_words(tmp_path):
    """CoNLL-U's numbers were read as the words."""
    lines = ["1\tthe\t_\tDT", "2\tcat\t_\tNN", "", "1\ta\t_\tDT", ""]
    (tmp_path / "rows.conll").write_text("\n".join(lines))
    with pytest.raises(UserError, match="counts the words"):
        objectives.load(str(tmp_path / "rows.conll"))
    (tmp_path / "rows.conll").write_text("1 CD\n2 CD\n\nthe DT\n\n")
    assert objectives.load(str(tmp_path / "rows.conll"), whole=True).train.texts == [("1", "2"), ("the",)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": None, "completion": "a"}, "column 'prompt': null"),
        ({"prompt": "a", "completion": " \n"}, "column 'completion': empty"),
        ({"instruction": "a", "output": None}, "column 'output': null"),
        ({"messages": [{"role": "user", "content": None}]}, "null in a message of user"),
        (
            {"conversations": [{"from": "human", "value": [{"text": "a"}]}]},
            "list instead of text in a message of human",
        ),
    ],
)
def test_a_bad_cell_of_a_language_models_row_is_named(row, words, tmp_path):
    with pytest.raises(UserError, match=words):
        objectives.load(written(tmp_path, [row] * 3))
