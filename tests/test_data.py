"""Laws of tasks: the same rows from every layout, metrics that equal slow oracles, errors of one line."""

import csv
import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import TABLES
from sklearn.model_selection import train_test_split

from loralab import data, model_names, objectives
from loralab.cli import early
from loralab.data import Split, held_out, is_constant, is_flat, sample, score, tables
from loralab.data.glue import TABLE
from loralab.data.task import digest
from loralab.errors import UserError

NAMES = tuple(TABLE)
ROWS = 60  # of each split in the small copies
whole = cache(data.load)

# Header and line of the TSV files that GLUE's own script downloads; RTE, QNLI and MNLI write labels as words.
CLASSIC = {
    "cola": ("CoLA", "", "gj04\t{label}\t*\t{sentence}"),
    "sst2": ("SST-2", "sentence\tlabel", "{sentence}\t{label}"),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{label}\t{idx}\t7{idx}\t{sentence1}\t{sentence2}",
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{idx}\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\t{sentence1}\t{sentence2}\t{label:.3f}",
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "{idx}\t1\t2\t{question1}\t{question2}\t{label}",
    ),
    "mnli": (
        "MNLI",
        "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "{idx}\t3\t3n\tfiction\t(ROOT)\t{premise}\t{hypothesis}\tneutral\t{word}",
    ),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "{idx}\t{question}\t{sentence}\t{word}"),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "{idx}\t{sentence1}\t{sentence2}\t{word}"),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel", "{idx}\t{sentence1}\t{sentence2}\t{label}"),
}


def write_tsv(folder: Path, name: str, split: str, table: pa.Table) -> None:
    place, header, line = CLASSIC[name]
    words = TABLE[name].labels or ()
    rows = [line.format(**row, word=words and words[int(row["label"])]) for row in table.to_pylist()]
    (folder / place).mkdir(exist_ok=True)
    text = "\n".join([header] * bool(header) + rows) + "\n"
    (folder / place / f"{split.replace('validation', 'dev')}.tsv").write_text(text, encoding="utf-8")


def write_msr(folder: Path, name: str, split: str, table: pa.Table) -> None:
    """MRPC as Microsoft gives it: one file, and the ids of the rows that GLUE validates on."""
    write_tsv(folder, name, split, table)
    home = folder / "MRPC"
    file, ids = home / "msr_paraphrase_train.txt", home / "dev_ids.tsv"
    tsv = home / f"{split.replace('validation', 'dev')}.tsv"
    lines = tsv.read_text(encoding="utf-8").split("\n")[:-1]
    tsv.unlink()
    file.write_text("\n".join([file.read_text(encoding="utf-8").rstrip("\n"), *lines[1:]] if file.exists() else lines))
    if split != "train":
        ids.write_text("".join("\t".join(line.split("\t")[1:3]) + "\n" for line in lines[1:]))


def write_shards(folder: Path, name: str, split: str, table: pa.Table) -> None:
    third = len(table) // 3
    for number, shard in enumerate((table[:third], table[third:])):
        pa.parquet.write_table(shard, made(folder, name) / f"{split}-0000{number}-of-00002.parquet")


def write_json(folder: Path, name: str, split: str, table: pa.Table) -> None:
    lines = [json.dumps(row) for row in table.to_pylist()]
    (made(folder, name) / f"{split}.jsonl").write_text("\n".join(lines))


def made(folder: Path, name: str) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return folder / name


WRITERS: dict[str, Callable[[Path, str, str, pa.Table], None]] = {
    "tsv": write_tsv,
    "shards": write_shards,
    "csv": lambda folder, name, split, table: pa.csv.write_csv(table, made(folder, name) / f"{split}.csv"),
    "jsonl": write_json,
    "parquet": lambda folder, name, split, table: pa.parquet.write_table(
        table, made(folder, name) / f"{split}.parquet"
    ),
}


def small(glue: Path, name: str, split: str, rows: int = ROWS) -> pa.Table:
    return pa.parquet.read_table(glue / name / f"{split}.parquet")[:rows]


# --- the nine tasks ---


@pytest.mark.parametrize("name", NAMES)
def test_the_data_is_what_the_manifest_says(glue: Path, name: str) -> None:
    manifest = json.loads((glue / "MANIFEST.json").read_text())
    task = whole(name, glue)
    names = manifest["label_names"][name]
    assert task.labels == (None if isinstance(names, str) else tuple(names))
    assert task.num_outputs == (1 if isinstance(names, str) else len(names))
    for split, rows in {"train": task.train, **task.validation}.items():
        file = manifest["files"][f"{name}/{split}.parquet"]
        text = [column for column in file["columns"] if column not in ("label", "idx")]
        assert TABLE[name].columns == tuple(text)
        assert all(len(texts) == len(text) for texts in rows.texts)
        assert (len(rows), TABLE[name].official[split]) == (file["rows"], file["official_rows"])
        sample = f"{split} is a sample: {file['rows']} of {file['official_rows']} official rows"
        assert (sample in task.notes) != file["complete"]
        values = [min(int(label), 4) for label in rows.labels]  # stsb is counted in bins, the last of them closed
        assert sorted(Counter(values).items()) == list(enumerate(file["label_counts"].values()))


