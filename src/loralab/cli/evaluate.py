"""`loralab evaluate`: the metrics of an adapter on rows with labels, overall and for each class or type."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab import objectives
from loralab.cli import base
from loralab.cli.show import Json, as_json, note, table
from loralab.cli.show_learned import show
from loralab.data import Split, Task, checks, tables
from loralab.data.batches import Rows, cut_at
from loralab.data.reading import Reading, Separator
from loralab.errors import UserError
from loralab.objectives import learned, saved
from loralab.run import written
from loralab.run.bar import rows_bar
from loralab.run.settings import GenerateMetric
from loralab.serve.answers import predictions
from loralab.serve.loading import Device, model_of, torch_device


def evaluate(
    adapter: Path,
    /,
    *,
    task: str,
    data: Path | None = None,
    text: list[str] | None = None,
    label: str | None = None,
    model: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    rank: int | None = None,
    generate_metric: GenerateMetric | None = None,
    generate_rows: int | None = None,
    out: Path | None = None,
    wrong: Path | None = None,
    separator: Separator = "auto",
    encoding: str = "auto",
    skip_bad_rows: bool = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score an adapter on a file with labels, or on the validation rows of a task by name.

    Parameters
    ----------
    adapter: Path
        An adapter folder of loralab or PEFT.
    task: str
        A file with the columns that training needs, or a task by name.
    data: Path
        Folder of the GLUE tasks.
    text: list[str]
        Columns of text; by default those the adapter was trained on.
    label: str
        Column of the label.
    model: str
        The base: a local folder, a hub name, or an alias; by default the one the adapter names.
    batch_size: int
        Rows of a batch.
    max_length: int
        Tokens after which a row is cut; by default as in training.
    rank: int
        Rank to evaluate at, for adapters trained for many.
    generate_metric: Literal
        For an adapter that writes: let it write answers, and score them: exact (the same text), json (the first JSON in
        the answer says the same) or rouge (ROUGE-L, needs loralab[rouge]).
    generate_rows: int
        Most rows that are answered for --generate-metric; by default all.
    out: Path
        File for the answer of each row (CSV, TSV, JSON, JSONL or parquet); must not exist.
    wrong: Path
        File for the rows that are most wrong, with their numbers and texts; must not exist.
    separator: Separator
        What divides the cells of a CSV or TSV; by default found by looking, as in training.
    encoding: str
        Encoding of the file; by default UTF-8, else that of the file the adapter learned from.
    skip_bad_rows: bool
        Leave out rows that cannot be used; by default they are refused.
    device: Device
        Where it runs: a GPU if there is one, cpu or cuda.
    """
    base.check_counts(batch_size=batch_size, max_length=max_length, rank=rank, generate_rows=generate_rows)
    if generate_rows is not None and generate_metric is None:
        raise UserError("--generate-rows: no --generate-metric, so no row is answered: leave it out")
    torch_device(device)
    base.check_out(out)
    base.check_out(wrong, "--wrong")
    file = base.read(adapter)
    known = saved.read(adapter, file.base.get("task_type"))
    reading = Reading(separator, encoding, skip_bad_rows, known.written)
    found = _task(known, task, data, tuple(text or ()), label, tuple(file.labels), reading)
    if out is not None and objectives.of(found).writes(found.labels):
        raise UserError(f"--out: {found.objective} has no answer for each row; loralab generate writes texts")
    name = model_of(model, adapter, file)
    handle, tokenizer = base.load(name, adapter, device=device)
    split = _rows(found)
    most, first = cut_at(max_length or known.max_length, handle.model), handle.names[0]
    answered = len(split) if generate_rows is None else generate_rows
    asked = written.questions(found, split, generate_metric, answered, handle.model, tokenizer, most)
    with handle.use(first, rank=rank), rows_bar("rows", len(split)) as done:
        made, rows = predictions(handle, found, split, tokenizer, most, batch_size, done)
    labels, objective = rows.labels.numpy(), objectives.of(found)
    scores, what = objective.score(found, made, labels), learned.learned(found, made, labels)
    if asked:
        with rows_bar("answers", len(asked)) as done:
            scores |= written.scores(handle, first, asked, tokenizer, generate_metric, rank, done)
    if out is not None:
        tables.write(_answers(found, split, made), out)
    if wrong is not None:
        tables.write(_wrong(found, split, rows, made), wrong)
    result: dict[str, Any] = {"adapter": str(adapter), "task": found.name, "objective": found.objective}
    result |= {"rows": len(rows), "metrics": scores, "parts": {}, **what}
    if json:
        as_json(result)
        return
    for line in (*found.notes, *rows.notes, *rows.cut()):
        note(line)
    table(
        f"{adapter} on {found.name}: {len(rows)} rows",
        ("metric", "value"),
        [(k, f"{v:.4f}") for k, v in scores.items()],
    )
    show(what)
    for name in what.get("lost", []):
        note(f"{name!r} is found in no row, and {adapter} was trained to find it", "warning")


