"""Which adapters are in use: a default for the whole model, and what `use` sets for the current thread or task.

What `use` sets is a context variable, so threads and asyncio tasks never see each other's adapters. Activation
checkpointing recomputes a part of the forward pass during the backward pass, perhaps in another thread or after the
`use` block; `follow_checkpoints` makes it run in the context of the forward pass. torch.compile cannot read context
variables, so a compiled model reads what was set last, and `use` serves one thread only.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from loralab.errors import UserError

COMPILED = (
    "a model that is compiled by torch.compile cannot use different adapters in several threads: call the model "
    "uncompiled there, or give each thread a copy"
)
ROWS_FIRST = (
    "rows of several adapters need a model whose layers have the rows of a batch first; where tokens come first, call "
    "it once for each adapter"
)


@dataclass(frozen=True)
class Stream:
    """The random numbers of one run, and how much of its equal part of a batch is its own and not padding."""

    generator: torch.Generator
    rows: int
    tokens: int


@dataclass(frozen=True)
class InUse:
    """The adapters in use: no name means the base, one name every row, several names one per row through `ids`."""

    names: tuple[str, ...] = ()
    ids: Tensor | None = None  # (rows,) index into names
    equal_parts: bool = False  # the rows are in as many equal parts as there are names, in their order
    streams: tuple[Stream, ...] = ()  # one per name where runs share a batch in equal parts; else torch's generator
    chosen: Mapping[str, Any] = field(default_factory=dict)  # adapter -> the rank to evaluate it at (see `Factors.at`)
    first_axes: list[int] | None = None  # where layers write the first axis of their inputs, if that is asked
    removed: str | None = None  # the default adapter that was removed: nothing may answer until another is active


class Active:
    """What is in use here and now; shared by all adapted layers and heads of a model."""

    def __init__(self) -> None:
        self.default = InUse()  # in every thread and task, outside of `use`
        self._prepare()

    def _prepare(self) -> None:
        self._here: ContextVar[InUse | None] = ContextVar("loralab_in_use", default=None)  # set by `changed`
        self._drawn: ContextVar[dict[str, Any] | None] = ContextVar("loralab_drawn", default=None)
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()  # adapter -> how many `use` blocks name it, in all threads and tasks
        self._last, self._last_drawn = self.default, dict[str, Any]()  # what was set last, for compiled models
        self._compiled_in: set[int] = set()  # threads that ran the model compiled

    @property
    def state(self) -> InUse:
        """What is in use in this thread or task."""
        return self._last if torch.compiler.is_compiling() else self._here.get() or self.default

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters in use."""
        return self.state.names

    @property
    def ids(self) -> Tensor | None:
        """The index (rows,) of each row's adapter in `names`; None where there is one adapter or none."""
        return self.state.ids

    @property
    def equal_parts(self) -> bool:
        """Whether the rows are in as many equal parts as there are names, in their order."""
        return self.state.equal_parts

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The random numbers of each name, where runs share a batch."""
        return self.state.streams

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Adapter -> the rank that it is evaluated at."""
        return self.state.chosen

    @property
    def drawn(self) -> dict[str, Any]:
        """Adapter -> what its method drew for the last training forward of this thread or task."""
        if torch.compiler.is_compiling():
            return self._last_drawn
        if (drawn := self._drawn.get()) is None:
            self.drawn = drawn = {}
        return drawn

    @drawn.setter
    def drawn(self, values: dict[str, Any]) -> None:
        self._drawn.set(values)
        self._last_drawn = values

    def check(self, rows: int, replica: bool = False) -> None:
        """Raise UserError if nothing may answer, or if the input has another number of rows than `ids`.

        A `replica` of torch's DataParallel runs in a thread of its own, which does not see what `use` set.
        """
        if replica and self._open and self._here.get() is None:
            raise UserError(
                "torch.nn.DataParallel runs the model in threads that do not see this `use` block: call "
                "adapters.activate(name) instead, or use DistributedDataParallel"
            )
        state = self.state
        if state.first_axes is not None:
            state.first_axes.append(rows)
        if state.removed is not None:
            raise UserError(
                f"adapter {state.removed!r} was active and is removed: call adapters.activate(name), or "
                "adapters.activate(None) for the base"
            )
        if state.ids is not None and rows != len(state.ids):
            raise UserError(f"input of {rows} rows, but ids name an adapter for {len(state.ids)} rows: {ROWS_FIRST}")

    def check_compiled(self) -> None:
        """Raise UserError if a compiled forward pass would not see what is in use in this thread."""
        self._compiled_in.add(threading.get_ident())
        if (self._here.get() or self.default) is not self._last or (len(self._compiled_in) > 1 and self._open):
            raise UserError(COMPILED)

    def activate(self, name: str | None) -> None:
        """Set the default of every thread and task, and what is in use here until the `use` block ends."""
        self.default = InUse() if name is None else InUse((name,))
        if self._here.get() is not None:
            self._here.set(self.default)
        self._last = self.state

    @contextmanager
    def changed(self, **values: Any) -> Iterator[None]:
        """Change these fields of what is in use inside the block, in this thread or task only."""
        if self._compiled_in - {threading.get_ident()}:
            raise UserError(COMPILED)
        state = replace(self.state, removed=None, **values)
        with self._lock:
            self._open.update(state.names)
        token = self._here.set(state)
        self._last = state
        try:
            yield
        finally:
            self._here.reset(token)
            self._last = self.state
            with self._lock:
                self._open.subtract(state.names)
                self._open += Counter()  # drops what is zero

    def only(self, place: int) -> AbstractContextManager[None]:
        """Activate the adapter at one place of the names alone, for a module that sees its rows alone."""
        return self.changed(names=(self.names[place],), ids=None, streams=self.streams[place : place + 1])

    def release(self, name: str) -> None:
        """Prepare for the removal of an adapter. Raises UserError if a `use` block, or its end, would need it."""
        if self._open[name]:
            raise UserError(
                f"adapter {name!r} is active in a `use` block that has not ended, here or in another thread: "
                "remove it after the block"
            )
        if name not in self.default.names:
            return
        if self._here.get() is None or self.names:
            raise UserError(
                f"adapter {name!r} is active{' again after this `use` block' if self._here.get() else ''}: first call "
                "adapters.activate with another name, or with None for the base; detach() takes all adapters off"
            )
        self.default = InUse(removed=name)  # inside `use(None)`: the base answers here, and nothing afterwards

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins with what is in use where it is made."""
        return {"default": replace(self.state, streams=())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.default = state["default"]
        self._prepare()


def row_ids(ids: Tensor | Sequence[int], count: int) -> Tensor:
    """The index of each row's adapter (rows,), on the CPU, where every layer reads it.

    Raises UserError unless `ids` holds one whole number from 0 to count - 1 per row.
    """
    rows = torch.as_tensor(ids).cpu()
    if rows.ndim != 1 or len(rows) == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise UserError(f"ids: expected one whole number from 0 to {count - 1} per row, got {rows.tolist()}")
    return rows


def in_equal_parts(ids: Tensor, count: int) -> bool:
    """Whether the rows are `count` equal blocks, block i of adapter i."""
    return len(ids) % count == 0 and torch.equal(ids, torch.arange(count).repeat_interleave(len(ids) // count))


def first_row(value: Any, rows: int) -> Any:
    """What a forward pass of the first row alone takes in the place of `value`, which is given for that many rows.

    Objects, such as a cache of keys that the pass would write to, and what has one axis only are left out (None).
    """
    if isinstance(value, Tensor):
        return None if value.ndim < 2 else value[:1] if len(value) == rows else value
    return value if isinstance(value, bool | int | float | str) else None


# ---- activation checkpointing ----------------------------------------------------------------------------------------


@cache
def follow_checkpoints() -> None:
    """Make torch's activation checkpointing, of both kinds, recompute in the context of the forward pass.

    Done once, when the first adapter is attached. torch has no public way to carry a context from a forward pass into
    its recomputation for both kinds, so the two functions that keep what is recomputed are wrapped.
    """
    forward, generator = checkpoint.CheckpointFunction.forward, checkpoint._checkpoint_without_reentrant_generator

    @wraps(forward)
    def reentrant(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        again = _in_this_context(run_function)
        out = forward(ctx, run_function, *args)  # type: ignore[no-untyped-call]
        ctx.run_function = again
        return out

    @wraps(generator)
    def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(_in_this_context(function), *args, **kwargs)

    checkpoint.CheckpointFunction.forward = staticmethod(reentrant)  # type: ignore[method-assign]
    checkpoint._checkpoint_without_reentrant_generator = plain  # type: ignore[assignment]


def _in_this_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run with the context variables that are set now."""
    context = copy_context()

    def run(*args: Any, **kwargs: Any) -> Any:
        return context.copy().run(function, *args, **kwargs)  # a copy: two threads may recompute at once

    return run
