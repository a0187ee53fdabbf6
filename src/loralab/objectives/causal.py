"""Causal language models: chats, completions and texts; a row counts by its learned tokens.

Of each row only numbers are kept: the negative log-likelihood of its learned tokens, how many there are, and how many
of them have the largest logit. Logits of all tokens never exist at once (vocabulary.py).

A classification by name (sst2, cola, ...) becomes prompts with one-word completions; evaluation then compares the
likelihoods of the label words, so that its scores are those of a classification.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loralab.data import METRICS, Split, Task, chats, checks, own_files, tables
from loralab.data.batches import Rows, collate
from loralab.data.own_files import OwnFile, divided
from loralab.data.task import build
from loralab.errors import UserError
from loralab.inputs import IGNORED
from loralab.objectives import classification, templates, vocabulary
from loralab.objectives.objective import Array, Batch, Encoding, Objective

NAME = "causal"
LANGUAGE = ("loss", "perplexity", "token_accuracy")  # the first one selects
MOST = 709.0  # largest loss whose perplexity is a float


# ---- rows ------------------------------------------------------------------------------------------------------------


def read(file: OwnFile) -> Task:
    """Make the task of a file in one of the forms of data/chats.py, or with --label of a classification.

    Raises UserError that names the bad rows.
    """
    if file.label is not None and (*file.text, file.label) not in [form.columns for form in chats.FORMS]:
        return replace(of(own_files.load(file), file.options), label=file.label)
    there = set(tables.names(file.train))
    fits = [form for form in chats.FORMS if there >= {*form.columns}]
    if not fits:
        forms = "; ".join("+".join(form.columns) for form in chats.FORMS)
        raise UserError(f"{file.train}: columns {', '.join(sorted(there))} are none of {forms}")
    form = max(fits, key=lambda form: len(form.columns))
    rows = _rows(file.train, form)
    outside = None if file.validation is None else _rows(file.validation, form)
    notes = [f"rows are read as {'+'.join(form.columns)}"]
    if form.columns == ("text",) and (unread := sorted(there - {*form.columns})):
        which = ", ".join(map(checks.shown, unread))
        notes.append(f"{which} are not read: --text and --label make a classification of a column of labels")
    return divided(file, rows, outside, None, LANGUAGE, notes, NAME, form.columns)


def _rows(path: Any, form: chats.Form) -> Split:
    optional = [name for name in form.optional if name in tables.names(path)]
    columns = tables.read(path, (*form.columns, *optional))
    faults: checks.Faults = {}
    cells = list(zip(*columns.values(), strict=True))
    rows = checks.convert(cells, lambda row: form.row(*row), "", faults)
    checks.raise_faults(path, faults)
    return Split(rows, [None] * len(rows))


def of(task: Task, options: Mapping[str, Any]) -> Task:
    """Make prompts with one-word completions of a classification. Raises UserError for a regression."""
    if task.labels is None:
        raise UserError(
            f"{task.name} has scores, which are no words: choose a classification, or leave --objective out"
        )
    splits = {name: _prompts(rows) for name, rows in {"train": task.train, **task.validation}.items()}
    words = ", ".join(map(repr, task.labels))
    note = f"rows are prompts, and the labels {words} their completions; scores compare the likelihoods of these words"
    metrics = tuple(dict.fromkeys([*task.metrics, "accuracy"]))
    return build(
        task.name, task.labels, metrics, splits.pop("train"), splits, (*task.notes, note), NAME, options, task.columns
    )


def _prompts(rows: Split) -> Split:
    return Split([labelled(*texts) for texts in rows.texts], rows.labels)


def labelled(*texts: str) -> chats.Row:
    """Return the prompt of the texts of a classification's row."""
    return (" ".join(" ".join(texts).split()) + "\nLabel:",)


def ask(*cells: Any) -> tuple[chats.Row, Any]:
    """Return the prompt of a classification's row, and a label that stands for none."""
    return labelled(*checks.texts(*cells)), 0


