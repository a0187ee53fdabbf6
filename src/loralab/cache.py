"""Cache of what is computed from tensors, kept only while somebody promises that the tensors do not change.

No mark of a tensor is both cheap and sure: its version is not counted by a write through `t.data`, by torch's fused
optimizers called directly, nor by a write to a buffer it is a view of. So a cache keeps nothing by itself. Inside a
`caching()` block, which loops of loralab's own open (evaluation, prediction), values are kept and used again. Address
and version of every tensor are compared there too, as a second guard.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Scope:
    """A stretch of work in which no tensor changes, or, with `learns`, none of the frozen base.

    What caches keep for it is freed with it.
    """

    def __init__(self, learns: bool = False) -> None:
        self.learns = learns


_SCOPE: ContextVar[Scope | None] = ContextVar("loralab_cache_scope", default=None)


@contextmanager
def caching(scope: Scope | None = None) -> Iterator[None]:
    """Let caches keep values inside the block, for this thread or task, while nothing changes the model's tensors.

    Without a `scope` the values are freed at the end of the block; one that is entered again still has them.
    """
    token = _SCOPE.set(scope or Scope())
    try:
        yield
    finally:
        _SCOPE.reset(token)


def keeps() -> bool:
    """Whether a value computed now from tensors that can learn would be kept."""
    if torch.compiler.is_compiling():  # it cannot read context variables
        return False
    scope = _SCOPE.get()
    return scope is not None and not scope.learns and not torch.is_grad_enabled()


class Kept(NamedTuple):
    """A value, and the tensors that it was computed from."""

    value: Any
    marks: list[tuple[int, int]]  # address and version of each tensor
    tensors: list[Tensor]  # held, so that no other tensor gets an address of theirs


class Cache:
    """Values by key, for each scope."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most  # values kept at once
        self.scopes: WeakKeyDictionary[Scope, dict[Hashable, Kept]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any], frozen: bool = False) -> Any:
        """`make()`, or what it gave before for this key, in this scope, from these very tensors.

        `frozen` tensors are those of a base that never learns; what is made of them has no gradient.
        """
        if torch.compiler.is_compiling():
            return make()
        scope = _SCOPE.get()
        if scope is None or not (frozen or keeps()):
            return make()
        try:
            marks = [(t.data_ptr(), t._version) for t in tensors]
        except RuntimeError:  # tensors made in inference mode have no version
            return make()
        kept = self.scopes.get(scope, {}).get(key)
        if kept is not None and kept.marks == marks:
            return kept.value
        with torch.inference_mode(False), torch.no_grad():  # what is kept has a version, and serves everywhere
            kept = Kept(make(), marks, [t.detach() for t in tensors])
        with self._lock:
            values = self.scopes.setdefault(scope, {})
            values.pop(key, None)
            while self.most is not None and len(values) >= self.most:
                del values[next(iter(values))]
            values[key] = kept
        return kept.value

    def forget(self, name: Hashable) -> None:
        """Drop what has `name` in its key."""
        with self._lock:
            for values in self.scopes.values():
                for key in [key for key in values if name in key]:  # type: ignore[operator]
                    del values[key]

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self.scopes.clear()

    def __deepcopy__(self, memo: Any) -> "Cache":
        return Cache(self.most)

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["most"])  # type: ignore[misc]


def constants(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` of hashable arguments, kept; its tensors have values, even where `loralab plan` asks for them first."""

    @lru_cache(maxsize=8)
    @wraps(make)
    def made(*args: Hashable) -> Any:
        with _disable_current_modes():
            return make(*args)

    return made
