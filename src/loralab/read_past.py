"""Which layers have their weight read by a module around them, which then multiplies by it itself.

What the layer's own forward would add is then left out, always or on one of several paths (the kernels of Mamba for a
GPU, say), so the weight that is read must be the adapted one. The source of the module's forward, and of the methods it
calls, tells: `self.proj.weight` that is more than looked at.
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
def read_by(module: Any) -> frozenset[str]:
    """Paths, from the module, of the layers whose weights a class of modules reads in its forward."""
    children = ((_weight_of(node), parent) for node, parent in _of_forward(module))
    return frozenset(child for child, parent in children if child is not None and not _looks(parent))


@cache
def names_in(module: Any) -> frozenset[str]:
    """The attributes, of whatever, that a class of modules names in its forward."""
    return frozenset(node.attr for node, _ in _of_forward(module) if isinstance(node, ast.Attribute))


def _of_forward(module: Any) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """(node, the node around it) of the forward of a class of modules, and of its methods that this calls."""
    seen, rest = set[str](), ["forward"]
    while rest:
        name = rest.pop()
        if name in seen:
            continue
        seen.add(name)
        for node, parent in _nodes(getattr(module, name, None)):
            yield node, parent
            if isinstance(node, ast.Call) and _of_self(node.func):
                rest.append(node.func.attr)  # type: ignore[attr-defined]


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
    """block.proj of self.block.proj.weight."""
    if not (isinstance(node, ast.Attribute) and node.attr == "weight"):
        return None
    names: list[str] = []
    inner = node.value
    while isinstance(inner, ast.Attribute):
        names.insert(0, inner.attr)
        inner = inner.value
    return ".".join(names) if names and isinstance(inner, ast.Name) and inner.id == "self" else None


def is_read_past(model: nn.Module, path: str) -> bool:
    """Whether a module around the layer of a path reads its weight."""
    names = path.split(".")
    classes: list[Any] = [type(model.get_submodule(".".join(names[:count]))) for count in range(len(names))]
    return any(".".join(names[i:]) in read_by(kind) for i, kind in enumerate(classes))


def _of_self(node: ast.AST) -> bool:
    """Whether it is self.something."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _looks(parent: ast.AST | None) -> bool:
    """Whether what is around a weight asks for something else than its values."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in LOOKS
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in NO_VALUES
