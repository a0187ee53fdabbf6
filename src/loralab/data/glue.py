"""The nine labelled tasks of GLUE (Wang et al., 2018): the same rows from parquet, the classic TSV files or the hub."""

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab.data import classic, tables
from loralab.data.task import Split, Task, build
from loralab.errors import UserError

HUB = "nyu-mll/glue"
UNLABELLED = " (-1 marks a test split, which has no labels)"


@dataclass(frozen=True)
class Row:
    """One task. The files of a split are NAME/SPLIT.parquet and FOLDER/SPLIT.tsv, there with dev for validation."""

    folder: str
    columns: tuple[str, ...]  # of text
    labels: tuple[str, ...] | None  # in id order of nyu-mll/glue; None: a score from 0 to 5
    metrics: tuple[str, ...]
    official: dict[str, int]  # rows of each split of nyu-mll/glue
    label: str = "label"  # name of the label's column in the TSV files
    tsv: tuple[str, ...] | None = None  # the text columns there, where named otherwise
    header: tuple[str, ...] | None = None  # of TSV files that have none
    may_break: bool = False  # the official TSV has lines that end early


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
ACCURACY = ("accuracy",)

TABLE: dict[str, Row] = {
    "cola": Row(
        "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",),
        {"train": 8551, "validation": 1043}, header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Row("SST-2", ("sentence",), ("negative", "positive"), ACCURACY, {"train": 67349, "validation": 872}),
    "mrpc": Row(
        "MRPC", PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"),
        {"train": 3668, "validation": 408}, label="Quality", tsv=("#1 String", "#2 String"),
    ),
    "stsb": Row("STS-B", PAIR, None, ("pearson", "spearman"), {"train": 5749, "validation": 1500}, label="score"),
    "qqp": Row(
        "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy"),
        {"train": 363846, "validation": 40430}, label="is_duplicate", may_break=True,
    ),
    "mnli": Row(
        "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ACCURACY,
        {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832}, label="gold_label", tsv=PAIR,
    ),
    "qnli": Row("QNLI", ("question", "sentence"), ENTAILMENT, ACCURACY, {"train": 104743, "validation": 5463}),
    "rte": Row("RTE", PAIR, ENTAILMENT, ACCURACY, {"train": 2490, "validation": 277}),
    "wnli": Row("WNLI", PAIR, ENTAILMENT[::-1], ACCURACY, {"train": 635, "validation": 71}),
}  # fmt: skip


