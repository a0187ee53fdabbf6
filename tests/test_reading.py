"""Files as they are: separators, encodings, line ends, bad rows left out, labels merged, classes weighed."""

import csv
import io
import json
from itertools import product

import pytest
import torch
from test_cli import adapter, cli, flags, refused  # noqa: F401  (fixtures)

from loralab import objectives
from loralab.data import labels, tables
from loralab.data.reading import SEPARATORS, Reading, counted
from loralab.errors import UserError
from loralab.objectives import classification

ROWS = [("the café, said (a) ; b|c", "good"), ('a "dog" likes', "bad"), ("über\nzwei Zeilen", "good"), ("naïve", "bad")]
ENCODINGS = {"utf-8": ("utf-8", False), "utf-8-sig": ("utf-8-sig", False), "utf-16": ("utf-16", False),
             "cp1252": ("cp1252", True)}  # fmt: skip  # written in -> (what is found, whether it is a guess)


def written(path, rows=ROWS, separator=",", encoding="utf-8", end="\n", header=("text", "label")):
    """Write rows as a file of columns."""
    file = io.StringIO(newline="")
    csv.writer(
        file, delimiter=SEPARATORS.get(separator, separator), lineterminator=end, quoting=csv.QUOTE_ALL
    ).writerows([header, *rows])
    path.write_bytes(file.getvalue().encode(encoding))
    return path


def load(path, reading=None, **more):
    given = {"text": "text", "label": "label"} | more
    return objectives.load(str(path), reading=reading, whole=True, **given)


@pytest.mark.parametrize(("separator", "encoding", "end"), list(product(SEPARATORS, ENCODINGS, ["\n", "\r\n", "\r"])))
def test_every_separator_encoding_and_line_end_gives_the_same_rows(tmp_path, separator, encoding, end):
    reading = Reading()
    task = load(written(tmp_path / "own.csv", separator=separator, encoding=encoding, end=end), reading)
    assert list(zip(*zip(*task.train.texts, strict=True), strict=False)) == [(text,) for text, _ in ROWS]
    assert [task.labels[i] for i in task.train.labels] == [label for _, label in ROWS]
    (form,) = reading.forms.values()
    assert (form.separator, form.encoding, form.guessed) == (separator, *ENCODINGS[encoding])
    assert form.line_end == end
    told = [note for note in task.notes if note.startswith("own.csv is read with")]
    unusual = {f"{separator!r} between": separator != ",", f"encoding {form.encoding}": encoding != "utf-8",
               f"end with {end!r}": end != "\n", "a guess": form.guessed}  # fmt: skip
    assert len(told) == any(unusual.values())
    assert all((part in "".join(told)) == holds for part, holds in unusual.items())


@pytest.mark.parametrize(
    ("content", "suffix", "separator"),
    [
        ("text;label\n1,5 kg, or so;good\n2,5;bad\n", ".csv", ";"),  # commas in the cells
        ("text,label\na;b,good\nc;d;e,bad\n", ".csv", ","),  # the usual one wins where it fits
        ("text\tlabel\na,b\tgood\nc\tbad\n", ".csv", "tab"),
        ("text,label\na,good\nb,bad\n", ".tsv", ","),  # named .tsv and is none
        ("text|label\na,b|good\nb|bad\n", ".csv", "|"),
        ("text, all of it;label\na;x\nb;y\n", ".csv", ";"),  # a comma in the header, and none in the rows
        ("text\njust, a; text\n", ".csv", ","),  # one column: nothing to find
    ],
)
def test_the_separator_is_the_one_that_the_header_and_most_rows_have(tmp_path, content, suffix, separator):
    path = tmp_path / f"own{suffix}"
    path.write_text(content)
    reading = Reading()
    with reading.active():
        tables.names(path)
    assert reading.forms[path].separator == separator


def test_what_is_said_wins_over_what_is_seen(tmp_path):
    path = written(tmp_path / "own.csv", [("é;x", "a"), ("b;y", "c")], encoding="cp1250")
    with pytest.raises(UserError, match="no column 'text'"):
        load(path, Reading(";"))
    assert load(path, Reading(encoding="cp1250")).train.texts[0] == ("é;x",)
    with pytest.raises(UserError, match="cannot be read in ascii .*--encoding"):
        load(path, Reading(encoding="ascii"))
    with pytest.raises(UserError, match="encoding='latin-99': no such encoding"):
        Reading(encoding="latin-99")


