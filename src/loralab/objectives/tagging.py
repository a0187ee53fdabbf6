"""Tagging: a tag for every word, as in named entities (BIO tags) and parts of speech."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from loralab.data import Split, Task, checks, tables
from loralab.data.batches import Rows, cutting_at_end
from loralab.data.labels import look_alikes
from loralab.data.own_files import OwnFile, divided
from loralab.errors import UserError
from loralab.inputs import IGNORED
from loralab.objectives.objective import Array, Encoding, Objective, Sums, f1_of, head_outputs, mean_f1, scored, share

NAME = "tagging"
COLUMNS = (("tokens", "tags"), ("tokens", "ner_tags"), ("words", "tags"), ("text", "entities"))
WORD = re.compile(r"\w+|[^\w\s]")
SPAN = re.compile(r"O|[BIESLU](-.+)?")  # tags that mark spans
METRICS = ("span_f1", "accuracy", "f1_macro")  # of tags that mark spans the first two, of others the last two
PLAIN = "_"  # type of spans whose tags name none, as seqeval calls it
Span = tuple[str, int, int]  # type, first word, last word


# ---- rows ------------------------------------------------------------------------------------------------------------


def read(file: OwnFile) -> Task:
    """Make the task of a file with words and tags, of a CoNLL file, or of texts with `entities` (start, end, label)."""
    there = {*tables.names(file.train)}
    given = (*file.text, file.label) if file.label else ()
    words, tags = next((names for names in (given, *COLUMNS) if len(names) == 2 and {*names} <= there), COLUMNS[0])
    rows, found = _rows(file, file.train, words, tags)
    names = file.names or tuple(sorted(set().union(*found), key=lambda tag: (tag != "O", tag)))
    if len(names) < 2:
        raise UserError(f"{file.train}: all tags are {names[0]!r}: expected at least two different ones")
    outside = None
    if file.validation is not None:
        others, unseen = _rows(file, file.validation, words, tags)
        outside = Split(others, _ids(file.validation, names, unseen))
    metrics = _metrics(names)
    notes = [f"{len(names)} tags: {', '.join(names[:10])}{', ...' * (len(names) > 10)}"]
    kinds = dict.fromkeys(tag.partition("-")[2] if marked else tag for tag in names for marked in [SPAN.fullmatch(tag)])
    notes += look_alikes([kind for kind in kinds if kind])
    if not spans_are_marked(names):
        numbers = " with --label-map where these are their numbers" * all(map(str.isdecimal, names))
        notes.append(
            f"tags mark no spans, so the accuracy of words selects; F1 of spans needs O, B-TYPE, I-TYPE{numbers}"
        )
    return divided(file, Split(rows, _ids(file.train, names, found)), outside, names, metrics, notes, NAME, (words,))


def _rows(file: OwnFile, path: Path, words: str, tags: str) -> tuple[list[tuple[str, ...]], list[list[str]]]:
    """Return the words and the tags of each row, the tags as they count."""
    columns = tables.read(path, (words, tags))
    faults: checks.Faults = {}
    change = _of_entities if tags == "entities" else _of_lists
    cells = zip(columns[words], columns[tags], strict=True)
    rows = checks.convert(cells, lambda row: change(*row), "", faults)
    checks.raise_faults(path, faults)
    own = [row[1] for row in rows]
    file.check_map(path, {name for row in own for tag in row for name in (tag, tag.partition("-")[2])} - {""})
    return [row[0] for row in rows], [[merged(file, tag) for tag in row] for row in own]


def merged(file: OwnFile, tag: str) -> str:
    """Return a tag as it counts: a label map names whole tags (B-PERS), or types of spans (PERS)."""
    whole = str(file.merged(tag))
    mark, dash, kind = whole.partition("-")
    if whole != tag or not dash or SPAN.fullmatch(whole) is None:
        return whole
    counts_as = str(file.merged(kind))
    return "O" if counts_as == "O" else f"{mark}-{counts_as}"


def _of_lists(words: Any, tags: Any) -> tuple[tuple[str, ...], list[str]]:
    for name, value in (("words", words), ("tags", tags)):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{checks.kind(value)} instead of a list of {name}, or an empty one")
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words but {len(tags)} tags")
    return tuple(map(checks.text, words)), [checks.text(checks.literal(tag)) for tag in tags]


def _of_entities(text: Any, entities: Any) -> tuple[tuple[str, ...], list[str]]:
    """Return words and BIO tags of a text whose entities are given by their first and last character."""
    places = [match.span() for match in WORD.finditer(checks.text(text))]
    tags = ["O"] * len(places)
    if not isinstance(entities, list):
        raise ValueError(f"{checks.kind(entities)} instead of a list of entities")
    for entity in entities:
        try:
            start, end, label = int(entity["start"]), int(entity["end"]), str(entity["label"])
        except (TypeError, KeyError, ValueError):
            raise ValueError("an entity without start, end and label") from None
        inside = [i for i, (a, b) in enumerate(places) if a < end and start < b]
        if not inside or places[inside[0]][0] != start or places[inside[-1]][1] != end:
            raise ValueError(f"an entity at {start} to {end} that does not begin and end with words")
        if any(tags[i] != "O" for i in inside):
            raise ValueError(f"entities that overlap at {start}")
        tags[inside[0] : inside[-1] + 1] = [f"B-{label}", *[f"I-{label}"] * (len(inside) - 1)]
    return tuple(text[a:b] for a, b in places), tags


def _ids(path: Path, names: Sequence[str], found: Sequence[list[str]]) -> list[list[int]]:
    places = {name: place for place, name in enumerate(names)}
    faults: checks.Faults = {}

    def row(tags: list[str]) -> list[int]:
        if new := [tag for tag in tags if tag not in places]:
            raise ValueError(f"new tag {checks.shown(new[0])}, which train lacks,")
        return [places[tag] for tag in tags]

    ids = checks.convert(found, row, "", faults)
    checks.raise_faults(path, faults)
    return ids


# ---- tokens ----------------------------------------------------------------------------------------------------------


def encode(task: Task, split: Split, tokenizer: Any, how: Encoding) -> Rows:
    """Tokenize words; the first token of each has its tag, the others none. Rows.labels are (rows, tokens).

    A word of which the tokenizer makes nothing, as of a zero-width space, is read as its unknown token.
    """
    rows, read = [list(words) for words in split.texts], {"return_offsets_mapping": True, "verbose": False}
    found = tokenizer([" ".join(words) for words in rows], **read)
    for words, places in zip(rows, found["offset_mapping"], strict=True):
        there = _first_tokens(words, places)
        words[:] = [word if i in there else tokenizer.unk_token or "." for i, word in enumerate(words)]
    texts = [" ".join(words) for words in rows]
    free = tokenizer(texts, verbose=False)["input_ids"]
    made = cutting_at_end(tokenizer)(texts, truncation=True, max_length=how.max_length, **read)
    labels = []
    for words, tags, places in zip(rows, split.labels, made.pop("offset_mapping"), strict=True):
        row = [IGNORED] * len(places)
        for word, token in _first_tokens(words, places).items():
            row[token] = tags[word]
        labels.append(row)
    widest = max(map(len, labels))
    padded = torch.tensor([row + [IGNORED] * (widest - len(row)) for row in labels])  # (rows, tokens)
    columns = {**made, "labels": labels}
    return Rows(columns, padded, [len(ids) for ids in free], how.max_length, weights=(padded != IGNORED).sum(1))


def _first_tokens(words: Sequence[str], places: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return word -> its first token, given where in the text of the words each token begins and ends."""
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    first: dict[int, int] = {}
    for token, (begin, end) in enumerate(places):
        if end > begin:
            first.setdefault(bisect_right(starts, end - 1) - 1, token)
    return first