@pytest.mark.parametrize(("name", "layout"), [*product(NAMES, WRITERS), ("mrpc", "msr")])
def test_every_layout_gives_the_same_task(glue: Path, tmp_path: Path, name: str, layout: str) -> None:
    write = {**WRITERS, "msr": write_msr}[layout]
    loaded = whole(name, glue)
    for split in TABLE[name].official:
        write(tmp_path, name, split, small(glue, name, split))
    again = data.load(name, tmp_path)
    first = {split: rows.take(range(ROWS)) for split, rows in {"train": loaded.train, **loaded.validation}.items()}
    assert {"train": again.train, **again.validation} == first
    assert list(again.validation) == list(loaded.validation)
    assert (again.name, again.labels, again.metrics) == (loaded.name, loaded.labels, loaded.metrics)
    assert again.sha256 == digest(loaded.labels, first)
    assert again.notes == tuple(
        f"{split} is a sample: {len(rows)} of {TABLE[name].official[split]} official rows"
        for split, rows in first.items()
    )


def test_the_hub_gives_the_same_task(glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {split: datasets.Dataset(small(glue, "stsb", split)) for split in TABLE["stsb"].official}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: parts if path == "nyu-mll/glue" else None)
    monkeypatch.setattr(model_names, "unreachable", lambda: None)
    assert data.load("STS-B").train == whole("stsb", glue).train.take(range(ROWS))


def test_glue_from_a_hub_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {*model_names.GLUE_TASKS} == {*TABLE}
    monkeypatch.setattr(model_names, "unreachable", lambda: "no network here")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for load in (lambda: data.load("SST-2"), lambda: early.check(["train", "--task", "SST-2", "--out", "x"])):
        with pytest.raises(UserError, match=r"no sst2 from .*\(no network here\): pass --data DIR"):
            load()
    early.check(["train", "--task", "SST-2", "--data", str(tmp_path)])
    (tmp_path / "nyu-mll___glue/sst2").mkdir(parents=True)
    early.check(["train", "--task", "SST-2"])


@pytest.mark.parametrize(("alias", "name"), [("SST-2", "sst2"), ("sts_b", "stsb"), ("CoLA", "cola")])
def test_aliases_and_a_folder_of_one_task(glue: Path, alias: str, name: str) -> None:
    assert data.load(alias, glue / name) == whole(name, glue)


def test_the_embedded_task_has_a_name_and_aliases() -> None:
    assert data.load("demo") == data.load("embedded") == data.load("minimal-pairs")
    assert data.load("demo").name == data.names()[0] == "minimal-pairs"


def test_broken_lines_and_empty_questions_of_qqp_are_noted(glue: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path, "qqp", "train", small(glue, "qqp", "train", 1500))
    write_tsv(tmp_path, "qqp", "validation", small(glue, "qqp", "validation"))
    train = tmp_path / "QQP/train.tsv"
    train.write_text(train.read_text() + '"\tIs that all?\t0\n8\t1\t2\tWhy?\t\t1\n')
    task = data.load("qqp", tmp_path)
    assert (len(task.train), task.train.texts[-1], task.train.labels[-1]) == (1501, ("Why?", ""), 1)
    assert "train: 1 broken lines of the TSV left out, as in nyu-mll/glue" in task.notes
    assert "train: 1 rows with an empty text kept, as in nyu-mll/glue" in task.notes


def test_spaces_of_a_tsv_stay_and_its_line_ends_go(tmp_path: Path) -> None:
    (tmp_path / "CoLA").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "CoLA" / file).write_bytes(b'a\t1\t\t He said "no. \r\n\r\nb\t0\t*\t"Go.  ')
    assert data.load("cola", tmp_path).train == Split([(' He said "no. ',), ('"Go.  ',)], [1, 0])


def test_the_hash_is_of_the_content() -> None:
    labels, split = ("a", "b"), Split([("x", "y"), ("z", "w")], [0, 1])
    other = [
        digest(("a", "c"), {"train": split}),
        digest(labels, {"test": split}),
        digest(labels, {"train": split.take([1, 0])}),
        digest(labels, {"train": Split(split.texts, [1, 0])}),
        digest(labels, {"train": Split([("xy", ""), ("z", "w")], [0, 1])}),
        digest(labels, {"train": split, "more": split}),
    ]
    assert len({*other, digest(labels, {"train": split})}) == len(other) + 1


# --- metrics, against loops ---


def confusion(logits: np.ndarray, labels: np.ndarray) -> Counter[tuple[int, int]]:
    """(label, prediction) -> rows."""
    return Counter(
        (int(label), max(range(len(row)), key=lambda k: row[k])) for row, label in zip(logits, labels, strict=True)
    )