def test_the_file_an_adapter_learned_from_is_the_first_guess(tmp_path):
    """Polish letters are no UTF-8 here, and mean others in cp1252."""
    path = written(tmp_path / "own.csv", [("żółw", "a"), ("b", "c")], encoding="cp1250")
    assert load(path).train.texts[0] != ("żółw",)
    assert load(path, Reading(likely={"encoding": "cp1250", "separator": ","})).train.texts[0] == ("żółw",)
    plain = written(tmp_path / "plain.csv", [("żółw", "a"), ("b", "c")])
    assert load(plain, Reading(likely={"encoding": "cp1250"})).train.texts[0] == ("żółw",)  # UTF-8 is no guess


# ---- rows that cannot be used ----------------------------------------------------------------------------------------

BAD = {  # file -> (content, rows that are left, rows left out -> why)
    "cells.csv": ("text,label\na,x\nb\nc,y\nd,x,1\n,y\ne,\nf,y\n", "acf",
                  {2: "1 cells", 4: "3 cells", 5: "column 'text': empty", 6: "column 'label': empty"}),
    "lines.jsonl": ('{"text":"a","label":"x"}\n{"text":\n[1]\n{"text":"b","label":"y"}\n{"text":3,"label":"x"}\n', "ab",
                    {2: "not JSON", 3: "not a JSON object", 5: "number instead of text"}),
    "list.json": ('[{"text":"a","label":"x"},{"text":"","label":"y"},{"text":"b","label":"y"}]', "ab", {2: "empty"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_or_left_out_counted_and_listed(tmp_path, name):
    content, kept, out = BAD[name]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError):
        load(path)
    reading = Reading(skip=True)
    task = load(path, reading)
    assert "".join(text for (text,) in task.train.texts) == kept
    assert {row: next(w for w in out.values() if w in why) for row, why in reading.skipped[path].items()} == out
    total = len(kept) + len(out)
    assert any(note.startswith(f"{name}: {len(out)} of {total} rows are left out: ") for note in task.notes)


def test_parquet_and_validation_files_leave_rows_out_too(tmp_path):
    train = tmp_path / "own.parquet"
    tables.write({"text": ["a", None, "b", "c", "d"], "label": ["x", "y", "y", "x", "y"]}, train)
    more = written(tmp_path / "more.csv", [("e", "x"), ("f", "new"), ("g", "y"), ("", "y")])
    reading = Reading(skip=True)
    task = objectives.load(str(train), text="text", label="label", validation=more, reading=reading)
    assert (len(task.train), len(task.validation["validation"])) == (4, 2)
    assert {path.name: sorted(rows) for path, rows in reading.skipped.items()} == {
        "own.parquet": [2],
        "more.csv": [2, 4],
    }


def test_a_file_of_bad_rows_alone_is_refused(tmp_path):
    path = written(tmp_path / "own.csv", [("", "x"), ("", "y")])
    with pytest.raises(UserError, match="has no rows, as all 2 are left out"):
        load(path, Reading(skip=True))


def test_rows_are_left_out_where_the_columns_say_the_kind(tmp_path):
    """The kind was found before any row could be left out, and the error did not name the flag."""
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(['{"text": "a", "label": "x"}', '{"text": "b", "label": "y"}'] * 5 + ["{bad"]))
    with pytest.raises(UserError, match="not JSON in row 11.*or leave them out with --skip-bad-rows"):
        objectives.load(str(path))
    task = objectives.load(str(path), reading=Reading(skip=True))
    assert (task.objective, len(task.train) + len(task.validation["validation"])) == ("classification", 10)
    path.write_text("{bad")
    with pytest.raises(UserError, match="has no rows, as all 1 are left out"):
        objectives.load(str(path), reading=Reading(skip=True))


@pytest.mark.parametrize(("header", "told"), [
    ("text, label", "its columns 'text', ' label' would make it a file of classification if they were called text, l"),
    ("Text,Label", "its columns 'Text', 'Label' would make it a file of classification if they were called text, "),
    ("text,mood", None),
])  # fmt: skip
def test_names_of_columns_that_nearly_fit_are_told_and_unread_ones_named(tmp_path, header, told):
    path = tmp_path / "own.csv"
    path.write_text(f"{header}\n" + "a,x\nb,y\n" * 5)
    if told:
        with pytest.raises(UserError, match=told):
            objectives.load(str(path))
        return
    task = objectives.load(str(path))
    assert task.objective == "causal"
    assert "'mood' are not read: --text and --label make a classification of a column of labels" in task.notes


def test_a_model_of_another_kind_than_the_columns_say_is_told_why(refused, tiny, tmp_path):  # noqa: F811
    (tmp_path / "own.csv").write_text("text,mood\n" + "a,x\nb,y\n" * 5)
    told = refused("train", "--task", "own.csv", "--model", tiny, "--out", "run")
    assert "is not a causal language model" in told
    assert "(own is read as causal by its columns text: --text and --label say otherwise)" in told


def test_evaluate_names_the_label_column_that_a_file_lacks(cli, tiny, own, refused, tmp_path):  # noqa: F811
    rows = own["class"].read_text().replace("sentence,label", "sentence,mood", 1)
    (tmp_path / "own.csv").write_text(rows)
    given = flags(tiny, own, task="own.csv", epochs=1)
    given[given.index("--label") + 1] = "mood"
    assert cli(*given)[0] == 0
    (tmp_path / "bare.csv").write_text("sentence,note\na cat,b\n")
    cli("--version")
    told = refused("evaluate", "run/adapter", "--task", "bare.csv")
    assert "no column 'mood', the label that the adapter learned; columns there: sentence, note" in told


def test_shown_rows_come_with_the_notes_of_their_file(cli, tiny, own, tmp_path):  # noqa: F811
    (tmp_path / "own.csv").write_text(own["class"].read_text().replace(",", ";"))
    code, _, err = cli(*flags(tiny, own, task="own.csv"), "--show-rows", 1)
    assert code == 0
    assert "note: own.csv is read with ';' between its cells" in err
    assert "rows are held out" in err


def test_a_run_lists_the_rows_that_it_leaves_out(cli, tiny, own, tmp_path):  # noqa: F811
    lines = own["class"].read_text().splitlines()
    (tmp_path / "messy.csv").write_text("\n".join([*lines[:5], ",cat", "only one", *lines[5:]]) + "\n")
    code, _, err = cli(*flags(tiny, own, task="messy.csv", epochs=1), "--skip-bad-rows")
    assert code == 0
    assert "messy.csv: 2 of 242 rows are left out" in err
    listed = list(csv.DictReader((tmp_path / "run/skipped.csv").open()))
    assert [(row["file"], row["row"]) for row in listed] == [("messy.csv", "5"), ("messy.csv", "6")]
    assert "empty" in listed[0]["why"]


@pytest.mark.parametrize("count", [1, 2, 10, 11, 5000])
def test_at_most_ten_rows_are_named(count):
    told = counted(list(range(1, count + 1)))
    assert sum(word.strip("(),").isdigit() for word in told.partition("(")[2].partition(" and ")[0].split()) <= 10
    assert str(count) in told
    assert ("and" in told) == (count > 10)


# ---- two texts -------------------------------------------------------------------------------------------------------


def test_one_empty_text_of_two_is_blank_and_two_are_refused(tmp_path):
    rows = [("a", "b", "x"), ("", "c", "y"), ("d", " ", "x"), ("e", "f", "y")]
    path = written(tmp_path / "own.csv", rows, header=("one", "two", "label"))
    task = load(path, text=("one", "two"))
    assert task.train.texts == [("a", "b"), ("", "c"), ("d", ""), ("e", "f")]
    assert "2 of 4 rows have one of their two texts only: the other is read as blank" in task.notes
    path = written(path, [*rows, ("", " ", "x")], header=("one", "two", "label"))
    with pytest.raises(UserError, match="columns 'one' and 'two': empty in row 5"):
        load(path, text=("one", "two"))


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [("Pos", "pos"), ("pos", "pos "), ("été", "ete"), ("no  go", "no go"), ("ＡＢ", "ab")])
def test_labels_equal_but_for_case_space_or_accents_are_named_and_can_be_merged(tmp_path, pair):
    path = written(tmp_path / "own.csv", [("a", pair[0]), ("b", pair[1]), ("c", "other"), ("d", "other")])
    (note,) = [note for note in load(path).notes if "different classes" in note]
    assert all(repr(label) in note for label in pair)
    merge = json.loads(note.partition("which holds ")[2])
    (tmp_path / "map.json").write_text(json.dumps(merge))
    options = {"label_map": json.dumps(labels.read_map(tmp_path / "map.json"))}
    task = load(path, options=options)
    assert len(task.labels) == 2
    assert not any("different classes" in note for note in task.notes)


