"""`loralab predict`: the rows of a file, each answered by the adapter it names."""

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.cli import base
from loralab.cli.show import Json, as_bytes, note
from loralab.data import chats, checks, tables
from loralab.data.reading import Reading, Separator, counted
from loralab.errors import UserError
from loralab.objectives import OBJECTIVES
from loralab.objectives.objective import WRITTEN
from loralab.run.bar import rows_bar
from loralab.schema import listed
from loralab.serve import AdapterFolder, Answer, Predictor, Request, adapter_folders
from loralab.serve.loading import Device, torch_device
from loralab.serve.pipeline import pipeline

Row = dict[str, Any] | UserError  # what a row is answered, by column

ERROR = "error"  # the column of what is wrong with a row
ROW = "row"  # the column of a row's number in the file, as in wrong.csv and the answers of evaluate
USUAL = (("text",), ("sentence",))  # columns of text to try where neither flag nor adapter names them


def predict(
    *,
    adapters: list[str],
    input: Path,
    adapter_column: str | None = None,
    text: list[str] | None = None,
    out: Path | None = None,
    model: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    rank: int | None = None,
    memory: str | None = None,
    keep_going: bool = False,
    prefix: str = "",
    separator: Separator = "auto",
    encoding: str = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Answer every row of a CSV, TSV, JSON or parquet file; rows of different adapters share batches.

    Writes the row's number, the same columns and those of the answers: label and probabilities (a regression's label is
    its number), or labels, tags and entities, answer, similarity or embedding, as the adapter was trained. A model that
    writes takes the likeliest tokens; `loralab generate` has more settings. Rows that cannot be answered are all named,
    and nothing is written.

    Parameters
    ----------
    adapters: list[str]
        Adapter folders of one base, or NAME=FOLDER.
    input: Path
        Rows to answer.
    adapter_column: str
        Column with each row's adapter: its name or its folder as given. One adapter needs none.
    text: list[str]
        Columns of text, one or two; by default those the adapter was trained on, else text or sentence.
    out: Path
        File to write, of any of these kinds; must not exist. By default the answers are printed.
    model: str
        The base: a local folder, a hub name, or an alias; by default the one the adapters name.
    batch_size: int
        Rows of a batch.
    max_length: int
        Tokens after which a row is cut, at most as many as the base takes; by default as in training.
    max_new_tokens: int
        Most tokens of an answer that is written; 256 by default.
    rank: int
        Rank to evaluate at, for adapters trained for many.
    memory: str
        Most that loaded adapters may take, as in 2GB; the least recently used is dropped first.
    keep_going: bool
        Answer what can be answered; the other rows carry an error.
    prefix: str
        What the new columns' names begin with.
    separator: Separator
        What divides the cells of a CSV or TSV; by default found by looking, as in training.
    encoding: str
        Encoding of the input; by default UTF-8, else that of the file the adapter learned from.
    device: Device
        Where it runs: a GPU if there is one, cpu or cuda.
    """
    base.check_counts(batch_size=batch_size, max_length=max_length, max_new_tokens=max_new_tokens, rank=rank)
    torch_device(device)
    base.check_out(out)
    budget, folders = as_bytes(memory), adapter_folders(adapters)
    kinds = {folder.objective for folder in folders.values()}
    writes = any(folder.writes for folder in folders.values())
    base.check_idle({"max_new_tokens": not writes and max_new_tokens is not None}, "with adapters that write no texts")
    base.check_idle({"memory": kinds != {"classification"} and memory is not None}, "where not all are classifiers")
    likely = next((folder.written for folder in folders.values() if folder.written), {})
    reading = Reading(separator, encoding, likely=likely)
    columns, broken = tables.read_to_answer(input, reading, keep_going)
    requests = _requests(input, columns, folders, adapter_column, text or [])
    check_new(input, columns, [prefix + name for name in _given(requests, folders)], prefix, keep_going)
    before = time.perf_counter()
    if kinds == {"classification"}:
        predictor = Predictor.open(folders, model, budget, batch_size, rank, max_length, device)
        answers = [_as_columns(answer) for answer in _watched(predictor.answer, requests)]
    else:
        how = {"model": model, "batch_size": batch_size, "rank": rank, "max_length": max_length, "device": device}
        decoding = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        answers = _each_alone(requests, folders, **how, **decoding)
    answers = [UserError(broken[i]) if i in broken else answer for i, answer in enumerate(answers)]
    refuse(input, answers, keep_going, unknown(folders, [r.adapter for i, r in enumerate(requests) if i not in broken]))
    added = _columns(answers, prefix, keep_going)
    for line in reading.notes():
        note(line)
    _deliver({**_numbered(columns, len(requests), prefix), **added}, input, out, json)
    used = len({folders[request.adapter].folder for request in requests if request.adapter in folders})
    took = time.perf_counter() - before
    done = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((len(requests), "row"), (used, "adapter")))
    print(f"{', '.join(done)}, {took:.1f} s", file=sys.stderr)


def _requests(
    path: Path,
    columns: tables.Columns,
    folders: Mapping[str, AdapterFolder],
    adapter_column: str | None,
    text: list[str],
) -> list[Request]:
    """Return adapter and texts of every row; a row whose adapter is unknown has no texts and is refused later."""
    tables.require(path, list(columns), [*([adapter_column] if adapter_column else []), *text])
    if len(text) > 2:
        raise UserError(f"--text {' '.join(text)}: expected one column or two")
    different = {adapter.folder for adapter in folders.values()}
    if adapter_column is None and len(different) > 1:
        raise UserError(f"{len(different)} adapters: name the column that holds each row's with --adapter-column")
    if adapter_column is None:
        asked = [next(iter(folders))] * len(next(iter(columns.values())))
    else:
        asked = ["" if cell is None else checks.literal(cell) for cell in columns[adapter_column]]
    named = [name for name in dict.fromkeys(asked) if name in folders]
    of_adapter = {name: _text(path, list(columns), folders[name], text) for name in named}
    return [Request(name, tuple(columns[key][i] for key in of_adapter.get(name, text))) for i, name in enumerate(asked)]


def _given(requests: Sequence[Request], folders: Mapping[str, AdapterFolder]) -> list[str]:
    """Return the columns that the answers may have."""
    named = {request.adapter: request.texts for request in requests if request.adapter in folders}
    gives = (
        (WRITTEN,) if folders[name].writes else OBJECTIVES[folders[name].objective].gives(cells)
        for name, cells in named.items()
    )  # fmt: skip
    return list(dict.fromkeys(name for names in gives for name in names))


def check_new(path: Path, there: Collection[str], names: Sequence[str], prefix: str, keep_going: bool) -> None:
    """Raise UserError for new columns, of `names` and of errors, that are in the file already."""
    if doubled := [name for name in (*names, *[f"{prefix}{ERROR}"] * keep_going) if name in there]:
        raise UserError(f"{path}: column {', '.join(doubled)} is there already; --prefix renames the new ones")


def unknown(adapters: Collection[str], asked: Sequence[str]) -> str:
    """Say which adapters there are, where rows ask for others."""
    return "" if {*asked} <= {*adapters} else f"adapters that there are: {listed(adapters)}; "


def _text(path: Path, columns: list[str], adapter: AdapterFolder, given: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that an adapter reads: those given, or that it learned from, or usual ones, which is told."""
    form = chats.asks(adapter.text)
    own = form.columns if adapter.writes and adapter.text else adapter.text
    for names in [tuple(given)] if given else (own, *USUAL):
        if names and set(names) <= set(columns):
            if not adapter.writes and (lack := OBJECTIVES[adapter.objective].lacking(names, adapter.text)):
                raise UserError(f"{path}: {', '.join(names)} as text for {adapter.name}: {lack}; name them with --text")
            if own and names != own and not given:
                note(f"{path} has no {', '.join(own)}, from which {adapter.name} learned: {', '.join(names)} is read")
            return (*names, *(name for name in form.optional if adapter.writes and name in columns and not given))
    trained = f" (it was trained on {', '.join(adapter.text)})" if adapter.text else ""
    raise UserError(
        f"{path}: which column is text for {adapter.name}{trained}? name it with --text: {', '.join(columns)}"
    )


