"""Check what a JSON file holds against annotations of Python: `dict[str, list[str]]`, or the fields of a dataclass.

JSON is what `json` gives: an int is no bool and fits 64 bits, a float is finite (a whole number will do), a tuple is a
list.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from loralab.errors import UserError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
LARGEST = 2**63  # whole numbers stay below it
MOST = 10  # problems that one error names


def problems(value: Any, expected: Any, name: str) -> list[str]:
    """What keeps a JSON value from being of the annotated type, one phrase each; `name` is what errors call it."""
    return list(islice(_problems(value, expected, name), MOST))


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own; any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def checked(value: Any, expected: Any, name: str) -> Any:
    """An argument, a number of numpy or torch as Python's own. Raises UserError if it is not of the annotated type."""
    value = plain(value)
    if wrong := argument_problems(value, expected, name):
        raise UserError("; ".join(wrong))
    return value


def argument_problems(value: Any, expected: Any, name: str) -> list[str]:
    """The same as `problems` for a value of Python, whose lists may be tuples and whose null is None."""
    found = problems(list(value) if isinstance(value, tuple) else value, expected, name)
    return [problem.replace(" or null", " or None") for problem in found]


def field_problems(data: Any, fields: Mapping[str, Any], name: str = "", optional: Collection[str] = ()) -> list[str]:
    """The same for an object with exactly these fields, name -> annotation, of which the `optional` may be missing."""
    if not isinstance(data, dict):
        return [f"{name}={shown(data)}: expected an object"]
    start = f"{name}." if name else ""
    unknown = [key for key in data if key not in fields]
    missing = [start + key for key in fields if key not in data and key not in optional]
    wrong = [f"{start}{listed(unknown)} unknown here; it may come from a newer version"] if unknown else []
    wrong += [f"{', '.join(missing)} missing"] if missing else []
    for key, expected in fields.items():
        wrong += problems(data[key], expected, start + key) if key in data else []
    return wrong[:MOST]


def part_problems(data: Any, fields: Mapping[str, Any], name: str = "", optional: Collection[str] = ()) -> list[str]:
    """The same for an object that may have more fields; an annotation may be another such table of fields."""
    if not isinstance(data, dict):
        return [f"{name}={shown(data)}: expected an object"]
    start = f"{name}." if name else ""
    wrong = []
    for key, expected in fields.items():
        if key not in data:
            wrong += [] if key in optional else [f"{start}{key} missing"]
        elif isinstance(expected, Mapping):
            wrong += part_problems(data[key], expected, start + key)
        else:
            wrong += problems(data[key], expected, start + key)
    return wrong[:MOST]


def fields_of(kind: type) -> dict[str, Any]:
    """Field -> annotation of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def shown(value: Any) -> str:
    """A value as errors show it, cut short."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "a number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Collection[str], most: int = 6) -> str:
    """Names with commas, cut short."""
    some = [_key(name) for _, name in zip(range(most), names, strict=False)]
    return ", ".join(some) + (f" and {len(names) - most} more" if len(names) > most else "")


def _key(key: str) -> str:
    """A name from a file as errors show it: on one line, cut short."""
    text = key if key.isprintable() else repr(key)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _problems(value: Any, expected: Any, name: str) -> Iterator[str]:
    for choice in _choices(expected):
        kind, inner = typing.get_origin(choice) or choice, typing.get_args(choice)
        if kind in (list, tuple) and isinstance(value, list):
            for i, item in enumerate(value) if inner else ():
                yield from _problems(item, inner[0], f"{name}[{i}]")
            return
        if kind is dict and isinstance(value, dict):
            for key, item in value.items() if inner else ():
                yield from _problems(item, inner[1], f"{name}[{_key(key)!r}]")
            return
        if _fits(value, choice):
            return
    yield f"{name}={shown(value)}: expected {' or '.join(map(_word, _choices(expected)))}"


def _choices(expected: Any) -> tuple[Any, ...]:
    union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    return typing.get_args(expected) if union else (expected,)


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value that is no list or object is of a type."""
    if typing.get_origin(expected) is Literal:
        return value in typing.get_args(expected) and not isinstance(value, bool)
    if expected is Any:
        return True
    if expected in (int, float) and type(value) is int:
        return abs(value) < LARGEST
    return type(value) is expected and (expected is not float or math.isfinite(value))


def _word(expected: Any) -> str:
    """What a type is called in errors."""
    kind = typing.get_origin(expected) or expected
    if kind is Literal:
        return " or ".join(map(repr, typing.get_args(expected)))
    return "a list" if kind in (list, tuple) else "an object" if kind is dict else WORDS[kind]