def slow_f1(counts: Counter[tuple[int, int]], k: int) -> float:
    hit = counts[k, k]
    missed = sum(n for (label, guess), n in counts.items() if (label == k) != (guess == k))
    return 2 * hit / (2 * hit + missed) if hit else 0.0


def slow_matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Gorodkin's correlation: of the indicator matrices of label and prediction."""
    guesses = np.array([[float(k == row.argmax()) for k in range(logits.shape[1])] for row in logits])
    truth = np.array([[float(k == label) for k in range(logits.shape[1])] for label in labels])
    guesses, truth = guesses - guesses.mean(0), truth - truth.mean(0)
    return float((guesses * truth).sum() / math.sqrt((guesses**2).sum() * (truth**2).sum()))


def slow_pearson(x: list[float], y: list[float]) -> float:
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    both = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return both / math.sqrt(math.fsum((a - mx) ** 2 for a in x) * math.fsum((b - my) ** 2 for b in y))


def ranks(x: list[float]) -> list[float]:
    return [sum((b < a) + (b == a) / 2 for b in x) for a in x]


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda z, y: sum(n for (a, b), n in confusion(z, y).items() if a == b) / len(y),
    "matthews_correlation": slow_matthews,
    "f1": lambda z, y: slow_f1(confusion(z, y), 1),
    "f1_macro": lambda z, y: float(np.mean([slow_f1(confusion(z, y), k) for k in range(z.shape[1])])),
    "pearson": lambda z, y: slow_pearson(z[:, 0].tolist(), y.tolist()),
    "spearman": lambda z, y: slow_pearson(ranks(z[:, 0].tolist()), ranks(y.tolist())),
}
OUTPUTS = {"accuracy": (2, 4), "matthews_correlation": (2, 4), "f1": (2,), "f1_macro": (2, 3), "pearson": (1,)}
ORACLE_CASES = [(name, outputs) for name in data.METRICS for outputs in OUTPUTS.get(name, (1,))]


@pytest.mark.parametrize(("name", "outputs"), ORACLE_CASES)
def test_metrics_equal_their_oracles(name: str, outputs: int) -> None:
    rng = np.random.default_rng(5)
    for rows in (17, 90):
        logits = rng.normal(size=(rows, outputs)).round(1).astype(np.float32)  # rounded: ties between ranks
        labels = (logits[:, 0] + rng.normal(size=rows)).round(1) if outputs == 1 else rng.integers(0, outputs, rows)
        found = score([name], logits, labels)[name]
        assert math.isfinite(found)
        assert found == pytest.approx(ORACLES[name](logits, labels), abs=1e-6)


@pytest.mark.parametrize(("name", "side"), list(product(data.METRICS, ("predictions", "labels", "both"))))
def test_constant_predictions_or_labels_score_without_a_warning(name: str, side: str) -> None:
    outputs = 1 if name in ("pearson", "spearman") else 2
    logits = np.random.default_rng(2).normal(size=(9, outputs))
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1])
    logits = np.tile(logits[0], (9, 1)) if side != "labels" else logits
    labels = np.zeros(9) if side != "predictions" else labels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score([name], logits, labels)[name]
    assert 0 <= found <= 1
    if name in ("matthews_correlation", "pearson", "spearman"):
        assert found == 0.0


def test_a_constant_classifier_is_noticed() -> None:
    logits = np.array([[0.1, 0.9, 0.3], [-2.0, 0.5, 0.4]])
    assert is_constant(logits)
    assert not is_constant(logits * [[1], [-1]])
    assert not is_constant(np.array([[0.1], [0.2]]))  # one output has no argmax to speak of


LEARNT = np.random.default_rng(3).uniform(0, 5, 400)
NOISE = np.random.default_rng(4).normal(size=400)


@pytest.mark.parametrize(
    ("scores", "flat"),
    [
        (np.full(400, 2.6), True),
        (2.6 + 1e-3 * NOISE, True),
        (2.6 + 0.2 * NOISE, True),  # a spread of a seventh of the labels' that says nothing about them
        (2.6 + 0.05 * LEARNT, False),  # narrow, yet in order: early in training
        (2.6 - 0.05 * LEARNT, False),
        (2.6 + 1.5 * NOISE, False),  # wide and wrong is bad, not flat
        (0.7 * LEARNT + 0.5 * NOISE, False),
    ],
)
@pytest.mark.parametrize("scale", [0.2, 1.0, 300.0])
def test_scores_that_are_nearly_one_value_and_follow_no_label_are_noticed(scores, flat, scale) -> None:
    assert is_flat((scale * scores).astype(np.float32), (scale * LEARNT).astype(np.float32)) is flat
    assert not is_flat(scores, np.full(400, 2.0))  # labels that do not vary ask for one value


# --- held-out rows ---

