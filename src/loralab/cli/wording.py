"""Messages in the words of a command line: the library says lr=0.0, who typed a command reads --lr 0.0."""

import re
import sys
from functools import cache
from inspect import signature
from types import UnionType
from typing import Any, get_args, get_type_hints

ASSIGNMENT = re.compile(r"(?<![\w.'-])(?<!--set )([a-z]\w*)=('[^']*'|\([^)]*\)|\[[^\]]*\]|[^\s,;:)]+)")
WORDS = re.compile(r"[^\s(),']+")  # of a tuple as Python writes it
KINDS = {int: "a whole number", float: "a number"}
TOML = ("study",)  # commands whose settings are keys of a file


def kind(type_: type) -> str:
    """What a type of number is called in errors."""
    return KINDS[type_]


def spelled(message: str, command: str) -> str:
    """A message whose settings are written as flags of the command, or as --set where only the method has them.

    It is left as it is where the command was not imported yet, as settings come up only then.
    """
    module = sys.modules.get(f"loralab.cli.{command}")
    if module is None or command in TOML:
        return message
    there = flags(getattr(module, command))
    return ASSIGNMENT.sub(lambda found: _flag(found[0], found[1], found[2], there), message)


def _flag(whole: str, name: str, value: str, there: frozenset[str]) -> str:
    from loralab import options  # slow; the command has imported it

    text, flag = value.strip("'"), f"--{name.replace('_', '-')}"
    if flag in there:
        return {"True": flag, "False": f"no {flag}", "None": f"no {flag}"}.get(text, f"{flag} {text}")
    if "--set" in there and name in options.names():
        given = text.lower() if text in ("True", "False", "None") else ",".join(WORDS.findall(text))
        return f"--set {name}={given}"
    return whole


@cache
def flags(function: Any) -> frozenset[str]:
    """The flags of a command: its parameters, and the fields of those that are settings."""
    names: set[str] = set()
    for name, hint in get_type_hints(function).items():
        fields = getattr(_inner(hint), "__dataclass_fields__", None)
        names |= {name} if fields is None else set(fields)
    given = signature(function).parameters.items()
    names -= {"return", *(n for n, p in given if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL))}
    return frozenset(f"--{name.replace('_', '-')}" for name in names)


def _inner(hint: Any) -> Any:
    return next(iter(get_args(hint)), hint) if isinstance(hint, UnionType) else hint
