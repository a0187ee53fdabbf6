"""Laws of labels: train, validation and predictions name the same texts, in every format, whatever they look like."""

import csv
import json
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import TABLES, TIMES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import cli  # noqa: F401  (fixture)

import loralab
from loralab import models, objectives
from loralab.data import checks, labels, tables
from loralab.errors import UserError

ODD = [
    *(
        "007",
        "7",
        "1",
        "1.0",
        "01",
        "1.50",
        "1.5",
        "-0",
        "0",
        "+1",
        "1e5",
        "100000",
        "0x1F",
        "31",
        "0b1",
        "1_000",
        "inf",
    ),
    *("true", "True", "TRUE", "false", "yes", "nan", "NaN", "null", "NULL", "None", "NA", "N/A", "#N/A", "-1", "0b1"),
    *("2024-01-01", "01/02/2024", "12:30", "2024-01-01T00:00:00Z", "99999999999999999999", "1e999", "٣", "½"),
    *("pos", " pos", "pos ", "Pos", "a,b", 'say "hi"', '"', "''", "a\nb", "a\rb", "a\r\nb", "a\tb", "=1+1", "#", "\\n"),
    *("é", "e\u0301", "\ufeffx", "a\u2028b", "a\x0cb", "\U0001f600", "{}", "[1]", '{"a": 1}'),
]
Literal = tuple[str, Any]  # a label as text, and as a value that a file of some type holds

texts = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
words = texts.filter(lambda text: text.strip()).map(lambda text: (text, text))
numerals = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(-1000, 1000, places=2).map(str),
    st.sampled_from(["1.50", "1.5", "1.0", "1", "-0", "0", "-0.0", "1e5", "1E5", "1e+05", "100000.0", "1e-7"]),
)
bools = st.booleans().map(lambda value: (json.dumps(value), value))
numbers = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1).map(lambda value: (str(value), value))),
    st.lists(st.floats(allow_nan=False, allow_infinity=False).map(lambda value: (json.dumps(value), value))),
    st.lists(st.dates().map(lambda value: (value.isoformat(), value))),
    st.lists(st.decimals(-1000, 1000, places=2).map(lambda value: (str(value), value))),
)


def in_tsv(label: Literal) -> bool:
    return not set("\t\r\n") & set(label[0])


# Columns of labels of one type, as (text, value): what each format can hold.
COLUMNS: dict[str, st.SearchStrategy[list[Literal]]] = {
    ".csv": st.lists(words),
    ".tsv": st.lists(words.filter(in_tsv)),
    ".json": st.one_of(st.lists(words), st.lists(numerals.map(lambda x: (x, Decimal(x)))), st.lists(bools)),
    ".parquet": st.one_of(st.lists(words), st.lists(bools), numbers),
}
COLUMNS[".jsonl"] = COLUMNS[".json"]