SIZES = [[8551 - 2528, 2528], [40, 3, 9], [5000, 9000], [70, 1, 30], [2, 1], [2] * 45, [1] * 20 + [7]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_held_out_is_a_stratified_part_that_every_method_shares(sizes: list[int]) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes)).tolist()
    split = Split([(str(row),) for row in range(len(labels))], labels)
    inside, outside = held_out(split, "ab" * 32, True)
    assert (inside, outside) == held_out(split, "ab" * 32, True)
    assert sorted(inside + outside) == list(range(len(split)))
    assert (inside, outside) == (sorted(inside), sorted(outside))
    assert len(outside) == min(1000, max(1, round(len(split) / 10)))
    assert set(split.take(inside).labels) == set(labels)  # a class with one row stays in train
    if len(split) > 200:
        assert outside != held_out(split, "ba" * 32, True)[1]
    if len(sizes) <= len(outside):
        share = len(outside) / len(labels)
        assert all(abs(split.take(outside).labels.count(k) - size * share) < 1.5 for k, size in enumerate(sizes))


def test_held_out_rows_of_a_regression_cover_the_quantiles() -> None:
    labels = (np.random.default_rng(3).normal(size=730) ** 3).tolist()
    split = Split([("",)] * len(labels), labels)
    inside, outside = held_out(split, "c0" * 32, False, fraction=0.2, at_most=100)
    assert (len(inside), len(outside)) == (630, 100)
    edges = np.quantile(labels, np.arange(1, 10) / 10)
    counts = Counter(np.searchsorted(edges, split.take(outside).labels).tolist())
    assert all(abs(counts[bin] - 10) <= 1 for bin in range(10))


def drawn_by_sklearn(split: Split, sha256: str, classification: bool, fraction: float, at_most: int) -> list[int]:
    """The held-out rows as rule 1 of docs/protocol.md has them, drawn by the library that the rule describes."""
    size = min(at_most, max(1, round(len(split) * fraction)))
    groups: list[float] = list(split.labels)
    if not classification:
        bins, order = min(10, size), sorted(range(len(split)), key=lambda row: split.labels[row])
        for rank, row in enumerate(order):
            groups[row] = rank * bins // len(split)
    seen: set[float] = set()
    spare = [row for row, group in enumerate(groups) if group in seen or seen.add(group)]
    if size == len(spare):
        return spare
    times = Counter(groups[row] for row in spare)
    many = [row for row in spare if times[groups[row]] > 1]
    strata = [groups[row] for row in many]
    seed = (int(sha256[:8], 16) + 20210617) % 2**32
    stratified = len(set(strata)) <= min(size, len(many) - size)
    rows, stratify = (many, strata) if stratified else (spare, None)
    return sorted(train_test_split(rows, test_size=size, random_state=seed, stratify=stratify)[1])


def test_held_out_and_sampled_rows_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(8)
    for trial in range(400):
        classification, rows = trial % 3 > 0, int(rng.integers(5, 300))
        classes = rng.choice(int(rng.integers(1, 15)), rows, p=None) ** int(rng.integers(1, 4))
        labels = classes.tolist() if classification else rng.normal(size=rows).round(int(rng.integers(0, 4))).tolist()
        split, sha256 = Split([("",)] * rows, labels), rng.bytes(32).hex()
        size = int(rng.integers(1, rows - min(rows - 1, len(set(labels)) if classification else 10) + 1))
        fraction = float(rng.choice([0.1, 0.2, 0.5, 1.0]))
        try:
            inside, outside = held_out(split, sha256, classification, fraction, size)
            assert outside == drawn_by_sklearn(split, sha256, classification, fraction, size)
            assert sorted(inside + outside) == list(range(rows))
            assert sample(split, sha256, classification, size) == drawn_by_sklearn(
                split, sha256, classification, 1.0, size
            )
        except UserError:  # too few rows are spare
            assert rows < 30


STORED = {  # of the data that the stored runs were made with: start of the task's hash, and of its held-out rows' hash
    "cola": ("b97d8ad0382e10ec", "2b384057782f7592"),
    "mnli": ("289ba05340cb241d", "71511eea1e826d51"),
    "mrpc": ("6770ef37e3d4875b", "81ecb2f6de083fe3"),
    "qnli": ("5dbce91e6e0835a2", "fdb851930548ee31"),
    "qqp": ("632e7f5e04eb22d6", "77aa1346c02c25ef"),
    "rte": ("3725f2fd58c8d526", "b2a8608854df8a3e"),
    "sst2": ("6720dfa83b71e1be", "dd8546048f16729d"),
    "stsb": ("f345099ca1b8b927", "b3d3bee4f6a27116"),
    "wnli": ("3f0462fa9f282af3", "4d46b9dd8019917e"),
}


