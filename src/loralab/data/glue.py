"""The nine labelled tasks of GLUE (Wang et al., 2018): the same rows from parquet, GLUE's own TSV files or the hub."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab import model_names
from loralab.data import tables
from loralab.data.checks import Faults, any_text, convert, number, one_line, raise_faults
from loralab.data.task import Split, Task, build
from loralab.errors import UserError

HUB = model_names.GLUE
BROKEN = 0.001  # share of QQP's lines that may end early; in the official train file about 1 in 15,000 does
UNLABELLED = " (-1 marks a test split, which has no labels)"


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE. The files of a split are NAME/SPLIT.parquet, or FOLDER/SPLIT.tsv with dev for validation."""

    folder: str
    columns: tuple[str, ...]  # of text
    labels: tuple[str, ...] | None  # in id order of nyu-mll/glue; None: a score from 0 to 5
    metrics: tuple[str, ...]
    official: dict[str, int]  # rows of each split of nyu-mll/glue
    label: str = "label"  # name of the label's column in the TSV files
    tsv: tuple[str, ...] | None = None  # the text columns there, where named otherwise
    header: tuple[str, ...] | None = None  # for TSV files that have none
    may_break: bool = False  # the official TSV has lines that end early


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
ACCURACY = ("accuracy",)

TABLE: dict[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",),
        {"train": 8551, "validation": 1043}, header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), ("negative", "positive"), ACCURACY, {"train": 67349, "validation": 872}),
    "mrpc": GlueTask(
        "MRPC", PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"),
        {"train": 3668, "validation": 408}, label="Quality", tsv=("#1 String", "#2 String"),
    ),
    "stsb": GlueTask("STS-B", PAIR, None, ("pearson", "spearman"), {"train": 5749, "validation": 1500}, label="score"),
    "qqp": GlueTask(
        "QQP", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy"),
        {"train": 363846, "validation": 40430}, label="is_duplicate", may_break=True,
    ),
    "mnli": GlueTask(
        "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ACCURACY,
        {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832}, label="gold_label", tsv=PAIR,
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), ENTAILMENT, ACCURACY, {"train": 104743, "validation": 5463}),
    "rte": GlueTask("RTE", PAIR, ENTAILMENT, ACCURACY, {"train": 2490, "validation": 277}),
    "wnli": GlueTask("WNLI", PAIR, ENTAILMENT[::-1], ACCURACY, {"train": 635, "validation": 71}),
}  # fmt: skip


def canonical(name: str) -> str | None:
    """Return the name in TABLE: CoLA, SST-2 and sts_b are cola, sst2 and stsb. None for a name that is no task."""
    return model_names.glue_task(name)


def load(name: str, data: Path | None = None) -> Task:
    """Load a task from a folder of parquet, CSV, JSON or TSV files, or without a folder from the hub."""
    key = canonical(name)
    if key is None:
        raise UserError(f"no GLUE task {name!r}: there are {', '.join(TABLE)}")
    glue = TABLE[key]
    read = _hub(key) if data is None else _folder(key, data)
    notes: list[str] = []
    splits: dict[str, Split] = {}
    for split, official in glue.official.items():
        source = read(split)
        splits[split] = _split(source, glue)
        notes += _notes(split, splits[split], official, source.broken)
    train = splits.pop("train")
    return build(key, glue.labels, glue.metrics, train, splits, tuple(notes), columns=glue.columns)


@dataclass(frozen=True)
class Source:
    """The columns of a split as they were read."""

    where: str
    columns: tables.Columns  # named as on the hub
    broken: int = 0  # lines left out


def _split(source: Source, glue: GlueTask) -> Split:
    faults: Faults = {}
    texts = [convert(source.columns[name], any_text, f"column {name!r}: ", faults) for name in glue.columns]
    identify = _score if glue.labels is None else _identify(glue.labels)
    labels = convert(source.columns["label"], identify, "label: ", faults)
    raise_faults(source.where, faults)
    return Split(list(zip(*texts, strict=True)), labels)


def _identify(labels: tuple[str, ...]) -> Callable[[Any], int]:
    """Make the function from a label, which is a name or an id as number or digits, to its class id."""
    ids = {shown: place for place, name in enumerate(labels) for shown in (name, str(place))}

    def identify(value: Any) -> int:
        if value is None or value == "":
            raise ValueError("null")
        if str(value) not in ids:
            raise ValueError(f"{value!r} instead of {' or '.join(ids)}" + UNLABELLED * (str(value) == "-1"))
        return ids[str(value)]

    return identify


def _score(value: Any) -> float:
    """Return a score as float32, which is what nyu-mll/glue has."""
    score = number(value)
    if not 0 <= score <= 5:
        raise ValueError(f"{value} instead of 0 to 5" + UNLABELLED * (score == -1))
    return float(np.float32(score))


def _notes(split: str, rows: Split, official: int, broken: int) -> list[str]:
    empty = sum(not all(text.strip() for text in texts) for texts in rows.texts)
    notes = {
        f"{split} is a sample: {len(rows)} of {official} official rows": len(rows) < official,
        f"{split} has {len(rows)} rows, more than the {official} official ones": len(rows) > official,
        f"{split}: {broken} broken lines of the TSV left out, as in {HUB}": broken,
        f"{split}: {empty} rows with an empty text kept, as in {HUB}": empty,
    }
    return [note for note, holds in notes.items() if holds]


