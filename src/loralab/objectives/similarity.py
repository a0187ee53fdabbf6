"""Similarity: texts become embeddings whose cosine says how alike they are.

Pairs with a score learn it, scaled to 0..1 by the scores of train, as their cosine. Triplets (anchor, positive,
negative) learn that the anchor is nearer to the positive. Pairs without a score take the positives of the other rows of
the step as negatives, so a step cannot be divided. An embedding is the mean of the last hidden states, of length 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.data import Split, Task, checks, tables
from loralab.data.batches import Rows, tokenized
from loralab.data.metrics import is_flat, pearson, spearman
from loralab.data.own_files import OwnFile, divided
from loralab.data.task import build
from loralab.errors import UserError
from loralab.objectives.objective import Array, Batch, Encoding, Objective, Sums, mean_of, scored

NAME = "similarity"
AT_ONCE = 1024  # rows whose cosines with all others are held at a time
ROUNDING = 1e-5  # cosines that differ by less are equal: batches round the same text otherwise
TEMPERATURE = 0.05  # of cosines that are compared; that of sentence-transformers' MultipleNegativesRankingLoss
SCORED = (("sentence1", "sentence2", "score"), ("text1", "text2", "score"))
PLAIN = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("query", "positive", "negative"),
    ("query", "positive"),
)
CORRELATIONS = ("spearman", "pearson")
RANKS = ("mrr", "ndcg_at_10")


def read(file: OwnFile) -> Task:
    """Make the task of a file of pairs with scores, of triplets, or of pairs. Raises UserError."""
    there = {*tables.names(file.train)}
    given = (*file.text, file.label) if file.label else ()
    fits = [names for names in (given, *SCORED, *PLAIN) if names and {*names} <= there]
    if not fits:
        wanted = "; ".join("+".join(names) for names in (*SCORED, *PLAIN))
        raise UserError(f"{file.train}: columns {', '.join(there)} are none of {wanted}")
    columns, scored = fits[0], fits[0] == given or fits[0] in SCORED
    rows = _rows(file.train, columns, scored)
    outside = None if file.validation is None else _rows(file.validation, columns, scored)
    metrics = CORRELATIONS if scored else ("accuracy",) if len(columns) == 3 else RANKS
    return divided(file, rows, outside, None, metrics, [f"rows are read as {'+'.join(columns)}"], NAME, columns[:2])


def _rows(path: Path, columns: tuple[str, ...], scored: bool) -> Split:
    cells = tables.read(path, columns)
    faults: checks.Faults = {}
    texts = columns[:-1] if scored else columns
    found = [checks.convert(cells[name], checks.text, f"column {name!r}: ", faults) for name in texts]
    labels: list[Any] = [None] * len(cells[columns[0]])
    if scored:
        labels = checks.convert(cells[columns[-1]], checks.number, f"column {columns[-1]!r}: ", faults)
    checks.raise_faults(path, faults)
    if scored and len(set(labels)) == 1:
        raise UserError(f"{path}: all scores are {labels[0]}: expected at least two different ones")
    return Split(list(zip(*found, strict=True)), labels)


def of(task: Task, options: Mapping[str, Any]) -> Task:
    """Make the task of a regression over two texts. Raises UserError for another."""
    if task.labels is not None or len(task.train.texts[0]) != 2:
        raise UserError(f"{task.name} has no scores of pairs of texts: choose stsb, or leave --objective out")
    return build(task.name, None, CORRELATIONS, task.train, task.validation, task.notes, NAME, options, task.columns)


def encode(task: Task, split: Split, tokenizer: Any, how: Encoding) -> Rows:
    """Tokenize the texts of a row as sequences of their own. Rows.labels are scores in 0..1, or nan (rows,)."""
    sequences = len(split.texts[0])
    columns, uncut = tokenized([(text,) for row in split.texts for text in row], tokenizer, how.max_length)
    labels = torch.full((len(split),), float("nan"))
    if split.labels[0] is not None:
        low, high = min(task.train.labels), max(task.train.labels)
        labels = (torch.tensor(split.labels, dtype=torch.float32) - low) / (high - low)  # (rows,)
    return Rows(columns, labels, uncut, how.max_length, sequences)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return embeddings (sequences, d) of length 1."""
    hidden = model(**batch)[0].float()  # (sequences, t, d)
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)