def _task(
    known: saved.Saved,
    task: str,
    data: Path | None,
    text: tuple[str, ...],
    label: str | None,
    labels: tuple[str, ...],
    reading: Reading,
) -> Task:
    """Read the rows under the objective and the labels of the adapter."""
    names = labels if known.labels is None and known.objective != "causal" else tuple(known.labels or ())
    is_file = Path(task).suffix.lower() in tables.READERS
    names_there = checks.without_bad_rows(reading, lambda: tables.names(Path(task))) if is_file else []
    there = {*names_there}
    if label is None and known.label is not None and there & {known.label, *known.label.split(",")}:
        label = known.label
    usual = label is None and known.objective == "classification"
    if usual and {*known.columns, "label"} <= there and known.columns:
        label = "label"
    if is_file and label is None and known.label is not None:
        raise UserError(
            f"{task}: no column {known.label!r}, the label that the adapter learned; columns there: "
            f"{', '.join(map(checks.one_line, names_there))}; name the one that has it with --label"
        )
    if is_file and not text and label is not None:
        text = tuple(known.columns)
    found = objectives.load(
        task, data, objective=known.objective, text=text, label=label, options=known.options,
        regression=names == ("score",) if is_file and known.objective == "classification" else None,
        names=names or None, whole=True, reading=reading,
    )  # fmt: skip
    wanted = tuple(found.labels or ())
    if names and names != ("score",) and wanted != names:
        raise UserError(f"the adapter's labels are {', '.join(names)}, those of {task} {', '.join(wanted) or 'scores'}")
    return replace(found, options=known.options)


def _rows(task: Task) -> Split:
    """Return the rows of a file, or the first validation split of a task by name."""
    return next(iter(task.validation.values()), task.train)


def _wrong(task: Task, split: Split, rows: Rows, made: Any) -> tables.Columns:
    """Return the columns of the file of rows that are most wrong."""
    found = learned.worst(task, split, rows, made)
    if found is None:
        raise UserError(f"--wrong: {task.objective} cannot tell how wrong a row is, leave it out")
    return found


def _answers(task: Task, split: Split, made: Any) -> dict[str, list[Any]]:
    """Return the columns of the file of answers."""
    answer = objectives.of(task).answer
    assert answer is not None
    if len(made) != len(split):
        raise UserError(f"--out: {len(made)} of the {len(split)} rows have an answer: leave it out")
    rows = [answer(task, row, found) for row, found in zip(split.texts, made, strict=True)]
    columns: dict[str, list[Any]] = {"row": split.rows, "text": [" | ".join(map(str, row)) for row in split.texts]}
    if task.labels is not None and isinstance(split.labels[0], int):
        columns["truth"] = [task.labels[label] for label in split.labels]
    return columns | {key: [row.get(key) for row in rows] for key in rows[0]}
