"""Sequence to sequence: a source text and the target that an encoder-decoder writes of it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.data import Split, Task, checks, tables
from loralab.data.batches import Rows, tokenized
from loralab.data.own_files import OwnFile, divided
from loralab.inputs import IGNORED
from loralab.objectives import templates
from loralab.objectives.causal import LANGUAGE, loss, score, wrong
from loralab.objectives.objective import Batch, Encoding, Objective

NAME = "seq2seq"
COLUMNS = (("source", "target"), ("document", "summary"), ("article", "highlights"))


def read(file: OwnFile) -> Task:
    """Make the task of a file of sources and targets. Raises UserError."""
    there = {*tables.names(file.train)}
    given = (*file.text, file.label) if file.label else ()
    columns = next((names for names in (given, *COLUMNS) if len(names) == 2 and {*names} <= there), COLUMNS[0])
    outside = None if file.validation is None else _rows(file.validation, columns)
    notes = [f"rows are read as {columns[0]} and {columns[1]}"]
    return divided(file, _rows(file.train, columns), outside, None, LANGUAGE, notes, NAME, columns[:1])


def _rows(path: Path, columns: tuple[str, ...]) -> Split:
    cells = tables.read(path, columns)
    faults: checks.Faults = {}
    texts = [checks.convert(cells[name], checks.text, f"column {name!r}: ", faults) for name in columns]
    checks.raise_faults(path, faults)
    return Split(list(zip(*texts, strict=True)), [None] * len(texts[0]))


def encode(task: Task, split: Split, tokenizer: Any, how: Encoding) -> Rows:
    """Tokenize source and target; each is cut at the maximal length, and a row counts by its target's tokens.

    A target ends with the end token. Raises UserError where the tokenizer has none, and ends no text by itself.
    """
    columns, uncut = tokenized([row[:1] for row in split.texts], tokenizer, how.max_length)
    found = tokenizer(text_target=[row[1] for row in split.texts], **templates.PARTED)
    free, masks = found["input_ids"], found["special_tokens_mask"]
    if tokenizer.eos_token_id is not None or not all(added[-1:] == [1] for added in masks):  # BERT's end is its [SEP]
        free = [templates.with_end(ids, added, tokenizer) for ids, added in zip(free, masks, strict=True)]
    targets = [ids[: how.max_length] for ids in free]
    weights = torch.tensor([len(ids) for ids in targets])  # (rows,)
    notes = [f"{short} targets are longer than {how.max_length} tokens and were cut"] if (
        short := sum(len(ids) > how.max_length for ids in free)
    ) else []  # fmt: skip
    columns = {"input_ids": columns["input_ids"], "attention_mask": columns["attention_mask"], "labels": targets}
    return Rows(columns, weights.float(), uncut, how.max_length, weights=weights, notes=tuple(notes))


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return (rows, 3): the negative log-likelihood of the target, its tokens, and the right ones."""
    labels = batch["labels"]  # (rows, targets)
    logits = model(**batch, use_cache=False).logits.float()  # (rows, targets, vocabulary)
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(1)
    learned = labels != IGNORED
    hits = ((logits.detach().argmax(-1) == labels) & learned).sum(1)
    return torch.stack([nll, learned.sum(1).to(nll.dtype), hits.to(nll.dtype)], 1)


OBJECTIVE = Objective(
    name=NAME,
    task_type="SEQ_2_SEQ_LM",
    wants=COLUMNS,
    read=read,
    encode=encode,
    forward=forward,
    loss=loss,
    score=score,
    outputs=lambda task: None,
    own_words=True,
    names=lambda task: (),
    wrong=wrong,
    asked=lambda row: (row[:1], row[1]),
)
