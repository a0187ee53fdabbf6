"""The settings of a method by their own names: type, default, meaning, and their values from text or TOML.

A setting is a field of the recipe or of its factors. The list is read from these dataclasses; there is no second one.
"""

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from loralab.errors import UserError, hint
from loralab.methods.starts import STARTS
from loralab.policies import POLICIES
from loralab.recipe import NAMED, WITHOUT_LAYERS, recipe
from loralab.stores import STORES

NOT_SET = {"factors": "it is what --method chooses", "ranks": "give a rank map with --ranks FILE"}
CHOICES: dict[str, Collection[str]] = {"start": STARTS, "store": STORES, "policy": POLICIES}  # names in a registry
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Option:
    """One setting of a method."""

    name: str
    type: Any  # its annotation
    default: Any  # of the named method
    meaning: str

    @property
    def expects(self) -> str:
        """The values that it takes, in words."""
        inner, optional = _inner(self.type)
        names = CHOICES.get(self.name) or (typing.get_args(inner) if typing.get_origin(inner) is Literal else None)
        plain = {bool: "true or false", int: "a whole number", float: "a number"}
        words = ", ".join(map(str, names)) if names else plain.get(inner, "names, separated by commas")
        return f"{words} or none" if optional else words


def options(method: str) -> dict[str, Option]:
    """Name -> setting, those of the factors first. Raises UserError for an unknown method."""
    row = recipe(method)
    holders: list[Any] = [row] if row.factors is None else [row.factors, row]
    found: dict[str, Option] = {}
    for holder in holders:
        kind: type = type(holder)
        types_, meanings = typing.get_type_hints(kind), _meanings(kind)
        for f in dataclasses.fields(holder):
            if f.name in found or f.name in NOT_SET or (row.factors is None and f.name not in WITHOUT_LAYERS):
                continue
            found[f.name] = Option(f.name, types_[f.name], getattr(holder, f.name), meanings.get(f.name, ""))
    return found


@cache
def names() -> tuple[str, ...]:
    """Every setting that any method has."""
    return tuple(dict.fromkeys(name for method in NAMED for name in options(method)))


def parse(method: str, given: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts as values of the method's settings.

    Raises UserError, with every problem at once, for an unknown setting and for a value of another type.
    """
    known, values, wrong = options(method), {}, []
    for assignment in given:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            wrong.append(f"--set {assignment}: expected name=value")
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
    return tuple(f"{name}={text(value)}" for name, value in values.items())


def text(value: Any) -> str:
    """A value as the text that `parse` takes."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _inner(annotation: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)."""
    if not isinstance(annotation, types.UnionType):
        return annotation, False
    inner = [one for one in typing.get_args(annotation) if one is not types.NoneType]
    return inner[0], len(inner) < len(typing.get_args(annotation))


def converted(value: str, annotation: Any) -> Any:
    """A text as a value of a type. Raises ValueError with what was expected."""
    kind, optional = _inner(annotation)
    if optional and value.lower() == "none":
        return None
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ValueError(" or ".join(map(repr, typing.get_args(kind))))
    if typing.get_origin(kind) is tuple:
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return _plain(value, kind)


def _plain(value: str, kind: Any) -> Any:
    if kind is bool:
        if value.lower() not in WORDS:
            raise ValueError("true or false")
        return WORDS[value.lower()]
    if kind is int:
        try:
            return int(value)
        except ValueError:
            raise ValueError("a whole number") from None
    if kind is float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError("a number")
        return number
    if not value:
        raise ValueError("a text")
    return value


@cache
def _meanings(kind: type) -> dict[str, str]:
    """Field -> the docstring under it in the source of a dataclass and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, docstring in zip(body.body, body.body[1:], strict=False):
            match field, docstring:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as meaning)):
                    found[name] = " ".join(meaning.split())
    return found
