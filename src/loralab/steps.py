"""The work that some methods do at every optimizer step, hooked into any training loop; a missing hook is an error.

The draw of a step is made before the model's first training forward of that step; before_step and after_step run around
the step of whichever torch optimizer holds the adapter's parameters.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loralab.errors import UserError

if TYPE_CHECKING:
    from loralab.attach import Adapters


class Steps:
    """Hooks of one handle, for its adapters whose factors are `stepped`."""

    def __init__(self, handle: "Adapters") -> None:
        self.handle = handle
        self.generators: dict[str, torch.Generator] = {}  # adapter -> the stream its draws come from
        self.due: set[str] = set()  # adapters whose next training forward draws
        self.versions: dict[str, int] = {}  # adapter -> how often its tensors had changed when last seen
        self.kept: dict[str, Any] = {}
        self.removers: list[Any] = []

    def add(self, name: str, seed: int) -> None:
        self.generators[name] = torch.Generator().manual_seed(seed)
        self.due.add(name)
        self.connect()

    def remove(self, name: str) -> None:
        for held in (self.generators, self.versions, self.kept, self.handle.live.drawn):
            held.pop(name, None)
        self.due.discard(name)
        if not self.generators:
            self.disconnect()

    def connect(self) -> None:
        if self.removers or not self.generators:
            return
        me = weakref.ref(self)

        def forward(*_: Any) -> None:
            if steps := me():
                steps.before_forward()

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if steps := me():
                steps.before_step(optimizer)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if steps := me():
                steps.after_step(optimizer)

        self.removers = [
            self.handle.model.register_forward_pre_hook(forward),
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ]

    def disconnect(self) -> None:
        for remover in self.removers:
            remover.remove()
        self.removers = []

    @contextmanager
    def away(self) -> Iterator[None]:
        """Without hooks for a while, so that the model can be copied."""
        self.disconnect()
        try:
            yield
        finally:
            self.connect()

    def before_forward(self) -> None:
        handle = self.handle
        if not handle.model.training or not torch.is_grad_enabled():
            return
        for name in self.live():
            version = self.version(name)
            if name not in self.due and self.versions.get(name, version) != version:
                raise UserError(
                    f"adapter {name!r} changed in an optimizer step that loralab did not see, so its method would "
                    "silently be another: step it with a torch.optim optimizer"
                )
            if name in self.due:
                factors = handle.entries[name].recipe.factors
                assert factors is not None
                handle.live.drawn[name] = factors.draw(self.generators[name])
                self.due.discard(name)
            self.versions[name] = version

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name in self.stepped_by(optimizer):
            factors, layers = self.parts(name)
            self.kept[name] = factors.before_step(layers, self.handle.live.drawn.get(name))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name in self.stepped_by(optimizer):
            factors, layers = self.parts(name)
            factors.after_step(layers, self.handle.live.drawn.pop(name, None), self.kept.pop(name, None))
            self.due.add(name)

    def live(self) -> list[str]:
        return [name for name in self.handle.live.names if name in self.generators]

    def stepped_by(self, optimizer: torch.optim.Optimizer) -> list[str]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name in self.generators if any(id(t) in held for t in self.handle.state(name).values())]

    def parts(self, name: str) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
        entry = self.handle.entries[name]
        return entry.recipe.factors, {path: self.handle.layers[path].roles(name) for path in entry.paths}

    def version(self, name: str) -> int:
        return sum(t._version for t in self.handle.state(name).values() if t.requires_grad)
