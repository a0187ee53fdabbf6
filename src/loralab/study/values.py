"""Values of a TOML file as values of `Settings`, by its own type hints: no second list of what a setting may be."""

import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from loralab.errors import hint
from loralab.run import Settings

HINTS = typing.get_type_hints(Settings)
OF_TASK = ("task", "text", "label", "problem_type", "validation")
NOT_YOURS = {  # settings that the study itself decides
    "seed": "seeds = [...] of the study gives it",
    "model": "models = [...] of the study gives it",
    "data": "data = ... of the study gives it",
    "out": "runs lie in the store",
    "resume": "a study always goes on",
}
FREE = tuple(key for key in HINTS if key not in (*OF_TASK, *NOT_YOURS))  # what protocol, tasks and methods may set


class Problems(list[str]):
    """All that is wrong with a study, said at once."""

    def say(self, where: str, told: str) -> None:
        if (line := f"{where}: {told}") not in self:
            self.append(line)

    def known(self, where: str, table: Mapping[str, Any], allowed: Collection[str]) -> None:
        """Names each key that is not allowed, with the nearest that is."""
        for key in table:
            if key in allowed:
                continue
            meant = f": {NOT_YOURS[key]}" if key in NOT_YOURS else hint(key, allowed)
            self.say(where, f"no {key!r}{meant or ': there are ' + ', '.join(allowed)}")

    def settings(self, where: str, table: Mapping[str, Any], base: Path) -> dict[str, Any]:
        """The settings of a table that are of the right type; paths are relative to `base`."""
        found = {}
        for key, value in table.items():
            try:
                found[key] = converted(value, HINTS[key], base)
            except TypeError as error:
                self.say(where, f"{key}={value!r}: expected {error}")
        return found

    def strings(self, where: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and value and all(isinstance(x, str) for x in value):
            return tuple(value)
        self.say(where, f"{value!r}: expected names, as in [{'minilm' if where == 'models' else 'cola'!r}]")
        return ()


def converted(value: Any, hint: Any, base: Path) -> Any:
    """The value as the hint wants it; TypeError says what was expected."""
    if isinstance(hint, types.UnionType):
        return converted(value, next(h for h in typing.get_args(hint) if h is not type(None)), base)
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise TypeError(" or ".join(map(repr, typing.get_args(hint))))
    if typing.get_origin(hint) is tuple:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(x, str) for x in values):
            return tuple(values)
        raise TypeError("text or a list of texts")
    return _plain(value, hint, base)


def _plain(value: Any, hint: Any, base: Path) -> Any:
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is Path and isinstance(value, str):
        return base / value
    if type(value) is hint:
        return value
    raise TypeError(NAMES.get(hint, str(hint)))


NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false", Path: "a path"}
