"""The work that some methods do at every optimizer step, hooked into any training loop; a missing hook is an error.

The draw of a step is made before the model's first training forward of that step; before_step and after_step run around
the step of whichever torch optimizer holds the adapter's parameters.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.methods.base import Factors

WATCHING: "weakref.WeakSet[StepHooks]" = weakref.WeakSet()  # those that hear of every optimizer's step while they live
HOOKS: list[Any] = []  # the one pair of hooks that tells them


def watch(steps: "StepHooks") -> None:
    """The hooks stay once they are there: torch walks over them, so nothing may be taken off when a model is freed."""
    WATCHING.add(steps)
    if not HOOKS:
        HOOKS.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _tell(StepHooks.before_step, optimizer)))
        HOOKS.append(register_optimizer_step_post_hook(lambda optimizer, *_: _tell(StepHooks.after_step, optimizer)))


def _tell(what: Callable[["StepHooks", torch.optim.Optimizer], None], optimizer: torch.optim.Optimizer) -> None:
    for steps in list(WATCHING):
        what(steps, optimizer)


class StepHooks:
    """Hooks of one handle, for its adapters whose factors are `stepped`, and what these keep from step to step."""

    def __init__(self, handle: AdaptedModel) -> None:
        self.handle = handle
        self.generators: dict[str, torch.Generator] = {}  # adapter -> the stream its draws come from
        self.begun: dict[str, Tensor] = {}  # adapter -> state of that stream before the draw of the step under way
        self.drawn: dict[str, Any] = {}  # adapter -> the draw of the step under way; none: its next forward draws
        self.memories: dict[str, dict[str, dict[str, Tensor]]] = {}  # adapter -> path -> what its factors keep
        self.marks: dict[str, tuple[int, list[Tensor]]] = {}  # adapter -> its tensors at the last training forward
        self.seen: set[str] = set()  # adapters whose steps are known to arrive here
        self.under_way: dict[str, tuple[torch.optim.Optimizer, Any]] = {}  # between before_step and after_step
        self.on_model: Any = None

    def add(self, name: str, seed: int) -> None:
        self.generators[name] = torch.Generator().manual_seed(seed)
        self.connect()

    def remove(self, name: str) -> None:
        for held in (self.generators, self.memories, self.handle.active.drawn):
            held.pop(name, None)
        self._anew(name)
        self.seen.discard(name)
        if not self.generators:
            self.disconnect()

    def _anew(self, name: str) -> None:
        """The step under way, if there is one, counts as not begun."""
        for held in (self.begun, self.drawn, self.marks, self.under_way):
            held.pop(name, None)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """The model's hook is a bound method, so a deep copy of the model calls the copy of this object."""
        if self.on_model is None:
            self.on_model = self.handle.model.register_forward_pre_hook(self.before_forward)
        watch(self)

    def disconnect(self) -> None:
        if self.on_model is not None:
            self.on_model.remove()
        self.on_model = None
        WATCHING.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "marks": {}, "under_way": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.on_model is not None:
            watch(self)

    def before_forward(self, *_: Any) -> None:
        handle = self.handle
        handle.active.drawn.clear()
        if not handle.model.training or not torch.is_grad_enabled():
            return
        for name in handle.active.names:
            if name in self.generators:
                self._begin_or_go_on(name)

    def _begin_or_go_on(self, name: str) -> None:
        if name in self.handle.active.chosen:
            raise UserError(f"adapter {name!r} is used at a chosen rank, which is for evaluation: call model.eval()")
        self.under_way.pop(name, None)  # of a step that failed
        if name not in self.drawn:
            self.begun[name] = self.generators[name].get_state()
            self.drawn[name] = self.factors(name).draw(self.generators[name])
        elif self._changed(name):
            raise UserError(
                f"adapter {name!r} changed in an optimizer step that loralab did not see, so its method would "
                "silently be another: step it with a torch.optim optimizer, without a closure"
            )
        self.handle.active.drawn[name] = self.drawn[name]
        self._mark(name)

    def _mark(self, name: str) -> None:
        learned = self.learned(name)
        # writing to t.data leaves no trace in the version, so until a step has arrived here the values count too
        copies = [] if name in self.seen else [t.detach().clone() for t in learned]
        self.marks[name] = sum(t._version for t in learned), copies

    def _changed(self, name: str) -> bool:
        if name not in self.marks:
            return False
        learned, (version, copies) = self.learned(name), self.marks[name]
        return version != sum(t._version for t in learned) or any(
            not torch.equal(t, copy) for t, copy in zip(learned, copies, strict=False)
        )

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in self.generators:
            moved = [t for t in self.learned(name) if t.grad is not None]
            mine = [id(t) in held for t in moved]
            if name in self.under_way or not any(mine):  # an optimizer may wrap another, and may hold other adapters
                continue
            if name not in self.drawn and not any(bool(t.grad.any()) for t in moved):  # type: ignore[union-attr]
                continue
            if getattr(optimizer, "found_inf", None):  # it will skip this step by itself
                self.marks.pop(name, None)
                continue
            self._refuse(name, optimizer, mine)
            kept = self.factors(name).before_step(self.parts(name), self.drawn[name])
            self.under_way[name] = (optimizer, kept)

    def _refuse(self, name: str, optimizer: torch.optim.Optimizer, mine: list[bool]) -> None:
        """Raises UserError for a step that the method of an adapter cannot follow."""
        if not all(mine):
            raise UserError(
                f"this optimizer holds {sum(mine)} of {len(mine)} tensors of adapter {name!r} that have gradients; "
                "its method acts on whole steps: put them all into one optimizer"
            )
        if name not in self.drawn:
            raise UserError(
                f"adapter {name!r} is stepped, but there was no training forward since its last step, so its method "
                "would silently be another: call model.train(), and the adapted model itself, before backward()"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UserError(f"gradients of adapter {name!r} are still scaled: call scaler.unscale_(optimizer) first")

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, (began, kept) in list(self.under_way.items()):
            if began is optimizer:
                self.factors(name).after_step(self.parts(name), self.drawn[name], kept)
                self._anew(name)
                self.handle.active.drawn.pop(name, None)
                self.seen.add(name)

    # ---- what there is of an adapter -----------------------------------------------------------------------------

    def factors(self, name: str) -> Factors:
        factors = self.handle.specs[name].recipe.factors
        assert factors is not None
        return factors

    def learned(self, name: str) -> list[Tensor]:
        """Tensors of its layers that learn; the head is left out, as it may have an optimizer of its own."""
        layers = (self.handle.layers[path] for path in self.handle.specs[name].paths)
        return [t for layer in layers for t in layer.roles(name).values() if t.requires_grad]

    def parts(self, name: str) -> dict[str, dict[str, Tensor]]:
        """path -> role, or key of the factors' memory -> tensor."""
        roles = {path: self.handle.layers[path].roles(name) for path in self.handle.specs[name].paths}
        if name not in self.memories:
            self.memories[name] = {path: self.factors(name).memory(p) for path, p in roles.items()}
        return {path: {**p, **self.memories[name][path]} for path, p in roles.items()}

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """All that the next step depends on beside the adapters' own tensors; a step under way begins anew.

        Of one adapter its own, by keys without its name.
        """
        if name is None:
            return {f"{n}/{key}": t for n in self.generators for key, t in self.state_dict(n).items()}
        if name not in self.generators:
            return {}
        self.parts(name)
        out = {"random": self.begun[name] if name in self.drawn else self.generators[name].get_state()}
        for path, memory in self.memories[name].items():
            out |= {f"{path}/{key}": t for key, t in memory.items()}
        return out

    def load_state_dict(self, state: Mapping[str, Tensor], name: str | None = None) -> None:
        """The inverse of `state_dict`; raises UserError, with nothing changed, for the state of other adapters."""
        mine = self.state_dict(name)
        if wrong := [key for key in mine.keys() | state.keys() if key not in mine or key not in state]:
            told = ", ".join(sorted(wrong)[:4])
            raise UserError(f"the state of the steps is that of other adapters: {len(wrong)} keys differ ({told})")
        if wrong := [key for key, t in mine.items() if t.shape != state[key].shape]:
            raise UserError(f"the state of the steps is that of adapters of another size: {', '.join(wrong[:4])}")
        for key, t in mine.items():
            owner, rest = (name, key) if name is not None else key.split("/", 1)
            if rest == "random":
                self.generators[owner].set_state(state[key].cpu())
                self._anew(owner)
            else:
                t.copy_(state[key])
