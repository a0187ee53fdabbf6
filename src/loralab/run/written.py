"""The metric of written answers, `--generate-metric`: at the end of a run, with the selected adapter, or on its own."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from loralab import data, objectives
from loralab.adapters import Adapters
from loralab.data import Split, Task, checks
from loralab.data.batches import Done, unwatched
from loralab.errors import UserError
from loralab.objectives import generation, templates
from loralab.objectives.generation import Decoding
from loralab.run.settings import GenerateMetric

AT_ONCE = 16  # rows of a batch: one token of each is a small product, so a batch of few rows takes as long
SPARE = 32  # tokens that an answer may have above the longest right one: what is longer yet is wrong anyway


class Question(NamedTuple):
    """A prompt as tokens, and the right answer."""

    ids: list[int]
    wanted: str
    ends: tuple[int, ...] = ()  # tokens that end its answer besides those of the model


def questions(
    task: Task,
    split: Split,
    metric: GenerateMetric | None,
    most: int,
    model: Any,
    tokenizer: Any,
    max_length: int,
) -> list[Question]:
    """Return what is asked for a metric: at most so many rows of a split, drawn by the data's hash.

    What an encoder-decoder reads is cut after `max_length` tokens, as where it learns. Raises UserError, before
    anything is trained, for a task whose rows have no answers to write, and for what would fail then: a metric whose
    package is absent, answers that are no JSON, a prompt that the model cannot take.
    """
    of_row = objectives.of(task).asked
    if metric is None:
        return []
    if of_row is None or task.labels is not None:
        raise UserError(f"--generate-metric {metric}: {task.name} has no answers to write, leave it out")
    if most < len(split):
        split = split.take(data.sample(split, task.sha256, False, most))

    def ids(prompt: tuple[Any, ...]) -> list[int]:
        if model.config.is_encoder_decoder:
            return generation.source_ids(prompt, tokenizer, max_length)
        return generation.prompt_ids(prompt, tokenizer, task.options.get("template"))

    def question(row: tuple[Any, ...]) -> Question:
        prompt, wanted = of_row(row)
        if metric == "json" and not _is_json(wanted):
            raise UserError(f"--generate-metric json: the answer {wanted[:40]!r} is no JSON: choose exact")
        return Question(ids(prompt), wanted)

    made = checks.each(task.name, split.rows, split.texts, question)
    end = templates.end_of(split.texts, tokenizer, task.options)
    made = [asked._replace(ends=() if end is None else (end,)) for asked in made]
    generation.METRICS[metric](made[0].wanted, made[0].wanted)
    decoding = _decoding(made, tokenizer)
    checks.each(task.name, split.rows, made, lambda asked: generation.check_length(asked.ids, model, decoding))
    return made


def scores(
    adapters: Adapters,
    name: str | None,
    asked: Sequence[Question],
    tokenizer: Any,
    metric: GenerateMetric | None,
    rank: int | None = None,
    done: Done = unwatched,
) -> dict[str, float]:
    """Return {metric: its mean over the questions}, answered with an adapter (at a rank), or by the base (None).

    `done` is called with the number of rows of every batch that is answered.
    """
    if metric is None:
        return {}
    texts = answers(adapters, name, asked, tokenizer, rank, done)
    worth = [generation.METRICS[metric](text, q.wanted) for text, q in zip(texts, asked, strict=True)]
    return {metric: sum(worth) / len(worth)}


def answers(
    adapters: Adapters,
    name: str | None,
    asked: Sequence[Question],
    tokenizer: Any,
    rank: int | None = None,
    done: Done = unwatched,
) -> list[str]:
    """Return the answer to each question, greedy, with an adapter (at a rank) or by the base (None)."""
    prompts, decoding = [question.ids for question in asked], _decoding(asked, tokenizer)
    adapters.model.eval()
    with adapters.use(name, rank=rank), adapters.caching():
        how = (decoding, AT_ONCE, decoding.random(), asked[0].ends, done)
        found = generation.in_batches(adapters.model, tokenizer, prompts, *how)
    return [text for (text,) in found]


def _decoding(asked: Sequence[Question], tokenizer: Any) -> Decoding:
    longest = max(len(tokenizer(question.wanted, verbose=False)["input_ids"]) for question in asked)
    return Decoding(max_new_tokens=longest + SPARE)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