# ---- loss and metrics ------------------------------------------------------------------------------------------------


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows,): the sum of the cross-entropies of its words; logits (rows, t, tags), labels (rows, t)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(1)


def predict(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (rows, t): the tag of each word, IGNORED where there is none."""
    return torch.where(labels == IGNORED, labels, logits.argmax(-1))


def _metrics(names: Sequence[str]) -> tuple[str, ...]:
    return METRICS[:2] if spans_are_marked(names) else METRICS[1:]


def spans_are_marked(names: Sequence[str]) -> bool:
    """Tell whether tags mark spans, as B-PER and I-PER do."""
    typed = any("-" in name or name in ("B", "I") for name in names)  # S and O alone may be anything
    return all(map(SPAN.fullmatch, names)) and typed and len(names) > 1


def spans(tags: Sequence[str]) -> Iterator[Span]:
    """Yield the spans of a row of BIO, BIOES or BILOU tags, as conlleval and seqeval find them in the first two."""
    start, kind = 0, ""  # of the open span
    before = "O"
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        name = name or PLAIN
        begins = mark in ("B", "S", "U") or (mark != "O" and (before[0] in "OESLU" or name != kind))
        if kind and (mark == "O" or begins):
            yield kind, start, place - 1
            kind = ""
        if begins:
            start, kind = place, name
        before = tag


def score(task: Task, predictions: Array, labels: Array) -> dict[str, float]:
    """Return the metrics of tags (rows, t): F1 of whole spans, or of tags where they mark none; and accuracy."""
    names = task.labels or ()
    metrics = _metrics(names)
    return scored(sums, metrics, predictions, labels, names)


def sums(metric: str, predictions: Array, labels: Array, names: Sequence[str]) -> Sums | None:
    """Return a metric as sums over rows: words or spans that are right, and those found and there."""
    if metric not in METRICS:
        return None
    words, own = labels != IGNORED, _beside(labels, predictions)
    if metric == "accuracy":
        return Sums(np.stack([((own == labels) & words).sum(1), words.sum(1)], axis=1).astype(np.float64), share)
    if metric == "span_f1":
        pairs = [(set(spans(mine)), set(spans(true))) for mine, true in tags_of(names, predictions, labels)]
        return Sums(np.array([(len(a & b), len(a) + len(b)) for a, b in pairs], dtype=np.float64), f1_of)
    used = np.union1d(own[words], labels[words])  # tags that are there, or found
    found, there = ((x[..., None] == used) & words[..., None] for x in (own, labels))  # (rows, t, tags)
    counts = [(found & there).sum(1), found.sum(1) + there.sum(1)]  # (rows, tags) each
    return Sums(np.concatenate(counts, axis=1).astype(np.float64), mean_f1)


def _beside(labels: Array, predictions: Array) -> Array:
    """Return the predictions (rows, t) of the tokens that labels (rows, t) are of. Raises ValueError for others."""
    own = predictions[:, : labels.shape[1]]
    if ((own == IGNORED) & (labels != IGNORED)).any():
        raise ValueError("predictions of other tokens than the labels: a word has a label and no prediction")
    return own


def tags_of(names: Sequence[str], predictions: Array, labels: Array) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the tags that the words of each row are given, and the right ones."""
    for found, truth in zip(_beside(labels, predictions), labels, strict=True):
        places = np.flatnonzero(truth != IGNORED)
        yield [names[int(tag)] for tag in found[places]], [names[int(tag)] for tag in truth[places]]


def by_type(task: Task, predictions: Array, labels: Array) -> dict[str, tuple[int, int, int]]:
    """Return for each type of span, or each tag, how many are right, how many are found, and how many there are."""
    assert task.labels is not None
    marked = spans_are_marked(task.labels)
    counts: dict[str, list[int]] = {}
    for rows in tags_of(task.labels, predictions, labels):
        if marked:
            mine, wanted = (set(spans(row)) for row in rows)
        else:
            mine, wanted = ({(tag, i, i) for i, tag in enumerate(row)} for row in rows)
        for column, group in enumerate((mine & wanted, mine, wanted)):
            for kind, *_ in group:
                counts.setdefault(kind, [0, 0, 0])[column] += 1
    return {kind: (a, b, c) for kind, (a, b, c) in sorted(counts.items())}


def _f1(right: int, found: int, there: int) -> float:
    return 2 * right / (found + there) if found + there else 0.0


def parts(task: Task, predictions: Array, labels: Array) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and number of each type of span, or of each tag."""
    return {
        kind: {"precision": right / max(found, 1), "recall": right / max(there, 1), "f1": _f1(right, found, there),
               "spans": float(there)}
        for kind, (right, found, there) in by_type(task, predictions, labels).items()
    }  # fmt: skip


def confusion(task: Task, predictions: Array, labels: Array) -> Array:
    """Return counts (tag, prediction) over words."""
    assert task.labels is not None
    n, words = len(task.labels), labels != IGNORED
    pairs = labels[words].astype(int) * n + _beside(labels, predictions)[words].astype(int)
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def wrong(task: Task, predictions: Array, labels: Array) -> Array:
    """Return (rows,): how many words have a wrong tag."""
    return np.asarray(((_beside(labels, predictions) != labels) & (labels != IGNORED)).sum(1))


def told(task: Task, row: tuple[Any, ...], label: Any, tags: Array) -> tuple[str, str]:
    """Return the tags of a row, and those that it is given."""
    names = task.labels or ()
    given = [names[int(tag)] for tag in tags if tag != IGNORED]
    return " ".join(names[int(tag)] for tag in label), " ".join(given)


def ask(cell: Any) -> tuple[tuple[Any, ...], Any]:
    """Return the words of a row, from a list or a text, and a tag for each that stands for none."""
    words = tuple(map(checks.text, cell)) if isinstance(cell, list) else tuple(WORD.findall(checks.text(cell)))
    if not words:
        raise ValueError("no words")
    return words, [0] * len(words)


def answer(task: Task, row: tuple[Any, ...], tags: Array) -> dict[str, Any]:
    """Return the tag of each word, and the spans that they mark; tags (tokens,). A word that was cut off has no tag."""
    names = task.labels or ()
    found: list[str | None] = [names[int(tag)] for tag in tags if tag != IGNORED]
    known = [tag for tag in found if tag is not None]
    entities = [
        {"label": kind, "text": " ".join(row[first : last + 1]), "words": [first, last]}
        for kind, first, last in (spans(known) if spans_are_marked(names) else ())
    ]
    return {"tags": found + [None] * (len(row) - len(found)), "entities": entities}


def collapsed(predictions: Array, labels: Array) -> bool:
    """Tell whether every word of every row has the same tag."""
    tags = predictions[predictions != IGNORED]
    return bool((tags == tags[0]).all())


OBJECTIVE = Objective(
    name=NAME,
    task_type="TOKEN_CLS",
    wants=COLUMNS,
    read=read,
    encode=encode,
    forward=head_outputs,
    loss=loss,
    score=score,
    predict=predict,
    collapsed=collapsed,
    ask=ask,
    gives=lambda cells: ("tags", "entities"),
    answer=answer,
    parts=parts,
    sums=sums,
    confusion=confusion,
    wrong=wrong,
    told=told,
    takes=("label_map",),
)