@pytest.mark.parametrize("name", NAMES)
def test_stored_runs_had_the_same_held_out_rows(glue: Path, name: str) -> None:
    task = whole(name, glue)
    classification = task.labels is not None
    for fraction, at_most in ((0.1, 1000), (0.2, len(task.train))):
        outside = held_out(task.train, task.sha256, classification, fraction, at_most)[1]
        assert outside == drawn_by_sklearn(task.train, task.sha256, classification, fraction, at_most)
    for split in (task.train, *task.validation.values()):
        chosen = sample(split, task.sha256, classification, len(split) // 3)
        assert chosen == drawn_by_sklearn(split, task.sha256, classification, 1.0, len(split) // 3)
    sha256, rows = STORED[name]
    if not task.sha256.startswith(sha256):
        pytest.skip(f"the {name} in {glue} is not the one of the stored runs")
    drawn = held_out(task.train, task.sha256, classification)
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest().startswith(rows)


# --- own files ---


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    writers: dict[str, Callable[[], object]] = {
        ".csv": lambda: pa.csv.write_csv(pa.table(columns), path),
        ".tsv": lambda: path.write_text(
            "\n".join("\t".join(map(str, row)) for row in [columns, *zip(*columns.values(), strict=True)])
        ),
        ".jsonl": lambda: path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ".json": lambda: path.write_text(json.dumps(rows, indent=1)),
        ".parquet": lambda: pa.parquet.write_table(pa.table(columns), path),
    }
    writers[path.suffix]()
    return path


KINDS: list[tuple[list[Any], bool | None, int]] = [  # labels, whether a regression is asked for, classes
    ([10, 9, 10, 9], None, 2),
    ([-1, 0, 1, 0], None, 3),
    (["pos", "neg", "mixed", "None"], None, 4),
    ([True, False, True, True], None, 2),
    ([0.5, 2.0, 1.25, 3.0], None, 0),
    ([1, 3, 2, 4], True, 0),
    ([1.0, 0.0, 1.0, 0.0], False, 2),
]
METRICS = {0: ("pearson", "spearman"), 2: ("accuracy", "f1", "matthews_correlation")}


def as_written(path: Path, labels: list[Any]) -> list[str]:
    """The label texts of a file: its own text in a CSV or TSV, else the JSON of each label."""
    if path.suffix in (".csv", ".tsv"):
        with path.open(newline="") as file:
            dialect: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            return [row["y"] for row in csv.DictReader(file, **dialect)][: len(labels)]
    return [label if isinstance(label, str) else json.dumps(label) for label in labels]


@pytest.mark.parametrize(("kind", "suffix"), list(product(KINDS, TABLES)), ids=str)
def test_own_files_of_every_format_and_kind_of_label(tmp_path: Path, kind: Any, suffix: str) -> None:
    labels, asked, classes = kind
    texts = ['"say hi", twice "', "7", "ä b\u2028c", " spaced "] * 10  # a number is text where text is expected
    train = write(tmp_path / f"mine{suffix}", {"id": list(range(40)), "a": texts, "b": texts[::-1], "y": labels * 10})
    other = write(tmp_path / f"other{suffix}", {"y": labels[1:3], "a": ["new", "7"], "b": ["rows", "no"]})
    task = objectives.load(str(train), text=("a", "b"), label="y", validation=other, regression=asked)
    shown = as_written(train, labels)
    numeric = not any(isinstance(label, str | bool) for label in labels)
    names = tuple(sorted(set(shown), key=float if numeric else str)) if classes else None
    assert (task.name, task.labels, list(task.validation)) == ("mine", names, ["validation"])
    assert task.num_outputs == max(classes, 1)
    assert task.metrics == METRICS.get(classes, ("accuracy", "f1_macro"))
    assert task.train.texts == list(zip(texts, texts[::-1], strict=True))
    assert task.validation["validation"].texts == [("new", "rows"), ("7", "no")]
    if names is None:
        assert task.train.labels == labels * 10
    else:
        assert [names[int(label)] for label in task.train.labels] == shown * 10
    assert task.validation["validation"].labels == task.train.labels[1:3]
    task = objectives.load(str(train), text="a", label="y", regression=asked)
    assert (len(task.train), len(task.validation["validation"])) == (32, 8)
    assert task == objectives.load(str(train), text="a", label="y", regression=asked)
    notes = "; ".join(task.notes)
    assert "8 of 40 rows are held out" in notes
    assert "8 of 8 rows of validation have the text of a row of train" in notes
    assert ("regression," if names is None else f"{len(names)} classes") in notes


def test_a_text_of_a_csv_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text('a,y\n"two\nlines",0\none,1\nx,1\nz,0\n')
    assert ("two\nlines",) in objectives.load(str(tmp_path / "own.csv"), text="a", label="y").train.texts


# --- bad input: one line that says what came, what was expected, what to do ---

Load = Callable[[Path], object]
GOOD: dict[str, list[Any]] = {"a": ["one", "two", "three", "four"] * 3, "y": [0, 1, 0, 1] * 3}


def own(**changed: list[Any]) -> Load:
    """A load of an own parquet file with some columns changed."""
    return lambda tmp: load_own(write(tmp / "own.parquet", GOOD | changed))


def raw(name: str, content: str | bytes) -> Load:
    """A load of an own file of these bytes."""

    def run(tmp: Path) -> object:
        (tmp / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return load_own(tmp / name)

    return run


def load_own(path: Path, **changed: Any) -> object:
    return objectives.load(str(path), **({"text": "a", "label": "y"} | changed))


def asked(**changed: Any) -> Load:
    """A load of a good file with other keywords."""
    return lambda tmp: load_own(write(tmp / "own.csv", GOOD), **changed)


def validated(**changed: list[Any]) -> Load:
    return lambda tmp: load_own(write(tmp / "own.csv", GOOD), validation=write(tmp / "more.jsonl", GOOD | changed))


def twin(tmp: Path) -> object:
    path = write(tmp / "own.csv", GOOD)
    return load_own(path, validation=path)


def folder(name: str, **files: str) -> Load:
    """A load of a GLUE task from a folder of these files; __ stands for / and _dot_ for a dot."""

    def run(tmp: Path) -> object:
        for file, content in files.items():
            path = tmp / file.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        return data.load(name, tmp)

    return run


RTE = "index\tsentence1\tsentence2\tlabel\n"
LINE = "0\tIt rains.\tIt is wet.\tentailment\n"
BAD: dict[str, tuple[Load, tuple[str, ...]]] = {
    "unknown task": (lambda tmp: data.load("colla"), ("'colla'", "did you mean 'cola'?", "wnli", ".parquet")),
    "no such file": (lambda tmp: load_own(tmp / "x.csv"), ("x.csv does not exist",)),
    "a folder": (lambda tmp: (tmp / "x.csv").mkdir() or load_own(tmp / "x.csv"), ("x.csv is a folder",)),
    "ending": (raw("own.txt", "a"), ("own.txt", "ending in .csv")),
    "no text column": (asked(text=()), ("own.csv", "text columns none", "--text", "a, y")),
    "three text columns": (asked(text=("a", "y", "z")), ("text columns a, y, z", "one or two")),
    "unknown columns": (asked(text="txt", label="lbl"), ("own.csv", "'txt', 'lbl'", "columns there: a, y")),
    "text is label": (asked(label="a"), ("a, a name a column twice",)),
    "keywords of files": (lambda tmp: objectives.load("cola", label="y"), ("--label", "cola knows its columns")),
    "doubled column": (raw("own.csv", "a,y,a\n1,2,3\n"), ("more than one column 'a'",)),
    "same file": (twin, ("own.csv is both train and validation",)),
    "null, empty and typed text": (
        own(a=[None, "two", " ", "x"] * 2 + [None] * 4),
        ("own.parquet", "column 'a': null in 6 rows (1, 5, 9, 10, 11, 12)", "column 'a': empty in 2 rows (3, 7)"),
    ),
    "all faults at once": (
        own(a=["one", None, *"cdefghijkl"], y=[0, 1, None, *[1] * 9]),
        ("'a': null in row 2", "'y': null in row 3", "mend or remove"),
    ),
    "numbers for text": (own(a=list(range(12))), ("'a': number instead of text in 12 rows",)),
    "nan label": (own(y=[0.5, math.nan, *[2.0] * 10]), ("'y': null in row 2",)),
    "infinite label": (own(y=[0.5, math.inf, *[2.0] * 10]), ("'y': inf instead of a finite number in row 2",)),
    "label of bytes": (own(y=[b"x"] * 12), ("'y': bytes instead of text",)),
    "missing label in a CSV": (raw("own.csv", "a,y\none,pos\ntwo,\nthree,neg\n"), ("'y': empty in row 2",)),
    "missing key in JSON": (raw("own.jsonl", '{"a":"x","y":1}\n{"a":"z"}\n{"y":1}'), ("'a': null in row 3", "row 2")),
    "half a character": (raw("own.json", '[{"a":"\\ud83d","y":1}]'), ("half of a surrogate pair in row 1",)),
    "kinds of label": (
        raw("own.jsonl", '{"a":"x","y":1}\n{"a":"z","y":"1"}'),
        ("'y' mixes number (1) and text (\"1\")",),
    ),
    "one class": (own(y=["good"] * 12), ("own.parquet: all labels are 'good' in 12 rows", "at least two")),
    "one score": (own(y=[2.5] * 12), ("all labels are 2.5", "at least two")),
    "one row": (own(a=["x"], y=[1]), ("own.parquet", "in 1 rows", "at least two")),
    "two rows": (own(a=["x", "z"], y=[1, 0]), ("own.parquet", "1 of 2 rows", "give a validation file")),
    "one class of GLUE": (
        folder("rte", RTE__train_dot_tsv=RTE + LINE * 2, RTE__dev_dot_tsv=RTE + LINE),
        ("rte train: all labels are 'entailment' in 2 rows",),
    ),
    "test split": (own(y=[-1] * 12), ("'y' is -1", "test split")),
    "words for scores": (
        asked(label="a", text="y", regression=True),
        ("column 'a': 'one' instead of a number in 3 rows (1, 5, 9)", "needs numbers"),
    ),
    "new label": (validated(y=[0, 2] * 6), ("more.jsonl", "new value '2', which train lacks, in 6 rows (2, 4")),
    "no validation rows": (validated(a=[], y=[]), ("more.jsonl is empty",)),
    "no bytes": (raw("own.csv", ""), ("own.csv is empty",)),
    "no rows": (raw("own.csv", "a,y\n"), ("own.csv has no rows",)),
    "no objects": (raw("own.json", "[]"), ("own.json has no rows",)),
    "ragged CSV": (raw("own.csv", "a,y\nx,1\nz,1,2\n"), ("own.csv", "3 cells where 2 were expected in row 2")),
    "UTF-8 with a broken byte": (
        raw("own.csv", "a,y\nd\u00e9j\u00e0,1\nb,0\n".encode() + b"\xff,1\n"),
        ("own.csv is UTF-8, but for 1 places, the first in line 4", "--encoding"),
    ),
    "cut parquet": (raw("own.parquet", b"PAR1 and no more"), ("own.parquet cannot be read as parquet",)),
    "not JSON": (raw("own.jsonl", '{"a":"x","y":1}\n{"a":\n[1]\n'), ("own.jsonl", "not JSON in row 2")),
    "JSON without names": (
        raw("own.jsonl", '{"a":"x","y":1}\n[1]\n'),
        ("not a JSON object with named columns in row 2",),
    ),
    "no data folder": (lambda tmp: data.load("cola", tmp / "no"), ("no does not exist",)),
    "data is a file": (lambda tmp: data.load("cola", write(tmp / "d.csv", GOOD)), ("d.csv is a file", "--data")),
    "folder without the task": (folder("cola", RTE__train_dot_tsv=RTE), ("neither cola/ nor CoLA/", "there is rte")),
    "empty folder": (folder("rte", RTE__readme="x"), ("no train split", "train.parquet", "train.tsv")),
    "no dev": (
        folder("mnli", MNLI__train_dot_tsv="x"),
        ("lacks dev_matched.tsv, dev_mismatched.tsv beside train.tsv",),
    ),
    "no dev ids": (folder("mrpc", MRPC__msr_paraphrase_train_dot_txt="x\n1\n"), ("dev_ids.tsv does not exist",)),
    "a shard short": (
        lambda tmp: (
            pa.parquet.write_table(pa.table(GOOD), made(tmp, "rte") / "train-00000-of-00002.parquet"),
            pa.parquet.write_table(pa.table(GOOD), tmp / "rte/validation-00000-of-00001.parquet"),
            data.load("rte", tmp),
        ),
        ("1 of 2 shards of train",),
    ),
    "a pipe": (lambda tmp: os.mkfifo(tmp / "own.csv") or load_own(tmp / "own.csv"), ("own.csv is a pipe or a device",)),
    "a device": (
        lambda tmp: (tmp / "own.tsv").symlink_to("/dev/zero") or load_own(tmp / "own.tsv"),
        ("own.tsv is a pipe or a device",),
    ),
    "a pipe for validation": (
        lambda tmp: os.mkfifo(tmp / "v.csv") or asked(validation=tmp / "v.csv")(tmp),
        ("v.csv is a pipe or a device",),
    ),
    "a pipe of GLUE": (
        lambda tmp: (
            made(tmp, "rte") and [os.mkfifo(tmp / f"rte/{x}.tsv") for x in ("train", "dev")] and data.load("rte", tmp)
        ),
        ("train.tsv is a pipe or a device",),
    ),
    "UTF-16 without its mark": (raw("own.csv", "a,y\nx,1\n".encode("utf-16-le")), ("NUL characters in the names",)),
    "NUL in a text": (raw("own.csv", "a,y\nx\0z,1\nb,0\n"), ("column 'a': a NUL character in row 1",)),
    "NUL in a label": (
        raw("own.jsonl", '{"a":"x","y":"\\u0000"}\n{"a":"x","y":"z"}'),
        ("'y': a NUL character in row 1",),
    ),
    "NUL in a parquet": (own(a=["x\0", *["z"] * 11]), ("column 'a': a NUL character in row 1",)),
    "deep JSON": (raw("own.json", "[" * 200_000), ("own.json cannot be read: it is nested too deeply",)),
    "deep line of JSON": (
        raw("own.jsonl", '{"a":"x","y":1}\n{"a":"x","y":' + "[" * 100_000 + "]" * 100_000 + "}\n"),
        ("own.jsonl: nested too deeply in row 2",),
    ),
    "a key twice": (raw("own.jsonl", '{"a":"x","y":1,"y":2}\n{"a":"x","y":1}\n'), ("'y' twice in an object in row 1",)),
    "a number of 5,000 digits": (raw("own.jsonl", '{"a":"x","y":' + "1" * 5000 + "}"), ("not JSON in row 1",)),
    "unclosed quote": (
        raw("own.csv", 'a,y\n"x,1\nz,2\n'),
        ("own.csv", "a quote mark that may be open in row 1"),
    ),
    "unclosed quote in the header": (raw("own.csv", '"a,y\nx,1\nz,2\n'), ("own.csv",)),
    "no column of a parquet": (
        lambda tmp: load_own(write(tmp / "own.parquet", GOOD), text="b"),
        ("no column 'b'; columns there: a, y",),
    ),
    "no rows in TSV": (folder("rte", RTE__train_dot_tsv=RTE, RTE__dev_dot_tsv=RTE + LINE), ("train.tsv is empty",)),
    "no header in TSV": (folder("rte", RTE__train_dot_tsv=LINE * 2, RTE__dev_dot_tsv=RTE), ("no column", "It rains.")),
    "cut TSV": (
        folder("rte", RTE__train_dot_tsv=RTE + LINE + "1\tIt", RTE__dev_dot_tsv=RTE + LINE),
        ("train.tsv: fewer columns than the 4 expected in row 2",),
    ),
    "unknown GLUE labels": (
        folder("rte", RTE__train_dot_tsv=RTE + LINE + LINE.replace("\tent", "\tEnt"), RTE__dev_dot_tsv=RTE + LINE),
        ("'Entailment' instead of entailment or 0 or not_entailment or 1 in row 2",),
    ),
    "GLUE test split": (
        folder("rte", RTE__train_dot_tsv=RTE + LINE.replace("entailment", "-1"), RTE__dev_dot_tsv=RTE + LINE),
        ("train.tsv", "'-1' instead of", "test split"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path: Path, case: str) -> None:
    run, parts = BAD[case]
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def repeated(path: Path) -> None:
    """A text of 1,000 characters, 10 million times: 10 GB from a file of about a megabyte."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000_000, np.int32)), pa.array(["x" * 1000]))
    pa.parquet.write_table(pa.table({"a": text, "y": np.arange(10_000_000) % 2 == 0}), path)


def compressed(path: Path) -> None:
    """The same from pages that compress well."""
    table = pa.table({"a": ["x" * 100_000] * 1000, "y": [0, 1] * 500})
    with pa.parquet.ParquetWriter(path, table.schema, use_dictionary=False, compression="zstd") as writer:
        for _ in range(25):
            writer.write_table(table)


@pytest.mark.parametrize("bomb", [repeated, compressed])
def test_a_small_parquet_of_many_gigabytes_is_refused_before_it_is_read(
    tmp_path: Path, bomb: Callable[[Path], None]
) -> None:
    path = tmp_path / "own.parquet"
    bomb(path)
    assert path.stat().st_size < 2e6
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    with pytest.raises(UserError, match=r"own\.parquet takes [0-9.]+ GB .* the limit is 2 GB: .* LORALAB_DATA_GB="):
        load_own(path)
    assert pool.max_memory() - before < 1e9


def test_the_limit_of_a_file_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"own{suffix}", GOOD) for suffix in TABLES]
    for limit, refusal in (("1e-9", "LORALAB_DATA_GB=1"), ("much", "a number of gigabytes was expected"), ("1", "")):
        monkeypatch.setenv("LORALAB_DATA_GB", limit)
        for path in paths:
            if not refusal:
                load_own(path)
                continue
            with pytest.raises(UserError, match=refusal):
                load_own(path)


@pytest.mark.parametrize("problem", [PermissionError("denied\nhere"), OSError("bad\nblock"), pa.ArrowInvalid("a\nb")])
def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def refuse(*_: object) -> Any:
        raise problem

    monkeypatch.setitem(tables.READERS, ".csv", refuse)
    with pytest.raises(
        UserError, match=r"own\.csv (may not be read: permission denied|cannot be read as csv)"
    ) as caught:
        load_own(write(tmp_path / "own.csv", GOOD))
    assert "\n" not in str(caught.value)


def test_without_network_the_message_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: object) -> Any:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(data.glue.model_names, "unreachable", lambda: None)  # the hub answers, its data set does not
    with pytest.raises(UserError, match=r"no rte from nyu-mll/glue \(ConnectionError: no route\): pass --data DIR"):
        data.load("rte")


@pytest.mark.parametrize(
    ("metric", "logits", "message"),
    [("f1", np.eye(3), "f1_macro"), ("bleu", np.eye(3), "accuracy"), ("accuracy", np.eye(3) * math.nan, "diverged")],
)
def test_scores_that_make_no_sense(metric: str, logits: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score([metric], logits, [0, 1, 1])
