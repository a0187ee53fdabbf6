"""The settings of a method by their own names: type, default, meaning, and their values from text or TOML.

A setting is a field of the recipe or of its factors; the list is read off these dataclasses, so there is no second one.
"""

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from loralab.errors import UserError, hint
from loralab.recipe import NAMED, recipe

NOT_SET = {"factors": "it is what --method chooses", "ranks": "give a rank map with --ranks FILE"}
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Option:
    """One setting of a method."""

    name: str
    type: Any  # its annotation
    default: Any  # of the named method
    meaning: str


def options(method: str) -> dict[str, Option]:
    """Name -> setting, of the factors first. Raises UserError for an unknown method."""
    row = recipe(method)
    held: list[Any] = [row] if row.factors is None else [row.factors, row]
    found: dict[str, Option] = {}
    for values in held:
        kind: type = type(values)
        hints, meanings = typing.get_type_hints(kind), _meanings(kind)
        for f in dataclasses.fields(values):
            if f.name not in NOT_SET and f.name not in found:
                found[f.name] = Option(f.name, hints[f.name], getattr(values, f.name), meanings.get(f.name, ""))
    return found


@cache
def names() -> tuple[str, ...]:
    """Every setting that any method has."""
    return tuple(dict.fromkeys(name for method in NAMED for name in options(method)))


def parse(method: str, given: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts as values of the method's settings.

    Raises UserError, with every problem at once, for what is no setting of the method or no value of its type.
    """
    known, values, wrong = options(method), {}, []
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            wrong.append(f"--set {text}: expected name=value")
        elif name in NOT_SET:
            wrong.append(f"--set {name}: {NOT_SET[name]}")
        elif name not in known:
            there = ", ".join(known)
            wrong.append(f"method {method!r} has no setting {name!r}{hint(name, known)}: there are {there}")
        elif name in values:
            wrong.append(f"--set {name} is given twice")
        else:
            try:
                values[name] = converted(value.strip(), known[name].type)
            except ValueError as error:
                wrong.append(f"--set {name}={value}: expected {error}")
    if wrong:
        raise UserError("; ".join(wrong))
    return values


def texts(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Values, as TOML has them, as the texts that `parse` takes."""
    return tuple(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def converted(text: str, hint: Any) -> Any:
    """A text as a value of a type; ValueError says what was expected."""
    if isinstance(hint, types.UnionType):
        inner = [h for h in typing.get_args(hint) if h is not types.NoneType]
        if len(inner) < len(typing.get_args(hint)) and text.lower() == "none":
            return None
        return converted(text, inner[0])
    if typing.get_origin(hint) is Literal:
        if text in typing.get_args(hint):
            return text
        raise ValueError(" or ".join(map(repr, typing.get_args(hint))))
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return _plain(text, hint)


def _plain(text: str, hint: Any) -> Any:
    if hint is bool:
        if text.lower() not in WORDS:
            raise ValueError("true or false")
        return WORDS[text.lower()]
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError("a whole number") from None
    if hint is float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError("a number")
        return value
    if not text:
        raise ValueError("a text")
    return text


@cache
def _meanings(kind: type) -> dict[str, str]:
    """Field -> the text under it in the source of a dataclass and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as meaning)):
                    found[name] = " ".join(meaning.split())
    return found
