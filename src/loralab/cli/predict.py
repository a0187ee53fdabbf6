"""`loralab predict`: the rows of a file, each answered by the adapter it names."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab import models
from loralab.cli.show import Json, as_bytes
from loralab.data import checks, tables
from loralab.errors import UserError
from loralab.report.numbers import spans
from loralab.serve import AdapterFolder, Answer, Pool, Predictor, Request, adapter_folders

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
    rank: int | None = None,
    memory: str | None = None,
    keep_going: bool = False,
    prefix: str = "",
    json: Json = False,
) -> None:
    """Answer every row of a CSV, TSV, JSON or parquet file; rows of different adapters share batches.

    Writes the same columns and label and probabilities; a regression's label is its number. Rows that cannot be
    answered are all named, and nothing is written.

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
        Tokens after which a row is cut; by default as many as the base takes.
    rank: int
        Rank to evaluate at, for adapters trained for many.
    memory: str
        Most that loaded adapters may take, as in 2GB; the least recently used is dropped first.
    keep_going: bool
        Answer what can be answered; the other rows carry an error.
    prefix: str
        What the new columns' names begin with.
    """
    _check(batch_size, max_length, rank, out)
    budget, folders = as_bytes(memory), adapter_folders(adapters)
    columns = tables.read_all(input)
    added = [prefix + name for name in ("label", "probabilities", *(["error"] if keep_going else []))]
    if doubled := [name for name in added if name in columns]:
        raise UserError(f"{input}: column {', '.join(doubled)} is there already; --prefix renames the new ones")
    requests = _requests(input, columns, folders, adapter_column, text or [])
    predictor = _predictor(model, folders, budget, (batch_size, rank, max_length))
    before = time.perf_counter()
    answers = predictor.answer(requests)
    _refuse(input, answers, keep_going)
    _deliver({**columns, **dict(zip(added, _columns(answers), strict=False))}, input, out, json)
    used, took = len({request.adapter for request in requests}), time.perf_counter() - before
    print(f"{len(requests)} rows, {used} adapter{'s' * (used != 1)}, {took:.1f} s", file=sys.stderr)


def _check(batch_size: int, max_length: int | None, rank: int | None, out: Path | None) -> None:
    for flag, value in (("--batch-size", batch_size), ("--max-length", max_length), ("--rank", rank)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: expected 1 or more")
    if out is not None and out.exists():
        raise UserError(f"--out {out} exists: choose a new file")
    if out is not None and out.suffix.lower() not in tables.READERS:
        raise UserError(f"--out {out}: a name ending in {', '.join(tables.READERS)} was expected")


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
    of_adapter = {name: tuple(text) or _text(path, list(columns), folders[name]) for name in set(asked) & set(folders)}
    return [Request(name, tuple(columns[key][i] for key in of_adapter.get(name, text))) for i, name in enumerate(asked)]


def _text(path: Path, columns: list[str], adapter: AdapterFolder) -> tuple[str, ...]:
    for names in (adapter.text, *USUAL):
        if names and set(names) <= set(columns):
            return names
    trained = f" (it was trained on {', '.join(adapter.text)})" if adapter.text else ""
    raise UserError(
        f"{path}: which column is text for {adapter.name}{trained}? name it with --text: {', '.join(columns)}"
    )


def _predictor(
    model: str | None,
    folders: Mapping[str, AdapterFolder],
    budget: int | None,
    rest: tuple[int, int | None, int | None],
) -> Predictor:
    bases = sorted({adapter.base for adapter in folders.values() if adapter.base})
    if model is None and len(bases) != 1:
        raise UserError(f"the adapters name {', '.join(bases) or 'no base'}: say which base with --model")
    name = model or bases[0]
    first, tokenizer = models.classifier(name, 2, False, torch.float32, seed=0)
    spare: list[nn.Module] = [first]

    def new_base() -> nn.Module:
        return spare.pop() if spare else models.classifier(name, 2, False, torch.float32, seed=0)[0]

    return Predictor(Pool(new_base, budget), tokenizer, folders, *rest)


def _refuse(path: Path, answers: Sequence[Answer | UserError], keep_going: bool) -> None:
    """Name every row that has no answer."""
    faults: checks.Faults = {}
    for row, answer in enumerate(answers, 1):
        if isinstance(answer, UserError):
            faults.setdefault(str(answer), []).append(row)
    if not faults:
        return
    listed = "; ".join(f"row{'s' * (len(rows) > 1)} {spans(rows, '-')}: {what}" for what, rows in faults.items())
    if not keep_going:
        raise UserError(f"{path}: {listed}; mend or remove these rows, or answer the others with --keep-going")
    print(f"note: no answer for {listed}", file=sys.stderr)


def _columns(answers: Sequence[Answer | UserError]) -> tuple[list[Any], list[Any], list[str | None]]:
    """Return the columns of labels, probabilities and errors."""
    good = [None if isinstance(answer, UserError) else answer for answer in answers]
    errors = [str(answer) if isinstance(answer, UserError) else None for answer in answers]
    return [a and a.label for a in good], [a and a.probabilities for a in good], errors


def _deliver(columns: tables.Columns, path: Path, out: Path | None, json: bool) -> None:
    if out is not None:
        tables.write(columns, out)
    if out is None or json:
        suffix = ".json" if json else path.suffix.lower()
        print(tables.render(columns, suffix if suffix in tables.WRITERS else ".jsonl"), end="")
