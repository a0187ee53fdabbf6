"""The one exception for what a user can mend: its message says what came, what was expected and what to do."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable


class UserError(ValueError):
    """Bad input. The command line prints the message as one line on stderr and exits with code 2.

    What a message quotes from files cannot break the line or steer a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OtherBase(UserError):
    """An adapter and a base that it was not trained on."""


class OtherKind(UserError):
    """A model that is not of the kind that a task needs."""


def printable(text: str) -> str:
    """Text on one line: line breaks and tabs become spaces, other characters that do not print their escapes."""
    shown = (c if c.isprintable() else " " if c in "\n\r\t" else repr(c)[1:-1] for c in text)
    return text if text.isprintable() else "".join(shown)


def near(word: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that a mistyped word is nearest to, if any is near."""
    return next(iter(difflib.get_close_matches(word, known, 1, cutoff)), None)


def hint(word: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """`near` as a part of a message: " (did you mean 'lora'?)", or nothing."""
    return "" if (meant := near(word, known, cutoff)) is None else f" (did you mean {meant!r}?)"


def check_once(what: str, names: Iterable[str]) -> None:
    """Raise UserError if a list that names things, as `what` calls it, names one of them twice."""
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{what} gives {', '.join(map(repr, twice))} twice: name each once")