def test_a_label_map_merges_tags_by_type_or_whole(tmp_path):
    """A type in the map counts in B- and I- tags alike; O takes a type out; a whole tag comes first."""
    rows = [(["Ann", "Lee", "in", "Rome", "on", "Monday"], ["B-PERS", "I-PERS", "O", "B-LOC", "O", "B-DAY"]),
            (["Bo", "saw", "oslo"], ["B-PER", "O", "B-loc"])]  # fmt: skip
    path = tmp_path / "tags.jsonl"
    path.write_text("".join(json.dumps({"tokens": words, "tags": tags}) + "\n" for words, tags in rows))
    (note,) = [note for note in objectives.load(str(path), whole=True).notes if "different classes" in note]
    assert "'LOC' and 'loc'" in note
    merge = {"PERS": "PER", "B-loc": "B-LOC", "DAY": "O"}
    task = objectives.load(str(path), whole=True, options={"label_map": json.dumps(merge)})
    assert task.labels == ("O", "B-LOC", "B-PER", "I-PER")
    tags = [[task.labels[tag] for tag in row] for row in task.train.labels]
    assert tags == [["B-PER", "I-PER", "O", "B-LOC", "O", "O"], ["B-PER", "O", "B-LOC"]]
    with pytest.raises(UserError, match="--label-map names 'ORG', and .* has none of them"):
        objectives.load(str(path), whole=False, options={"label_map": '{"ORG": "PER"}'})