def answer(task: Task, row: chats.Row, likelihoods: Array) -> dict[str, Any]:
    """Return the likeliest label, and the share of each; likelihoods (labels,)."""
    return classification.answer(task, row, likelihoods)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def encode(task: Task, split: Split, tokenizer: Any, how: Encoding) -> Rows:
    """Tokenize rows with the labels of the tokens that are learned; rows without any are dropped and counted.

    Rows of a classification have one sequence for each label where they are evaluated, else that of their label.
    """
    if task.labels is None:
        asked = [[row] for row in split.texts]
    else:
        words = [[task.labels[label]] if how.train else task.labels for label in split.labels]
        asked = [[(*row, f" {word}") for word in mine] for row, mine in zip(split.texts, words, strict=True)]

    def tokens(mine: list[chats.Row]) -> list[templates.Tokens]:
        return [templates.tokens(row, tokenizer, task.options) for row in mine]

    pieces = checks.each(task.name, split.rows, asked, tokens)
    cut = [[piece.cut(how.max_length, keep_end=task.labels is not None) for piece in row] for row in pieces]
    kept = [i for i, row in enumerate(cut) if all(piece.learned for piece in row)]
    if not kept:
        raise UserError(
            f"{task.name}: all {len(cut)} rows are cut at {how.max_length} tokens before anything to learn: "
            "raise --max-length"
        )
    lost = f"{len(cut) - len(kept)} of {len(cut)} rows have nothing to learn within {how.max_length} tokens: dropped"
    flat = [piece for i in kept for piece in cut[i]]
    columns = {
        "input_ids": [piece.ids for piece in flat],
        "attention_mask": [[1] * len(piece.ids) for piece in flat],
        "labels": [piece.labels for piece in flat],
    }
    uncut = [len(piece.ids) for row in pieces for piece in row]
    weights = torch.tensor([cut[i][0].learned for i in kept])  # (rows,)
    labels = weights.float() if task.labels is None else torch.tensor([split.labels[i] for i in kept])
    notes: tuple[str, ...] = (lost,) if len(kept) < len(cut) else ()
    if how.train and task.labels is None and chats.is_chat(split.texts[0]):
        notes += _unended(split, tokenizer, task.options)
    packed = how.train and how.pack
    return Rows(columns, labels, uncut, how.max_length, len(cut[kept[0]]), weights, notes, packed, tuple(kept))