def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,); embeddings (rows, 2 or 3, d), labels (rows,)."""
    anchor, positive = embeddings[:, 0], embeddings[:, 1]
    if not labels.isnan().any():
        return ((anchor * positive).sum(-1) - labels).square()
    if embeddings.shape[1] == 3:
        cosines = (anchor[:, None] * embeddings[:, 1:]).sum(-1)  # (rows, 2)
        return F.cross_entropy(cosines / TEMPERATURE, labels.new_zeros(len(labels)).long(), reduction="none")
    cosines = anchor @ positive.T  # (rows, rows)
    return F.cross_entropy(cosines / TEMPERATURE, torch.arange(len(labels), device=labels.device), reduction="none")


def predict(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Return the cosines of the anchor (rows, 1 or 2); of pairs without a score the embeddings (rows, 2, d)."""
    if embeddings.ndim == 2:  # one text a row
        return embeddings[:, None]
    if embeddings.shape[1] == 2 and labels.isnan().any():
        return embeddings
    return (embeddings[:, :1] * embeddings[:, 1:]).sum(-1)


def score(task: Task, predictions: Array, labels: Array) -> dict[str, float]:
    """Return correlations with the score; of triplets the share that is right; of pairs the rank of the positive."""
    if set(task.metrics) == set(CORRELATIONS):
        return {"spearman": spearman(predictions, labels), "pearson": pearson(predictions, labels)}
    return scored(sums, task.metrics, predictions, labels)


def sums(metric: str, predictions: Array, labels: Array, names: Sequence[str]) -> Sums | None:
    """Return a metric of triplets or pairs as sums over rows; the positive has its rank among those of all rows."""
    if metric == "accuracy":
        return mean_of(predictions[:, 0] > predictions[:, 1])
    if metric not in RANKS:
        return None
    ranks = 1 + _nearer(predictions)  # (rows,)
    return mean_of(1 / ranks if metric == "mrr" else np.where(ranks > 10, 0, 1 / np.log2(1 + ranks)))


def collapsed(predictions: Array, labels: Array) -> bool:
    """Tell whether all cosines are one value, or nearly one that does not follow the scores."""
    if predictions.ndim != 2:
        return False
    scored = predictions.shape[1] == 1 and not np.isnan(labels).any()
    return is_flat(predictions[:, 0], labels) if scored else bool(np.ptp(predictions) < 1e-6)


def wrong(task: Task, predictions: Array, labels: Array) -> Array:
    """Return (rows,): how far the cosine is from the score; of triplets by how much the negative is nearer.

    Of pairs: how many positives of other rows are nearer than the row's own.
    """
    if set(task.metrics) == set(CORRELATIONS):
        return np.asarray(np.abs(predictions[:, 0] - labels))
    if task.metrics == ("accuracy",):
        return np.asarray(np.maximum(predictions[:, 1] - predictions[:, 0], 0))
    return _nearer(predictions)


def _nearer(predictions: Array) -> Array:
    """Return (rows,): how many positives are nearer to a row's anchor than its own; the same text is as near."""
    anchors, positives = predictions[:, 0], predictions[:, 1]  # (rows, d)
    found = []
    for start in range(0, len(anchors), AT_ONCE):
        cosines = anchors[start : start + AT_ONCE] @ positives.T  # (some, rows)
        own = cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))]  # (some,)
        found.append((cosines > own[:, None] + ROUNDING).sum(1))
    return np.concatenate(found)


def told(task: Task, row: tuple[Any, ...], label: Any, prediction: Array) -> tuple[str, str]:
    """Return the score of a row, and its cosines."""
    cosines = "" if prediction.ndim > 1 else " ".join(f"{cosine:.4f}" for cosine in prediction)
    return "" if label is None else f"{label:g}", cosines


def ask(*cells: Any) -> tuple[tuple[Any, ...], Any]:
    """Return the texts of a row: two are compared, one gets its embedding."""
    return tuple(map(checks.text, cells)), None


def answer(task: Task, row: tuple[Any, ...], embeddings: Array) -> dict[str, Any]:
    """Return the cosine of two texts, or the embedding of one, from embeddings (1 or 2, d); of a row that was evaluated
    its cosines (1 or 2,), the second that of a negative."""
    if embeddings.ndim == 1:
        return dict(zip(("similarity", "similarity_of_negative"), map(float, embeddings), strict=False))
    if len(embeddings) == 1:
        return {"embedding": embeddings[0].tolist()}
    return {"similarity": float(embeddings[0] @ embeddings[1])}


OBJECTIVE = Objective(
    name=NAME,
    task_type="FEATURE_EXTRACTION",
    wants=(*SCORED, *PLAIN),
    read=read,
    encode=encode,
    forward=forward,
    loss=loss,
    score=score,
    outputs=lambda task: None,
    predict=predict,
    names=lambda task: (),
    collapsed=collapsed,
    of=of,
    ask=ask,
    gives=lambda cells: ("similarity",) if len(cells) == 2 else ("embedding",),
    alone=True,
    answer=answer,
    sums=sums,
    wrong=wrong,
    told=told,
    whole=lambda task: set(task.metrics) == set(RANKS),
)
