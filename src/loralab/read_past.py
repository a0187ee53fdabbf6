"""Which layers have their weight read by the module around them, which then multiplies by it itself.

An adapter on such a layer would do nothing, wholly or on one of several paths (the kernels of Mamba for a GPU, say).
The source of the module's forward, and of the methods it calls, tells: `self.proj.weight` that is more than looked at.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

LOOKS = ("dtype", "device", "shape", "ndim", "size", "dim", "is_meta", "requires_grad")  # what reads no values
NO_VALUES = ("isinstance", "hasattr", "type", "id")  # functions that read none


@cache
def read_by(module: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weights a class reads in its forward."""
    found: set[str] = set()
    seen, rest = set[str](), ["forward"]
    while rest:
        name = rest.pop()
        if name in seen:
            continue
        seen.add(name)
        for node, parent in _nodes(getattr(module, name, None)):
            if (child := _weight_of(node)) is not None and not _looks(parent):
                found.add(child)
            if isinstance(node, ast.Call) and _of_self(node.func):
                rest.append(node.func.attr)  # type: ignore[attr-defined]
    return frozenset(found)


def _nodes(function: Any) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """(node, the node around it) of the source of a function; none where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return
    yield tree, None
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            yield node, parent


def _weight_of(node: ast.AST) -> str | None:
    """proj of self.proj.weight."""
    if isinstance(node, ast.Attribute) and node.attr == "weight" and _of_self(node.value):
        return node.value.attr  # type: ignore[attr-defined,no-any-return]
    return None


def _of_self(node: ast.AST) -> bool:
    """Whether it is self.something."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _looks(parent: ast.AST | None) -> bool:
    """Whether what is around a weight asks for something else than its values."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in LOOKS
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in NO_VALUES