def write(path: Path, column: Sequence[Literal]) -> Path:
    """Write a file with these labels and a text each, by means of its own."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "y"), *(("x", text) for text, _ in column)])
    elif path.suffix == ".tsv":
        path.write_text("a\ty\n" + "".join(f"x\t{text}\n" for text, _ in column), encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pa.parquet.write_table(pa.table({"a": ["x"] * len(column), "y": [value for _, value in column]}), path)
    else:
        cells = [json.dumps(value) if isinstance(value, str) else text for text, value in column]
        rows = [f'{{"a": "x", "y": {cell}}}' for cell in cells]
        path.write_text("\n".join(rows) if path.suffix == ".jsonl" else f"[{', '.join(rows)}]")
    return path


def many(examples: int) -> settings:
    return settings(max_examples=examples * TIMES, deadline=None, suppress_health_check=list(HealthCheck))


@many(300)
@given(draw=st.data())
def test_train_validation_and_predictions_name_the_same_texts(draw: st.DataObject, tally: Callable[..., None]) -> None:
    suffix, other, out = (draw.draw(st.sampled_from([*TABLES])) for _ in range(3))
    column = draw.draw(COLUMNS[suffix].filter(lambda column: len({text for text, _ in column}) > 1))
    shown = [text for text, _ in column]
    if other == ".tsv" and not all(map(in_tsv, column)):
        other = ".csv"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = write(folder / f"train{suffix}", column)
        more = write(folder / f"more{other}", [(text, text) for text in shown] if other != suffix else column)
        tally("label files", 3)
        task = objectives.load(str(train), text="a", label="y", validation=more, regression=False)
        assert task.labels is not None
        assert sorted(task.labels) == sorted(set(shown))
        for split in (task.train, task.validation["validation"]):
            assert [task.labels[int(label)] for label in split.labels] == shown
        answers = {"a": ["x"] * len(shown), "y": [task.labels[int(label)] for label in task.train.labels]}
        if out == ".tsv" and not all(map(in_tsv, column)):
            with pytest.raises(UserError, match="a TSV cannot hold"):
                tables.write(answers, folder / f"out{out}")
            assert not list(folder.glob("out*"))
            return
        tables.write(answers, folder / f"out{out}")
        assert tables.read_all(folder / f"out{out}") == answers
        again = objectives.load(str(folder / f"out{out}"), text="a", label="y", validation=train, regression=False)
        assert (again.labels, again.train.labels) == (task.labels, task.train.labels)


@many(100)
@given(st.lists(numerals.filter(lambda x: abs(float(x)) < 1e300), min_size=2), st.data())
def test_a_regression_reads_the_same_numbers_from_every_format(column: list[str], draw: st.DataObject) -> None:
    scores = [float(text) for text in column]
    if len(set(scores)) < 2:
        return
    asked = None if any(mark in text for text in column for mark in ".eE") else True
    with tempfile.TemporaryDirectory() as name:
        for suffix in TABLES:
            values = [float(text) if suffix == ".parquet" else Decimal(text) for text in column]
            path = write(Path(name) / f"train{suffix}", list(zip(column, values, strict=True)))
            other = write(Path(name) / f"more{draw.draw(st.sampled_from(['.csv', '.json']))}", [("1", 1), ("2.5", 2.5)])
            task = objectives.load(str(path), text="a", label="y", validation=other, regression=asked)
            assert (task.labels, task.train.labels) == (None, scores)
            assert task.validation["validation"].labels == [1.0, 2.5]


ALIKE = [
    *(("1", "1.0"), ("true", "True"), ("1.50", "1.5"), ("0x1F", "31"), ("0x1f", "0X1F"), ("007", "7"), ("+1", "1")),
    *(("-0", "0"), ("1e5", "100000"), ("pos", " pos"), ("pos", "POS"), ("a b", "a  b"), ("é", "e\u0301")),
]


@pytest.mark.parametrize(("pair", "suffix"), list(product(ALIKE, TABLES)), ids=str)
def test_labels_that_read_as_one_value_are_two_classes_and_named(tmp_path: Path, pair: Any, suffix: str) -> None:
    column = [(text, text) for text in (*pair, "other")] * 5
    task = objectives.load(str(write(tmp_path / f"a{suffix}", column)), text="a", label="y")
    assert set(task.labels or ()) == {*pair, "other"}
    assert sum(all(repr(text) in note for text in pair) for note in task.notes if "different classes" in note) == 1


def test_numbers_of_a_json_file_that_read_as_one_value_are_named(tmp_path: Path) -> None:
    column = [("1", 1), ("1.0", 1.0), ("1.00", Decimal("1.00")), ("2", 2)] * 4
    task = objectives.load(str(write(tmp_path / "a.jsonl", column)), text="a", label="y", regression=False)
    assert task.labels == ("1", "1.0", "1.00", "2")
    told = "'1' and '1.0' and '1.00' are different classes: write them alike if they mean one"
    assert sum(note.startswith(told) for note in task.notes) == 1


@pytest.mark.parametrize("values", [(1, "1"), (True, "true"), (True, 1), (1.5, "1.5"), (1, "two")], ids=str)
def test_types_that_would_become_one_class_are_refused(tmp_path: Path, values: tuple[Any, Any]) -> None:
    column = [(json.dumps(value), value) for value in values] * 4
    with pytest.raises(UserError, match="mixes .* and .*: write all labels as one type") as caught:
        objectives.load(str(write(tmp_path / "a.jsonl", column)), text="a", label="y")
    assert all(json.dumps(value) in str(caught.value) for value in values)


def test_a_label_of_validation_that_is_written_in_another_way_is_named(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [("1.50", Decimal("1.50")), ("2", 2)] * 3)
    more = write(tmp_path / "b.csv", [("2", "2"), ("1.5", "1.5")])
    with pytest.raises(UserError, match=r"new value '1\.5', which train lacks \(it has '1\.50'\), in row 2"):
        objectives.load(str(train), text="a", label="y", validation=more, regression=False)


@pytest.mark.parametrize("bad", ["3,4", "nan", "inf", "1_000", "٣", "0x1F", "-", "1e999", "true", "1.2.3"])
def test_a_regression_names_the_row_that_is_no_number(tmp_path: Path, bad: str) -> None:
    path = write(tmp_path / "a.csv", [("0.5", ""), (bad, ""), ("1.5", ""), (" 2 ", "")])
    with pytest.raises(UserError, match=r"column 'y': .* instead of a (finite )?number in row 2; a regression needs"):
        objectives.load(str(path), text="a", label="y", regression=True)


def test_scores_with_a_missing_one_are_a_regression_and_name_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("0.5", ""), ("1.25", ""), ("nan", ""), ("2.0", "")])
    with pytest.raises(UserError, match="'nan' instead of a number in row 3"):
        objectives.load(str(path), text="a", label="y")


def test_a_class_that_looks_like_a_missing_label_is_noted(tmp_path: Path) -> None:
    task = objectives.load(
        str(write(tmp_path / "a.csv", [(x, "") for x in ("pos", "nan", "neg")] * 4)), text="a", label="y"
    )
    assert task.labels == ("nan", "neg", "pos")
    assert "4 rows have the label 'nan': remove them if it stands for a missing one" in task.notes


@pytest.mark.parametrize("suffix", TABLES)
@pytest.mark.parametrize("empty", ["", " ", "\u00a0"])
def test_an_empty_label_is_refused_with_its_row(tmp_path: Path, suffix: str, empty: str) -> None:
    path = write(tmp_path / f"a{suffix}", [("b", "b"), (empty, empty), ("c", "c")])
    with pytest.raises(UserError, match="column 'y': empty in row 2"):
        objectives.load(str(path), text="a", label="y")


def test_classes_are_in_the_order_of_their_numbers() -> None:
    assert labels.class_names(["10", "9", "-1", "1.5"]) == ("-1", "1.5", "9", "10")
    assert labels.class_names(["10", "9", "x"]) == ("10", "9", "x")
    assert labels.class_names([date(2024, 5, 1), date(2023, 12, 31)]) == ("2023-12-31", "2024-05-01")


# --- files as they come back ---


@many(100)
@given(st.lists(numerals, min_size=1), st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]))
def test_numbers_of_a_json_file_come_back_as_they_were_written(column: list[str], out: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write(Path(name) / "in.jsonl", [(text, Decimal(text)) for text in column])
        tables.write(tables.read_all(path), Path(name) / f"out{out}")
        assert list(map(checks.literal, tables.read_all(Path(name) / f"out{out}")["y"])) == column


@many(100)
@given(st.lists(texts, min_size=1), st.lists(texts, min_size=1), st.sampled_from([*TABLES]))
def test_texts_come_back_as_they_are(first: list[str], second: list[str], out: str) -> None:
    rows = min(len(first), len(second))
    columns = {"b": first[:rows], "a": ["x"] * rows, "c": second[:rows]}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"out{out}"
        if out == ".tsv" and any(set("\t\r\n") & set(cell) for cell in (*columns["b"], *columns["c"])):
            with pytest.raises(UserError, match="a TSV cannot hold the tab or line break"):
                tables.write(columns, path)
        else:
            tables.write(columns, path)
            assert tables.read_all(path) == columns


def test_predict_writes_the_labels_of_train(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    column = [(text, text) for text in ("007", "1.50", "true", "0x1F", "2024-01-01", "a,b")] * 4
    task = objectives.load(str(write(tmp_path / "train.csv", column)), text="a", label="y")
    model = models.classifier(str(tiny), len(task.labels or ()), False, torch.float32, seed=0)[0]
    adapters = loralab.attach(model, labels=task.labels, head=True)
    for place, label in enumerate(task.labels or ()):
        with torch.no_grad():
            next(t for key, t in adapters.state().items() if key.endswith("classifier.bias"))[:] = 0
            next(t for key, t in adapters.state().items() if key.endswith("classifier.bias"))[place] = 100
        adapters.save(tmp_path / f"adapter{place}")
        for suffix in TABLES:
            rows, out = write(tmp_path / f"rows{place}{suffix}", column[:2]), tmp_path / f"out{place}{suffix}"
            given = ("--adapters", tmp_path / f"adapter{place}", "--input", rows, "--text", "a", "--model", tiny)
            assert cli("predict", *given, "--out", out)[0] == 0
            answered = tables.read_all(out)
            assert answered["label"] == [label, label]
            assert answered["y"] == [text for text, _ in column[:2]]
