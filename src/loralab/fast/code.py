"""Whose code a layer runs: that of transformers and torch, which a block computes, or somebody's own in its place.

A layer calls functions by names: `apply_rotary_pos_emb` of its own file, `scaled_dot_product_attention` of torch, a
method of its class, "sdpa" in the table of attentions. What a name stands for can be replaced for the whole process.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

ATTENTIONS = ("eager", "sdpa")  # attention of transformers that says what a block computes
MODELS = "transformers.models."
READ = ("transformers.", "torch.nn.", "loralab.")  # code that is read for the names it calls


class Obstacle(NamedTuple):
    """Why a layer takes its own forward: `text` is said of the module, or of the layer where that is None."""

    text: str
    module: nn.Module | None = None


class Called(NamedTuple):
    """A name by which a layer calls a function, and what it stood for when a block looked."""

    names: Mapping[str, Any]
    name: str
    function: Any  # None where there was nothing


def called(modules: Sequence[nn.Module]) -> list[Called]:
    """Every name by which the forwards of these modules call a function, and functions of transformers in turn."""
    found: dict[tuple[int, str], Called] = {}
    for module in modules:
        methods = [vars(kind) for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
        waiting, done = [type(module).forward], set[int]()
        while waiting:
            function = waiting.pop()
            done.add(id(function))
            for one in _called_by(function, vars(module), methods):
                found[id(one.names), one.name] = one
                ours = any(_origin(part).startswith("transformers.") for part in _wrapped(one.function))
                if ours and id(one.function) not in done:
                    waiting.append(one.function)
    return list(found.values())


def changed(names: Sequence[Called]) -> bool:
    """Whether one of the names stands for something else now."""
    return any(where.get(name) is not function for where, name, function in names)


def foreign(modules: Sequence[nn.Module], names: Sequence[Called]) -> Obstacle | None:
    """What is neither code of the layer's own file nor of transformers for all models, torch, or loralab.

    `modules` are the layer and what it consists of, `names` what they call.
    """
    home = next(kind.__module__ for kind in type(modules[0]).__mro__ if kind.__module__.startswith(MODELS))
    for module in modules:
        classes = type(module).__mro__
        last = next(i for i, kind in enumerate(classes) if "forward" in vars(kind))
        for kind in classes[: last + 1]:
            if kind.__module__ != home and not kind.__module__.startswith(
                ("torch.", "transformers.activations", "loralab.")
            ):
                return Obstacle(f"is a {kind.__name__} of {kind.__module__}", module)
        if _stranger(type(module).forward, home) is not None:
            return Obstacle("has a forward of its own", module)
        if _stranger(type(module).__call__, home) is not None:
            return Obstacle("has a __call__ of its own", module)
    for one in names:
        if one.function is not None and (place := _stranger(one.function, home)) is not None:
            return Obstacle(f"{one.name}, which it calls, is a function of {place}")
    return None


def _called_by(function: Any, own: dict[str, Any], methods: Sequence[Mapping[str, Any]]) -> Iterator[Called]:
    """The names by which a method of a module calls; `own` are the module's attributes, which come before methods."""
    for one in _wrapped(function):
        file = getattr(one, "__globals__", {})
        for name in _names(one):
            for names in (file, vars(F), vars(torch), *methods):
                value = names.get(name)
                if isinstance(value, MutableMapping):  # the table of attentions, and how it is asked
                    yield Called(names, name, value)
                    yield from (Called(value, key, value.get(key)) for key in ATTENTIONS)
                    asked = [vars(kind) for kind in type(value).__mro__ if kind.__module__.startswith("transformers.")]
                    yield from (Called(of, by, of[by]) for of in asked for by in _names(one) if callable(of.get(by)))
                elif callable(value) and not isinstance(value, type | nn.Module):
                    yield Called(names, name, value)
            if any(callable(names.get(name)) for names in methods):
                yield Called(own, name, own.get(name))


def _names(function: Any) -> Iterator[str]:
    """Every name in the code of a function of a layer; not in what torch wraps around one to compile it, say."""
    code = getattr(function, "__code__", None)
    waiting = [code] if isinstance(code, CodeType) and _origin(function).startswith(READ) else []
    for code in waiting:
        yield from (name for name in code.co_names if name != "forward")  # a block looks at forwards itself
        waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]


def _wrapped(function: Any) -> Iterator[Any]:
    """A function, what it wraps, and so on."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _origin(function: Any) -> str:
    """The module that a function was written in, whatever it says of itself (functools.wraps)."""
    file = getattr(function, "__globals__", {}).get("__name__")
    return str(file or getattr(function, "__module__", None) or type(function).__module__)


def _stranger(function: Any, home: str) -> str | None:
    """Where a function comes from, if that is neither the layer's own file nor one of transformers, torch, loralab."""
    known = ("torch.", "transformers.", "loralab.")
    places = [place for place in map(_origin, _wrapped(function)) if place != home]
    return next((p for p in places if p.startswith(MODELS) or not f"{p}.".startswith(known)), None)