# --- where a task is read from: each makes a function from a split to its Source ---


def _hub(name: str) -> Callable[[str], Source]:
    model_names.require_glue(name)
    try:
        import datasets
    except ImportError:
        raise UserError("GLUE from the hub needs datasets: pip install 'loralab[hub]', or pass --data DIR") from None
    try:
        splits: Any = datasets.load_dataset(HUB, name)
    except Exception as problem:  # the hub, the network and the cache each raise their own kinds
        reason = f"{type(problem).__name__}: {one_line(problem)}"
        raise UserError(f"no {name} from {HUB} ({reason}): pass --data DIR, a folder of GLUE files") from problem
    return lambda split: Source(f"{HUB} {name} {split}", splits[split][:])


def _folder(name: str, data: Path) -> Callable[[str], Source]:
    folder, glue = _home(name, data), TABLE[name]
    with tables.readable(folder):
        names = sorted(path.name for path in folder.iterdir())

    def paths(pattern: str, split: str) -> list[Path]:
        return [folder / name for name in fnmatch.filter(names, _filled(pattern, split))]

    pattern = next((pattern for pattern in LAYOUTS if paths(pattern, "train")), None)
    if pattern is None:
        expected = " or ".join(_filled(pattern, "train") for pattern in LAYOUTS)
        raise UserError(f"{folder} holds no train split of {name}: expected {expected}")
    absent = [_filled(pattern, split) for split in glue.official if not paths(pattern, split)]
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent)} beside {paths(pattern, 'train')[0].name}: add it")
    return lambda split: LAYOUTS[pattern](paths(pattern, split), glue, split)


def _home(name: str, data: Path) -> Path:
    """Find the folder of the task: DATA/cola, DATA/CoLA, or DATA itself if it is called so."""
    with tables.readable(data):
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


def _table(paths: list[Path], glue: GlueTask, split: str) -> Source:
    """Read one file, or all shards of one as the hub stores them."""
    _, of, total = paths[0].stem.partition("-of-")
    if of and int(total) != len(paths):
        raise UserError(f"{paths[0].parent} holds {len(paths)} of {int(total)} shards of {split}: add the others")
    shards = [tables.read(path, (*glue.columns, "label")) for path in paths]
    return Source(str(paths[0]), {name: [cell for shard in shards for cell in shard[name]] for name in shards[0]})


# --- GLUE's own TSV files: no quoting, no header in CoLA, a few broken lines in QQP ---

Lines = tuple[list[str], list[list[str]]]  # header, rows


def _tsv(paths: list[Path], glue: GlueTask, split: str) -> Source:
    return _columns(paths[0], _lines(paths[0], glue.header), glue)


def _msr(paths: list[Path], glue: GlueTask, split: str) -> Source:
    """Read a split of msr_paraphrase_train.txt: GLUE's validation rows are those that dev_ids.tsv names by two ids."""
    path = paths[0]
    ids = path.with_name("dev_ids.tsv")
    if not ids.exists():
        raise UserError(f"{ids} does not exist: it says which rows of {path.name} are GLUE's validation split")
    validation = {tuple(row[:2]) for row in _lines(ids, ("#1 ID", "#2 ID"))[1]}
    names, rows = _lines(path)
    tables.require(path, names, ("#1 ID", "#2 ID"))
    places = names.index("#1 ID"), names.index("#2 ID")
    keys = [tuple(row[place] for place in places if place < len(row)) for row in rows]
    chosen = [row for row, key in zip(rows, keys, strict=True) if (key in validation) == (split != "train")]
    return _columns(path, (names, chosen), glue)


def _lines(path: Path, header: tuple[str, ...] | None = None) -> Lines:
    """Read header and fields of every line that is not empty; line ends and a byte order mark go, spaces stay."""
    with tables.readable(path):
        tables.check_file(path)
        with open(path, encoding="utf-8-sig") as file:
            rows = [line.rstrip("\n").split("\t") for line in file if line != "\n"]
    names = list(header) if header else rows.pop(0) if rows else []
    if not rows:
        raise UserError(f"{path} is empty: rows of GLUE were expected")
    return names, rows


def _columns(path: Path, lines: Lines, glue: GlueTask) -> Source:
    """Pick the columns of a task, without the broken lines that QQP may have."""
    names, rows = lines
    wanted = (*(glue.tsv or glue.columns), glue.label)
    tables.require(path, names, wanted)
    places = [names.index(name) for name in wanted]

    def ends_early(row: list[str]) -> bool:
        return len(row) <= max(places) or (glue.may_break and not row[places[-1]])

    broken = [number for number, row in enumerate(rows, 1) if ends_early(row)]
    if len(broken) > len(rows) * BROKEN * glue.may_break:
        raise_faults(path, {f"fewer columns than the {len(names)} expected": broken})
    whole = [row for row in rows if not ends_early(row)]
    columns = {
        name: [row[place] for row in whole] for name, place in zip((*glue.columns, "label"), places, strict=True)
    }
    return Source(str(path), columns, len(broken))


LAYOUTS: dict[str, Callable[[list[Path], GlueTask, str], Source]] = {  # the first that has a train split
    "{split}.parquet": _table,
    "{split}-*-of-*.parquet": _table,
    "{split}.csv": _table,
    "{split}.jsonl": _table,
    "{split}.json": _table,
    "{stem}.tsv": _tsv,
    "msr_paraphrase_train.txt": _msr,
}
