"""Objectives: the kinds of task. OBJECTIVES has a row for each; `load` finds the one that a task is of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab import data
from loralab.data import Task, checks, tables
from loralab.data.own_files import OwnFile
from loralab.data.reading import USUAL, Reading
from loralab.errors import UserError, hint
from loralab.objectives import causal, choice, classification, generation, multi_label, seq2seq, similarity, tagging
from loralab.objectives.objective import Array, Batch, Encoding, Objective, Sums, by_row, ragged

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "Array",
    "Batch",
    "Encoding",
    "Objective",
    "Sums",
    "by_row",
    "find",
    "load",
    "of",
    "ragged",
]

FILES = (classification, multi_label, tagging, choice, similarity, causal, seq2seq)
OBJECTIVES: dict[str, Objective] = {file.OBJECTIVE.name: file.OBJECTIVE for file in FILES}
METRICS = tuple(  # of every kind of task, and of answers that a run wrote
    dict.fromkeys((
        *data.METRICS, *multi_label.METRICS, *tagging.METRICS, *similarity.CORRELATIONS, *similarity.RANKS,
        *causal.LANGUAGE, *generation.METRICS,
    ))
)  # fmt: skip
DEFAULT = "classification"  # of files whose columns --text and --label name


def of(task: Task) -> Objective:
    """Return the objective of a task."""
    return OBJECTIVES[task.objective]


def load(
    task: str,
    folder: Path | str | None = None,
    *,
    objective: str | None = None,
    text: Sequence[str] | str = (),
    label: str | None = None,
    validation: Path | str | None = None,
    regression: bool | None = None,
    options: Mapping[str, Any] | None = None,
    names: tuple[str, ...] | None = None,
    whole: bool = False,
    reading: Reading | None = None,
) -> Task:
    """Load a task by its name, or from a file of one's own.

    `folder` is that of GLUE. For own files only are the text columns, the label column, a validation file, and whether
    the labels are scores (None: guess from how they look). `objective` is the kind of task, by default what the columns
    say; `options` are its settings that are not at their defaults. `names` are labels that are known, and `whole`
    leaves all rows of a file in train, both for the evaluation of a trained adapter. `reading` says how own files are
    read; rows that it leaves out are in its `skipped`, and the notes of the task say what it found. Raises UserError.
    """
    path, options, reading = Path(task), dict(options or {}), reading or Reading()
    row = checks.without_bad_rows(reading, lambda: find(task, objective, text, label))
    if idle := [f"--{name.replace('_', '-')}" for name in options if name not in row.takes]:
        raise UserError(f"{', '.join(idle)} with objective {row.name}: it takes none, so leave it out")
    if path.suffix.lower() in tables.READERS:
        columns = (text,) if isinstance(text, str) else tuple(text)
        other = None if validation is None else Path(validation)
        return _own(row, OwnFile(path, other, columns, label, regression, options, names, whole), reading)
    if path.is_file():
        raise UserError(f"{task}: a file ending in {', '.join(tables.READERS)} was expected")
    given = {"--text": text, "--label": label, "--validation": validation, "--problem-type": regression is not None}
    if any(given.values()) and data.is_name(task):
        used = ", ".join(name for name, value in given.items() if value)
        raise UserError(f"{used} given, but {task} knows its columns: leave it out, it is for a file of your own")
    found = data.load(task, folder)
    if reading.skip or reading.separator != "auto" or reading.encoding != "auto" or "label_map" in options:
        used = "--skip-bad-rows, --separator, --encoding and --label-map"
        raise UserError(f"{task} is read as it is known: {used} are for a file of your own, leave them out")
    if row.name == found.objective:
        return replace(found, options=options)
    if row.of is None:
        able = ", ".join(name for name, other in OBJECTIVES.items() if other.of is not None)
        raise UserError(f"{task} cannot be read as {row.name}: leave --objective out, or choose one of {able}")
    return row.of(found, options)


def _own(row: Objective, file: OwnFile, reading: Reading) -> Task:
    """Read a file of one's own; with `reading.skip` again and again without the rows that are found bad."""
    suffixes = {path.suffix.lower() for path in (file.train, file.validation) if path is not None}
    if reading.separator != "auto" and not suffixes & set(USUAL):
        raise UserError(f"--separator {reading.separator}: {file.train} is no CSV or TSV, leave it out")
    if reading.encoding != "auto" and suffixes == {".parquet"}:
        raise UserError(f"--encoding {reading.encoding}: a parquet file has its own, leave it out")
    if file.regression is not None and row is not OBJECTIVES[DEFAULT]:
        raise UserError(
            f"--problem-type with objective {row.name}: it is for labels that are classes or scores, leave it out"
        )
    task = checks.without_bad_rows(reading, lambda: row.read(file))
    _check_used(row, file, reading)
    return replace(task, notes=(*reading.notes(), *task.notes), reading=reading)


