"""How files for a language model are read: chats, prompts with completions, instructions, and plain text.

A row becomes a tuple: of (role, content) pairs for a chat, of prompt and completion, or of one text. FORMS has a line
for each form of file: its columns and the function that makes a row of their cells.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from loralab.data import checks

Message = tuple[str, str]  # role, content
Row = tuple[Any, ...]

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Form(NamedTuple):
    """A form of file."""

    columns: tuple[str, ...]
    row: Callable[..., Row]  # cells of these columns, and of the optional ones -> the row
    optional: tuple[str, ...] = ()  # columns that are read where they are there


def chat(messages: Any, role: str = "role", content: str = "content") -> tuple[Message, ...]:
    """Return a chat as (role, content) pairs. Raises ValueError for one that cannot be trained on.

    After a system message, if there is one, user and assistant take turns, and the assistant ends it.
    """
    pairs = _in_turns(_pairs(messages, role, content))
    if pairs[-1][0] != "assistant":
        raise ValueError("a chat that ends with the user, so nothing is answered")
    return pairs


def open_chat(messages: Any, role: str = "role", content: str = "content") -> tuple[Message, ...]:
    """Return a chat up to its last message of the user, which waits for an answer; raises ValueError as `chat` does."""
    pairs = _in_turns(_pairs(messages, role, content))
    return pairs[:-1] if pairs[-1][0] == "assistant" else pairs


def _in_turns(pairs: tuple[Message, ...]) -> tuple[Message, ...]:
    turns = pairs[1:] if pairs and pairs[0][0] == "system" else pairs
    if not turns:
        raise ValueError("a chat without turns")
    for place, (speaker, _) in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if speaker != expected:
            raise ValueError(f"a chat with {speaker} where {expected} was expected: roles take turns, the user first")
    return pairs


def _pairs(messages: Any, role: str, content: str) -> tuple[Message, ...]:
    if not isinstance(messages, list):
        raise ValueError(f"{checks.kind(messages)} instead of a list of messages")
    pairs = []
    for message in messages:
        if not isinstance(message, dict) or not {role, content} <= message.keys():
            raise ValueError(f"a message without {role} and {content}")
        speaker = ROLES.get(message[role]) if isinstance(message[role], str) else None
        if speaker is None:
            raise ValueError(f"the role {checks.shown(message[role])}; there are {', '.join(ROLES)}")
        try:
            text = checks.any_text(message[content])
        except ValueError as fault:
            raise ValueError(f"{fault} in a message of {message[role]}") from None
        if not text.strip():
            raise ValueError(f"an empty message of {message[role]}")
        pairs.append((speaker, text))
    return tuple(pairs)


def completion(prompt: Any, answer: Any) -> Row:
    """Return (prompt, completion), or one chat where both are lists of messages."""
    if isinstance(prompt, list) and isinstance(answer, list):
        return chat(prompt + answer)
    return _of("prompt", checks.any_text, prompt), _of("completion", checks.text, answer)


def _of(column: str, check: Callable[[Any], str], cell: Any) -> str:
    try:
        return check(cell)
    except ValueError as fault:
        raise ValueError(f"column {column!r}: {fault}") from None


def instruction(asked: Any, answer: Any, given: Any = None) -> tuple[Message, ...]:
    """Return a chat of one turn from an instruction, the input that it may have, and its output."""
    return (*question(asked, given), ("assistant", _of("output", checks.text, answer)))


def question(asked: Any, given: Any = None) -> tuple[Message, ...]:
    """Return the user's turn of an instruction and the input that it may have."""
    more = "" if given is None else checks.any_text(given)
    return (("user", f"{checks.text(asked)}\n\n{more}" if more.strip() else checks.text(asked)),)


def prompt(cell: Any) -> Row:
    """Return a prompt: a text, or a chat where it is a list of messages."""
    return open_chat(cell) if isinstance(cell, list) else (checks.text(cell),)


FORMS = (
    Form(("messages",), chat),
    Form(("conversations",), lambda messages: chat(messages, "from", "value")),
    Form(("prompt", "completion"), completion),
    Form(("instruction", "output"), instruction, ("input",)),
    Form(("text",), lambda text: (checks.text(text),)),
)
PROMPTS = (  # files whose rows wait for an answer; the first form that fits counts, answers that are there are left out
    Form(("messages",), open_chat),
    Form(("conversations",), lambda messages: open_chat(messages, "from", "value")),
    Form(("prompt",), prompt),
    Form(("instruction",), question, ("input",)),
    Form(("text",), prompt),
    *(Form((name,), prompt) for name in ("source", "document", "article")),  # what an encoder-decoder reads
)


def asks(columns: Sequence[str]) -> Form:
    """Return how a row that waits for an answer is read, for an adapter that learned from these columns of a file."""
    first = columns[0] if columns else "text"
    return next((form for form in PROMPTS if form.columns[0] == first), Form((first,), prompt))


def is_chat(row: Row) -> bool:
    """Tell whether a row is a chat."""
    return not isinstance(row[0], str)


def messages(row: Row) -> list[Mapping[str, str]]:
    """Return a chat as the messages that a template takes."""
    return [{"role": role, "content": content} for role, content in row]