def canonical(name: str) -> str | None:
    """The name in the table: CoLA, SST-2 and sts_b are cola, sst2 and stsb; None for a name of no row."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return plain if plain in TABLE else None


def load(name: str, data: Path | None = None) -> Task:
    """A task of the table, from a folder of parquet or TSV files, or without one from the hub."""
    key = canonical(name)
    if key is None:
        raise UserError(f"no GLUE task {name!r}: there are {', '.join(TABLE)}")
    row = TABLE[key]
    part = _hub(key) if data is None else _folder(key, data)
    notes: list[str] = []
    splits: dict[str, Split] = {}
    for split, official in row.official.items():
        where, columns, broken = part(split)
        splits[split] = _split(where, columns, row)
        notes += _notes(split, splits[split], official, broken)
    train = splits.pop("train")
    return build(key, row.labels, row.metrics, train, splits, tuple(notes))


def _split(where: str, columns: tables.Columns, row: Row) -> Split:
    faults: tables.Faults = {}
    texts = [tables.convert(columns[name], tables.any_text, f"column {name!r}: ", faults) for name in row.columns]
    identify = _score if row.labels is None else _identify(row.labels)
    labels = tables.convert(columns["label"], identify, "label: ", faults)
    tables.raise_faults(where, faults)
    return Split(list(zip(*texts, strict=True)), labels)


def _identify(labels: tuple[str, ...]) -> Callable[[Any], int]:
    """Class id of a label that is a name or an id, as number or digits."""
    ids = {shown: place for place, name in enumerate(labels) for shown in (name, str(place))}

    def identify(value: Any) -> int:
        if value is None or value == "":
            raise ValueError("null")
        if str(value) not in ids:
            raise ValueError(f"{value!r} instead of {' or '.join(ids)}" + UNLABELLED * (str(value) == "-1"))
        return ids[str(value)]

    return identify


def _score(value: Any) -> float:
    """A score as float32, which is what nyu-mll/glue keeps."""
    score = tables.number(value)
    if not 0 <= score <= 5:
        raise ValueError(f"{value} instead of 0 to 5" + UNLABELLED * (score == -1))
    return float(np.float32(score))


def _notes(split: str, rows: Split, official: int, broken: int) -> list[str]:
    empty = sum(not all(text.strip() for text in texts) for texts in rows.texts)
    said = {
        f"{split} is a sample: {len(rows)} of {official} official rows": len(rows) < official,
        f"{split} has {len(rows)} rows, more than the {official} official ones": len(rows) > official,
        f"{split}: {broken} broken lines of the TSV left out, as in {HUB}": broken,
        f"{split}: {empty} rows with an empty text kept, as in {HUB}": empty,
    }
    return [note for note, holds in said.items() if holds]


# --- sources: split -> (where it is, columns named as on the hub, broken lines left out) ---

Part = tuple[str, tables.Columns, int]


def _hub(name: str) -> Callable[[str], Part]:
    try:
        import datasets
    except ImportError:
        raise UserError("GLUE from the hub needs datasets: pip install datasets, or pass --data DIR") from None
    try:
        parts: Any = datasets.load_dataset(HUB, name)
    except Exception as problem:  # the hub, the network and the cache each raise their own kinds
        reason = f"{type(problem).__name__}: {tables.one_line(problem)}"
        raise UserError(f"no {name} from {HUB} ({reason}): pass --data DIR, a folder of GLUE files") from problem
    return lambda split: (f"{HUB} {name} {split}", parts[split][:], 0)


def _folder(name: str, data: Path) -> Callable[[str], Part]:
    folder, row = _home(name, data), TABLE[name]
    with tables.reading(folder):
        names = sorted(path.name for path in folder.iterdir())

    def paths(pattern: str, split: str) -> list[Path]:
        return [folder / found for found in fnmatch.filter(names, _filled(pattern, split))]

    pattern = next((pattern for pattern in LAYOUTS if paths(pattern, "train")), None)
    if pattern is None:
        expected = " or ".join(_filled(pattern, "train") for pattern in LAYOUTS)
        raise UserError(f"{folder} holds no train split of {name}: expected {expected}")
    absent = [_filled(pattern, split) for split in row.official if not paths(pattern, split)]
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent)} beside {paths(pattern, 'train')[0].name}: add it")
    return lambda split: LAYOUTS[pattern](paths(pattern, split), row, split)


def _home(name: str, data: Path) -> Path:
    """The folder of the task: DATA/cola, DATA/CoLA, or DATA itself if it is called so."""
    with tables.reading(data):
        if data.is_file():
            raise UserError(f"{data} is a file: --data wants a folder that holds {name}/ or {TABLE[name].folder}/")
        folders = sorted(path for path in data.iterdir() if path.is_dir())
    for folder in (*folders, data.resolve()):
        if canonical(folder.name) == name:
            return folder
    there = ", ".join(key for folder in folders if (key := canonical(folder.name))) or "no GLUE task"
    raise UserError(f"{data} holds neither {name}/ nor {TABLE[name].folder}/: there is {there}")


def _filled(pattern: str, split: str) -> str:
    return pattern.format(split=split, stem=split.replace("validation", "dev"))


def _tables(paths: list[Path], row: Row, split: str) -> Part:
    """One file, or all shards of one as the hub stores them."""
    _, of, total = paths[0].stem.partition("-of-")
    if of and int(total) != len(paths):
        raise UserError(f"{paths[0].parent} holds {len(paths)} of {int(total)} shards of {split}: add the others")
    read = [tables.read(path, (*row.columns, "label"), row.columns) for path in paths]
    return str(paths[0]), {name: [value for part in read for value in part[name]] for name in read[0]}, 0


def _tsv(paths: list[Path], row: Row, split: str) -> Part:
    return _classic(paths[0], classic.lines(paths[0], row.header), row)


def _msr(paths: list[Path], row: Row, split: str) -> Part:
    return _classic(paths[0], classic.part(paths[0], classic.lines(paths[0]), split), row)


def _classic(path: Path, lines: classic.Lines, row: Row) -> Part:
    columns, broken = classic.columns(path, lines, (*(row.tsv or row.columns), row.label), row.may_break)
    return str(path), dict(zip((*row.columns, "label"), columns.values(), strict=True)), broken


LAYOUTS: dict[str, Callable[[list[Path], Row, str], Part]] = {  # the first that has a train split
    "{split}.parquet": _tables,
    "{split}-*-of-*.parquet": _tables,
    "{split}.csv": _tables,
    "{split}.jsonl": _tables,
    "{split}.json": _tables,
    "{stem}.tsv": _tsv,
    "msr_paraphrase_train.txt": _msr,
}