def _unended(split: Split, tokenizer: Any, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the note on chats that do not teach where an answer ends, if that is so."""
    if templates.end_of(split.texts, tokenizer, options) is not None:
        return ()
    end = tokenizer.eos_token
    return (
        "no special token is learned where the assistant's turns end, so the model does not learn to stop and writes "
        f"on to --max-new-tokens: give a --template that has the end token {f'{end!r} ' * bool(end)}there, within "
        "{% generation %} where it has these marks",
    )


# ---- loss and metrics ------------------------------------------------------------------------------------------------


@torch.no_grad()
def prepare(model: Any) -> None:
    """Look at a plain model before adapters are attached. Raises UserError for one that reads what it is to predict."""
    vocabulary.prepare(model)
    ids = torch.tensor([[1, 1, 1], [1, 1, 2]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0].float()
    if (logits[0] - logits[1]).abs().max() > max(1e-5, _rounding(model)) * (logits.max() - logits.min()):
        raise UserError(
            f"{type(model).__name__}: what it says of a token depends on the tokens after it, so it is not causal: "
            "choose another, or for a BERT one whose config has is_decoder"
        )


def _rounding(model: nn.Module) -> float:
    """Return a share of a result by which rounding may change it: four steps of the coarsest numbers of a model."""
    return 4 * max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return (rows, 3): the negative log-likelihood of the learned tokens, their number, the right ones.

    A row is a sequence, or a part of one where the batch is packed.
    """
    nll, right, of_row = by_token(model, batch)
    rows = int(batch["rows"].max()) + 1 if "rows" in batch else len(batch["labels"])
    columns = torch.stack([nll, torch.ones_like(nll), right.to(nll.dtype)], 1)  # (learned tokens, 3)
    return nll.new_zeros(rows, 3).index_add(0, of_row, columns)


def by_token(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each learned token its negative log-likelihood, whether it is right, and its row; (learned tokens,)."""
    inputs = {key: t for key, t in batch.items() if key not in ("labels", "rows")}
    labels = batch["labels"][:, 1:]  # (sequences, t - 1): what each token but the last predicts
    sequences, places = (labels != IGNORED).nonzero().unbind(1)  # (learned tokens,)
    nll, right = vocabulary.likelihoods(model, inputs, (sequences, places), labels[sequences, places])
    of_row = batch["rows"][sequences, places + 1] if "rows" in batch else sequences  # (learned tokens,)
    return nll, right, of_row


@torch.no_grad()
def check_pack(name: str, model: nn.Module, rows: Rows, tokenizer: Any) -> None:
    """Raise UserError for a model, in evaluation mode, whose packed rows are not as they are alone.

    A mask tells rows apart, and some layers read more than it lets them: states, convolutions, and a window of their
    own that the mask replaces. The longest row and the two shortest are tried.
    """
    plain = replace(rows, packed=False, columns={**rows.columns, "labels": rows.columns["input_ids"]})
    order = np.argsort(-rows.lengths, kind="stable").tolist()
    chosen = [*order[:1], *order[1:][-2:]]
    tried = f"--pack: {name} was tried with rows of {', '.join(str(rows.lengths[i]) for i in chosen)} tokens in a pass"

    def losses(rows: Rows, chosen: list[int]) -> Tensor:
        nll, _, of_row = by_token(model, collate(rows, chosen, tokenizer, torch.device("cpu")))
        return nll[of_row.argsort(stable=True)]  # (tokens that are predicted,), row by row

    try:
        with torch.random.fork_rng(devices=[]):
            alone = torch.cat([losses(plain, [i]) for i in chosen])
            packed = losses(replace(plain, packed=True), chosen)
    except Exception as problem:  # of many types, where a model cannot take the mask
        first = str(problem).strip().partition("\n")[0]
        raise UserError(
            f"{tried}, which it cannot take ({type(problem).__name__}: {first}): leave --pack out"
        ) from problem
    near = max(1e-3, _rounding(model)) * (alone.max() - alone.min()) + 1e-5 * alone.max()
    worst = int((packed - alone).abs().argmax())
    if not (packed - alone).abs()[worst] <= near:  # also where one is nan
        raise UserError(
            f"{tried}, and a token has the loss {packed[worst]:.5g} packed but {alone[worst]:.5g} in its row alone: "
            "layers of the model read other rows, or more of a row than they did; leave --pack out"
        )


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,): the negative log-likelihood of all learned tokens of each row."""
    return outputs[..., 0]


def predict(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return (rows, 3) as it is; of rows with a sequence for each label the log-likelihoods (rows, labels)."""
    return outputs if outputs.ndim == 2 else -outputs[..., 0]


def score(task: Task, predictions: Array, labels: Array) -> dict[str, float]:
    """Return loss, perplexity and token accuracy; of a classification its metrics, by the likelihoods of the labels."""
    if task.labels is not None:
        return {name: METRICS[name](predictions, labels) for name in task.metrics}
    nll, tokens, right = predictions.astype(np.float64).sum(0)
    mean = float(nll / tokens)
    return {"loss": mean, "perplexity": math.exp(min(mean, MOST)), "token_accuracy": float(right / tokens)}


def parts(task: Task, predictions: Array, labels: Array) -> dict[str, dict[str, float]]:
    """Return the metrics of each class of a classification."""
    return {} if task.labels is None else classification.parts(task, predictions, labels)


def confusion(task: Task, predictions: Array, labels: Array) -> Array | None:
    """Return the counts of a classification."""
    return None if task.labels is None else classification.confusion(task, predictions, labels)


def sure(task: Task, predictions: Array, labels: Array) -> tuple[Array, Array] | None:
    """Return what calibration is computed from, of a classification."""
    return None if task.labels is None else classification.sure(task, predictions, labels)


def wrong(task: Task, predictions: Array, labels: Array) -> Array:
    """Return (rows,): the loss of a token, row by row; of a classification as there."""
    if task.labels is not None:
        return classification.wrong(task, predictions, labels)
    return np.asarray(predictions[:, 0] / np.maximum(predictions[:, 1], 1))


def told(task: Task, row: tuple[Any, ...], label: Any, prediction: Array) -> tuple[str, str]:
    """Return the label and the answer of a classification; of texts nothing, as the row has all."""
    return ("", "") if task.labels is None else classification.told(task, row, label, prediction)


def asked(row: chats.Row) -> tuple[chats.Row, str]:
    """Return the prompt of a row, and its last answer. Raises UserError for a text, which asks nothing."""
    if chats.is_chat(row):
        return row[:-1], row[-1][1]
    if len(row) == 1:
        raise UserError("--generate-metric: rows of plain text ask nothing, leave it out")
    return row[:1], row[1]


OBJECTIVE = Objective(
    name=NAME,
    task_type="CAUSAL_LM",
    wants=tuple(form.columns for form in chats.FORMS),
    read=read,
    encode=encode,
    forward=forward,
    loss=loss,
    score=score,
    outputs=lambda task: None,
    own_words=True,
    ask=ask,
    answer=answer,
    predict=predict,
    prepare=prepare,
    names=lambda task: (),
    of=of,
    takes=("template", "loss_on", "pack"),
    asked=asked,
    parts=parts,
    metrics=lambda task: () if task.labels is None else classification.metrics(task),
    confusion=confusion,
    sure=sure,
    wrong=wrong,
    told=told,
)