def test_a_label_map_that_merges_nothing_is_refused(tmp_path):
    path = written(tmp_path / "own.csv")
    with pytest.raises(
        UserError, match="--label-map names 'fair', and .* has none of them: its labels are 'bad', 'good'"
    ):
        objectives.load(str(path), text="text", label="label", options={"label_map": '{"fair": "good"}'})
    (tmp_path / "map.json").write_text('{"fair": 1}')
    with pytest.raises(UserError, match="label map.*fair.*=1: expected a text"):
        labels.read_map(tmp_path / "map.json")


@pytest.mark.parametrize(
    ("counts", "told"), [({"a": 40, "b": 10}, True), ({"a": 39, "b": 10}, False), ({"a": 9}, False)]
)
def test_classes_of_very_different_size_are_told(counts, told):
    notes = labels.imbalance(counts)
    assert bool(notes) == told
    assert not told or (
        "'a' has 40 rows, 'b' 10" in notes[0] and "`loralab train` has --class-weights balanced" in notes[0]
    )


# ---- weights of classes ----------------------------------------------------------------------------------------------


def test_balanced_weights_give_each_class_the_same_part_of_the_loss():
    truth = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = classification.class_weights(("a", "b", "c"), truth)
    of_rows = weights[truth]
    assert of_rows.mean() == pytest.approx(1)
    shares = [float(of_rows[truth == i].sum()) for i in range(3)]
    assert shares == pytest.approx([10 / 3] * 3)
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits, truth, weights, reduction="none")
    torch.testing.assert_close(classification.weighted_loss(weights, logits, truth), expected)


def test_a_rare_class_is_found_with_weights_and_lost_without(cli, tiny, tmp_path):  # noqa: F811
    """A rare class that differs by one word, and too few steps to learn it by its own weight."""
    rows = [("the cat sees", "a")] * 190 + [("the dog sees", "b")] * 10
    written(tmp_path / "rare.csv", rows, header=("sentence", "label"))
    found = {}
    for weights in ("none", "balanced"):
        more = ["--class-weights", weights, "--selection", "last", "--json"]
        code, out, _ = cli(*flags(tiny, {"class": "rare.csv"}, epochs=8, lr=0.01, out=weights), *more)
        assert code == 0
        found[weights] = json.loads(out)["metrics"]["f1"]  # of the rare class
    assert found["none"] == 0 < found["balanced"]


def test_weights_where_there_are_no_classes_are_refused(refused, tiny, own):  # noqa: F811
    told = refused(*flags(tiny, own, task=own["value"]), "--class-weights", "balanced")
    assert "--class-weights balanced with a regression: it has no classes to weigh" in told


@pytest.mark.parametrize(
    ("task", "more", "told"),
    [
        ("own.jsonl", ["--separator", ";"], "no CSV or TSV"),
        ("own.parquet", ["--encoding", "cp1252"], "a parquet file has its own"),
        ("minimal-pairs", ["--skip-bad-rows"], "are for a file of your own"),
    ],
)
def test_what_would_do_nothing_is_refused(refused, tiny, own, tmp_path, task, more, told):  # noqa: F811
    columns = {"sentence": ["a", "b"], "label": ["x", "y"]}
    for suffix in (".jsonl", ".parquet"):
        tables.write(columns, tmp_path / f"own{suffix}")
    named = {"text": None, "label": None} if task == "minimal-pairs" else {}
    assert told in refused(*flags(tiny, own, task=task, **named), *more)
