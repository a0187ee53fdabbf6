"""Rows of a language model as tokens, and which of them are learned.

A prompt and its completion are tokenized as they are, and the end token is learned after them. A chat goes through the
template of the tokenizer, or one that the user gives. Which of its tokens are the assistant's is read from the
template's own marks, or else from the template itself: the text of all messages up to a turn must be the beginning of
the text of the whole chat.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.data import chats
from loralab.errors import UserError
from loralab.inputs import IGNORED

PARTED = {"return_special_tokens_mask": True, "verbose": False}  # tell the tokens of a text from added ones
MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # by which a template marks what the assistant says
CHARACTERS = 100_000  # most of a template file


@dataclass(frozen=True)
class Tokens:
    """A row as tokens, and the labels of those that are learned."""

    ids: list[int]
    labels: list[int]  # IGNORED where a token is not learned

    @property
    def learned(self) -> int:
        """How many tokens are learned; the first of a row never is, nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, most: int, keep_end: bool = False) -> "Tokens":
        """Return the first `most` tokens, or the last ones where the end is what counts."""
        part = slice(-most, None) if keep_end else slice(most)
        return Tokens(self.ids[part], self.labels[part])


def tokens(row: chats.Row, tokenizer: Any, options: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a row. Raises UserError for a chat that the template cannot show or mask."""
    loss_on = options.get("loss_on", "auto")
    if chats.is_chat(row):
        return _chat(row, tokenizer, options.get("template"), loss_on)
    if loss_on == "assistant" or (loss_on == "completion" and len(row) == 1):
        raise UserError(f"--loss-on {loss_on}: these rows have no {loss_on}, leave the flag out or choose all")
    return _completion("" if len(row) == 1 else row[0], row[-1], tokenizer, learn_all=loss_on == "all")


def end_of(rows: Sequence[chats.Row], tokenizer: Any, options: Mapping[str, Any]) -> int | None:
    """Return the special token that ends an answer, as the chats among the rows teach it; None where they teach none.

    That is the first one after the last words that are learned of a chat: a template may write more behind it.
    """
    chat = next(filter(chats.is_chat, rows), None)
    if chat is None:
        return None
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    end = None
    for label in reversed([label for label in tokens(chat, tokenizer, options).labels if label != IGNORED]):
        if label in special:
            end = label
        elif tokenizer.decode([label]).strip():
            break
    return end


def _completion(prompt: str, answer: str, tokenizer: Any, learn_all: bool) -> Tokens:
    """Tokenize prompt and answer together, so that the text reads as a model would meet it; the end token is added."""
    found = tokenizer(prompt + answer, **PARTED)
    ids = with_end(found["input_ids"], found["special_tokens_mask"], tokenizer)
    before = 0 if learn_all or not prompt else len(_shared(to_be_continued(prompt, tokenizer), ids))
    return Tokens(ids, [IGNORED] * before + ids[before:])


def to_be_continued(prompt: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt, without those that a tokenizer adds at the end of a text: the answer follows."""
    found = tokenizer(prompt, **PARTED)
    ids: list[int] = list(found["input_ids"])
    return ids[: len(ids) - _added_at_end(found["special_tokens_mask"])]


def with_end(ids: Sequence[int], added: Sequence[int], tokenizer: Any) -> list[int]:
    """Return the tokens of a text that a model learns to write, which end with the end token.

    `added` has 1 for tokens that the tokenizer added: the end token may be among those at the end. Raises UserError
    where there is none.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "the tokenizer has no end-of-text token, so a model could not learn to stop: set one and save it"
        )
    ending = ids[len(ids) - max(1, _added_at_end(added)) :]
    return [*ids, *[end] * (end not in ending)]


def _added_at_end(added: Sequence[int]) -> int:
    """Return how many tokens a tokenizer added after those of a text; 0 where the text has none."""
    last = max((i for i, by_tokenizer in enumerate(added) if not by_tokenizer), default=len(added) - 1)
    return len(added) - 1 - last


def _shared(left: list[int], right: list[int]) -> list[int]:
    """Return the beginning that two lists share: at the seam a token may span prompt and answer."""
    same = next((i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left))
    return left[:same]


def template_of(path: Path) -> str:
    """Read a template file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--template {path} cannot be read: {problem}") from problem
    if len(text) > CHARACTERS:
        raise UserError(f"--template {path}: {len(text)} characters, expected at most {CHARACTERS}")
    return text


def before_answer(row: chats.Row, tokenizer: Any, given: str | None) -> str:
    """Return the text of a chat that the assistant is to answer, up to where the answer begins. Raises UserError."""
    return _render(tokenizer, _template(tokenizer, given), chats.messages(row), prompt=True)


def _template(tokenizer: Any, given: str | None) -> str:
    template = given or tokenizer.chat_template
    if template is None:
        raise UserError("the tokenizer has no chat template: give one with --template FILE (Jinja)")
    return str(template)


def _chat(row: chats.Row, tokenizer: Any, given: str | None, loss_on: str) -> Tokens:
    template = _template(tokenizer, given)
    messages = chats.messages(row)
    whole = _render(tokenizer, template, messages)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = list(found["input_ids"]), found["offset_mapping"]
    if loss_on == "all":
        spans = [(0, len(whole))]
    elif MARK.search(template):
        return _marked(tokenizer, template, messages, loss_on)
    else:
        spans = _spans(tokenizer, template, messages, whole, ids, places)
    if loss_on == "completion":
        spans = spans[-1:]
    learned = [any(a < end and begin < b for a, b in spans) and end > begin for begin, end in places]
    return Tokens(ids, [i if take else IGNORED for i, take in zip(ids, learned, strict=True)])


def _marked(tokenizer: Any, template: str, messages: Any, loss_on: str) -> Tokens:
    """Read what is learned from a template's own marks."""
    found = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    if 1 not in mask:
        raise UserError(
            "the chat template has {% generation %} marks, and nothing of this chat lies within them: mark what the "
            "assistant says, or take the marks out"
        )
    if loss_on == "completion" and 0 in mask[::-1][mask[::-1].index(1) if 1 in mask else 0 :]:
        last = len(mask) - 1 - mask[::-1].index(1)
        first = next((i + 1 for i in range(last, -1, -1) if not mask[i]), 0)
        mask = [int(first <= i <= last) for i in range(len(mask))]
    return Tokens(ids, [i if take else IGNORED for i, take in zip(ids, mask, strict=True)])


def _spans(
    tokenizer: Any, template: str, messages: list[Any], whole: str, ids: list[int], places: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return where in the text of a chat each assistant turn begins and ends, its end token included.

    `ids` are the tokens of the text `whole`, and `places` where in it they begin and end.
    """
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, template, messages[:place], prompt=True)
        after = _render(tokenizer, template, messages[: place + 1])
        # a template may end a chat with more than a turn; compared as tokens, so that none is cut in two
        same = len(_shared(list(tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]), ids))
        shared = whole[: places[same - 1][1] if same else 0].rstrip()
        if not whole.startswith(before) or message["content"].strip() not in shared[len(before) :]:
            raise UserError(
                "the chat template changes earlier messages when later ones come, so the assistant's turns cannot be "
                "found: train on chats of one turn, mark them in the template with {% generation %}, or --loss-on all"
            )
        spans.append((len(before), len(shared)))
    return spans


def _render(tokenizer: Any, template: str, messages: Any, prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as problem:  # of Jinja or raised by the template itself
        line = " ".join(str(problem).split())[:200]
        raise UserError(f"the chat template cannot show this chat: {line}") from problem
    return str(text)