def _each_alone(requests: Sequence[Request], folders: Mapping[str, AdapterFolder], **how: Any) -> list[Row]:
    """Answer the rows of one adapter after the other, each on its own model class."""
    found: list[Row] = [UserError(f"no adapter {request.adapter!r}") for request in requests]
    for name in dict.fromkeys(request.adapter for request in requests if request.adapter in folders):
        mine = [i for i, request in enumerate(requests) if request.adapter == name]
        ask = pipeline(folders[name].folder, **how).answers
        answers = _watched(ask, [requests[i].texts for i in mine])
        for i, answer in zip(mine, answers, strict=True):
            found[i] = answer
    return found


def _watched(answer: Callable[..., list[Any]], asked: Sequence[Any]) -> list[Any]:
    """Answer rows, and show on stderr how many are done."""
    with rows_bar("rows", len(asked)) as done:
        return answer(asked, done=done)


def refuse(path: Path, answers: Sequence[Row], keep_going: bool, help: str = "") -> None:
    """Name every row that has no answer; `help` goes before what to do."""
    faults: checks.Faults = {}
    for row, answer in enumerate(answers, 1):
        if isinstance(answer, UserError):
            faults.setdefault(str(answer), []).append(row)
    if not faults:
        return
    told = checks.few([f"{counted(rows)}: {what}" for what, rows in faults.items()])
    if not keep_going:
        raise UserError(f"{path}: {told}; {help}mend or remove these rows, or answer the others with --keep-going")
    note(f"no answer for {told}" + (f"; {help.removesuffix('; ')}" if help else ""))


def _numbered(columns: tables.Columns, rows: int, prefix: str) -> tables.Columns:
    """Return the columns of a file after one with the number of each row, unless the file has such a column."""
    name = f"{prefix}{ROW}"
    return dict(columns) if name in columns else {name: [*range(1, rows + 1)], **columns}


def _as_columns(answer: Answer | UserError) -> Row:
    return answer if isinstance(answer, UserError) else answer._asdict()


def _columns(answers: Sequence[Row], prefix: str, keep_going: bool) -> dict[str, list[Any]]:
    """Return the new columns: those that any answer has, and with --keep-going the errors."""
    good = [{} if isinstance(answer, UserError) else answer for answer in answers]
    names = list(dict.fromkeys(name for answer in good for name in answer))
    added = {prefix + name: [answer.get(name) for answer in good] for name in names}
    if keep_going:
        added[f"{prefix}{ERROR}"] = [str(answer) if isinstance(answer, UserError) else None for answer in answers]
    return added


def _deliver(columns: tables.Columns, path: Path, out: Path | None, json: bool) -> None:
    if out is not None:
        tables.write(columns, out)
    if out is None or json:
        suffix = ".json" if json else path.suffix.lower()
        print(tables.render(columns, suffix if suffix in tables.WRITERS else ".jsonl"), end="")