def _check_used(row: Objective, file: OwnFile, reading: Reading) -> None:
    """Raise UserError for a column that is named and was not read."""
    read, label = reading.columns.get(file.train, set()), file.label
    labels = [] if label is None else [label] if label in read else label.split(",")
    if idle := [name for name in (*file.text, *labels) if name not in read]:
        raise UserError(
            f"{file.train}: --text and --label name {', '.join(map(repr, idle))}, which {row.name} does not read here: "
            f"it reads {', '.join(sorted(read))}; leave them out, or choose another --objective"
        )


def find(
    task: str, objective: str | None = None, text: Sequence[str] | str = (), label: str | None = None
) -> Objective:
    """Return the objective that is named, or else the one that the columns of a file say.

    Where `text` or `label` names columns, it is a classification, or of several columns as label multi-label. Raises
    UserError for an unknown name, and for a file whose columns fit no objective, or two.
    """
    if objective is not None:
        if objective not in OBJECTIVES:
            names = ", ".join(OBJECTIVES)
            raise UserError(f"no objective {objective!r}: there are {names}{hint(objective, OBJECTIVES)}")
        return OBJECTIVES[objective]
    path = Path(task)
    if path.suffix.lower() not in tables.READERS:
        return OBJECTIVES[data.objective(task)]
    if label and "," in label and multi_label.names_columns(label, tables.names(path)):
        return multi_label.OBJECTIVE
    if text or label:
        return OBJECTIVES[DEFAULT]
    return _by_columns(path)


def _by_columns(path: Path) -> Objective:
    there = tables.names(path)
    fits = {(row, wanted) for row in OBJECTIVES.values() for wanted in map(frozenset, row.wants) if wanted <= {*there}}
    widest = {row.name for row, wanted in fits if not any(wanted < other for _, other in fits)}
    _check_near(path, there, [wanted for _, wanted in fits])
    if len(widest) == 1:
        return OBJECTIVES[widest.pop()]
    listed = ", ".join(map(checks.one_line, there))
    if widest:
        raise UserError(f"{path}: its columns {listed} fit {' and '.join(sorted(widest))}: choose one with --objective")
    wanted = "; ".join(
        f"{row.name}: {' or '.join('+'.join(names) for names in row.wants)}" for row in OBJECTIVES.values()
    )
    raise UserError(
        f"{path}: its columns {listed} fit no objective ({wanted}): rename them, or name text columns and the label "
        "column of a classification with --text and --label"
    )


def _check_near(path: Path, there: Sequence[str], fits: Sequence[frozenset[str]]) -> None:
    """Raise UserError for columns that would say more than those that fit, but for case and spaces in their names."""
    plain = {name.strip().casefold(): name for name in there}
    for row in OBJECTIVES.values():
        for wanted in row.wants:
            near = {*wanted} <= plain.keys() and not {*wanted} <= {*there}
            if near and all(other < {*wanted} for other in fits):
                names = ", ".join(checks.shown(plain[name]) for name in wanted)
                raise UserError(
                    f"{path}: its columns {names} would make it a file of {row.name} if they were called "
                    f"{', '.join(wanted)}: rename them, or name columns with --text and --label, or the --objective"
                )
