"""The work that some methods do at every optimizer step, hooked into any training loop; a missing hook is an error.

The draw of a step is made before the model's first training forward of that step. `before_step` and `after_step` of the
method run around the step of the torch optimizer that holds the adapter's parameters.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loralab.adapted import AdaptedModel
from loralab.errors import UserError
from loralab.methods.base import Factors, whole

KEYS = "loralab_steps/"  # of the state of the steps, beside the parameters of a model in a file of Trainer
LISTENING: "weakref.WeakSet[StepHooks]" = weakref.WeakSet()  # those called at every optimizer's step while they live
REGISTERED: list[Any] = []  # the one pair of torch hooks that calls them


def listen(steps: "StepHooks") -> None:
    """Call `steps` at the steps of all torch optimizers.

    torch's hooks are registered once and stay: torch iterates over them, so none may be removed when a model is freed.
    """
    LISTENING.add(steps)
    if not REGISTERED:
        REGISTERED.append(register_optimizer_step_pre_hook(_before_step))
        REGISTERED.append(
            register_optimizer_step_post_hook(lambda optimizer, *_: _call(StepHooks.after_step, optimizer))
        )


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Run the hooks before a step: now, or after its closure, as the gradients are there only then.

    `args` begins with the optimizer itself. Returns the arguments with a closure that calls the hooks too.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        _call(StepHooks.before_step, optimizer)
        return None

    def then_hooks() -> Any:
        loss = closure()
        _call(StepHooks.before_step, optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": then_hooks}
    return (args[0], then_hooks, *args[2:]), kwargs


def _call(method: Callable[["StepHooks", torch.optim.Optimizer], None], optimizer: torch.optim.Optimizer) -> None:
    for steps in list(LISTENING):
        method(steps, optimizer)


class StepHooks:
    """The hooks of one handle, for its adapters whose method is `stepped`, and their state from step to step."""

    def __init__(self, handle: AdaptedModel) -> None:
        self.handle = handle
        self.generators: dict[str, torch.Generator] = {}  # adapter -> the stream its draws come from
        self.before_draw: dict[str, Tensor] = {}  # adapter -> state of that stream before the draw of the current step
        self.drawn: dict[str, Any] = {}  # adapter -> the draw of the current step; absent: its next forward draws
        self.memories: dict[str, dict[str, dict[str, Tensor]]] = {}  # adapter -> path -> `Factors.memory`
        self.counts: dict[str, tuple[int, int | None]] = {}  # adapter -> its steps, and the version of its counter
        self.marks: dict[str, tuple[int, list[Tensor]]] = {}  # adapter -> its tensors at the last training forward
        self.hooked: set[str] = set()  # adapters with a step that these hooks have seen
        self.current: dict[str, tuple[torch.optim.Optimizer, Any]] = {}  # between before_step and after_step
        self.on_model: Any = None
        self.on_load: Any = None

    def add(self, name: str, seed: int) -> None:
        """Begin to serve a fresh adapter; `seed` decides its draws."""
        self.generators[name] = torch.Generator().manual_seed(seed)
        self.counts[name] = 0, self._counter_version(name)
        self.connect()

    def remove(self, name: str) -> None:
        """Forget an adapter; with the last one the hook on the model goes too."""
        for state in (self.generators, self.memories, self.counts, self.handle.active.drawn):
            state.pop(name, None)
        self._restart_step(name)
        self.hooked.discard(name)
        if not self.generators:
            self.disconnect()

    def _restart_step(self, name: str) -> None:
        """Forget the current step of an adapter, so that its next training forward draws."""
        for state in (self.before_draw, self.drawn, self.marks, self.current):
            state.pop(name, None)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Hook the model. The hook is a bound method, so a deep copy of the model calls the copy of this object."""
        if self.on_model is None:
            self.on_model = self.handle.model.register_forward_pre_hook(self.before_forward)
            self.on_load = self.handle.model.register_load_state_dict_pre_hook(self.before_load)
        listen(self)

    def disconnect(self) -> None:
        """Take the hook off the model."""
        for hook in (self.on_model, self.on_load):
            if hook is not None:
                hook.remove()
        self.on_model = self.on_load = None
        LISTENING.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "marks": {}, "current": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.on_model is not None:
            listen(self)

    def saved(self) -> dict[str, Tensor]:
        """`state_dict` under the keys by which `before_load` finds it among the parameters of a model."""
        return {KEYS + key: whole(t) for key, t in self.state_dict().items()}

    def before_load(self, _model: nn.Module, state: dict[str, Any], *_: Any) -> None:
        """Take the state of the steps out of a state of the model that has it (a hook of the model).

        Raises UserError as `load_state_dict` does.
        """
        if steps := {key: state.pop(key) for key in list(state) if key.startswith(KEYS)}:
            self.load_state_dict({key.removeprefix(KEYS): t for key, t in steps.items()})

    def before_forward(self, *_: Any) -> None:
        """Draw for the active adapters in a training forward; in any other, no draw is in effect."""
        handle = self.handle
        handle.active.drawn = {}
        if not handle.model.training or not torch.is_grad_enabled():
            return
        for name in handle.active.names:
            if name in self.generators:
                self._draw_or_continue(name)

    def _draw_or_continue(self, name: str) -> None:
        if name in self.handle.active.chosen:
            raise UserError(f"adapter {name!r} is used at a chosen rank, which is for evaluation: call model.eval()")
        self.current.pop(name, None)  # of a step that failed
        if name not in self.drawn:
            self.before_draw[name] = self.generators[name].get_state()
            self.drawn[name] = self.factors(name).draw(self.generators[name])
        elif self._changed(name):
            raise UserError(
                f"adapter {name!r} changed in an optimizer step that loralab did not see, so its method would "
                "silently be another: step it with a torch.optim optimizer, whose closure, if it "
                "has one, is called once a step"
            )
        self.handle.active.drawn[name] = self.drawn[name]
        self._mark(name)

    def _mark(self, name: str) -> None:
        """Record the state of an adapter's tensors, to notice a step that is not hooked.

        Writing to t.data leaves no trace in a tensor's version, so until a step was seen here the values are compared.
        """
        learned = self.learned(name)
        copies = [] if name in self.hooked else [t.detach().clone() for t in learned]
        self.marks[name] = sum(t._version for t in learned), copies

    def _changed(self, name: str) -> bool:
        if name not in self.marks:
            return False
        learned, (version, copies) = self.learned(name), self.marks[name]
        return version != sum(t._version for t in learned) or any(
            not torch.equal(t, copy) for t, copy in zip(learned, copies, strict=False)
        )

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Run `Factors.before_step` of the adapters that this optimizer is about to step."""
        in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in self.generators:
            with_gradient = [t for t in self.learned(name) if t.grad is not None]
            held = [id(t) in in_optimizer for t in with_gradient]
            if name in self.current or not any(held):  # an optimizer may wrap another, and may hold other adapters
                continue
            if name not in self.drawn and not any(bool(t.grad.any()) for t in with_gradient):  # type: ignore[union-attr]
                continue
            if getattr(optimizer, "found_inf", None):  # it will skip this step by itself
                self.marks.pop(name, None)
                continue
            self._refuse(name, optimizer, held)
            before = self.factors(name).before_step(self.layers(name), self.drawn[name], self.own(name))
            self.current[name] = (optimizer, before)

    def _refuse(self, name: str, optimizer: torch.optim.Optimizer, held: list[bool]) -> None:
        """Raise UserError for a step that the method of an adapter cannot follow."""
        if not all(held):
            raise UserError(
                f"this optimizer holds {sum(held)} of {len(held)} tensors of adapter {name!r} that have gradients; "
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
        """Run `Factors.after_step` of the adapters that this optimizer has stepped, and count the step."""
        for name, (stepping, before) in list(self.current.items()):
            if stepping is optimizer:
                step = self._count_step(name)
                self.factors(name).after_step(self.layers(name), self.drawn[name], before, step)
                self._restart_step(name)
                self.handle.active.drawn.pop(name, None)
                self.hooked.add(name)

    # ---- steps so far --------------------------------------------------------------------------------------------

    def _counters(self, name: str) -> list[Tensor]:
        """The tensor (1,) of each layer that counts the steps, for a method that keeps one in the adapter file."""
        role = self.factors(name).counter
        layers = (self.handle.layers[path] for path in self.handle.specs[name].paths)
        return [] if role is None else [layer.roles(name)[role] for layer in layers]

    def _counter_version(self, name: str) -> int | None:
        return next((counter._version for counter in self._counters(name)), None)

    def count(self, name: str) -> int:
        """Optimizer steps of an adapter so far.

        The count is kept here, as reading a tensor of the model waits for the device. Only after somebody else wrote to
        the counter of the method, such as a load, is that read.
        """
        count, version = self.counts[name]
        if version != (now := self._counter_version(name)):
            count = int(self._counters(name)[0])
            self.counts[name] = count, now
        return count

    def _count_step(self, name: str) -> int:
        step = self.count(name) + 1
        if counters := self._counters(name):
            with torch.no_grad():
                torch._foreach_add_(counters, 1)
        self.counts[name] = step, self._counter_version(name)
        return step

    # ---- the tensors of an adapter -------------------------------------------------------------------------------

    def factors(self, name: str) -> Factors:
        """The method of an adapter."""
        factors = self.handle.specs[name].recipe.factors
        assert factors is not None
        return factors

    def own(self, name: str) -> dict[str, Factors]:
        """Path -> the method of an adapter in that layer."""
        layers = {path: self.handle.layers[path] for path in self.handle.specs[name].paths}
        return {path: layer.recipes[name].factors for path, layer in layers.items()}  # type: ignore[misc]

    def learned(self, name: str) -> list[Tensor]:
        """The tensors of its layers that learn; without the head, which may have an optimizer of its own."""
        layers = (self.handle.layers[path] for path in self.handle.specs[name].paths)
        return [t for layer in layers for t in layer.roles(name).values() if t.requires_grad]

    def layers(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Path -> role, or key of the method's memory -> tensor."""
        roles = {path: self.handle.layers[path].roles(name) for path in self.handle.specs[name].paths}
        if name not in self.memories:
            self.memories[name] = {path: self.factors(name).memory(p) for path, p in roles.items()}
        return {path: {**p, **self.memories[name][path]} for path, p in roles.items()}

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """All that the next step depends on beside the adapters' own tensors; an unfinished step will start anew.

        With a name, the state of that adapter alone, by keys without its name.
        """
        if name is None:
            return {f"{n}/{key}": t for n in self.generators for key, t in self.state_dict(n).items()}
        if name not in self.generators:
            return {}
        self.layers(name)
        random = self.before_draw[name] if name in self.drawn else self.generators[name].get_state()
        state = {"random": random, "steps": torch.tensor(self.count(name))}
        for path, memory in self.memories[name].items():
            state |= {f"{path}/{key}": t for key, t in memory.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], name: str | None = None) -> None:
        """The inverse of `state_dict`; raises UserError, with nothing changed, for the state of other adapters."""
        own = self.state_dict(name)
        if wrong := [key for key in own.keys() | state.keys() if key not in own or key not in state]:
            some = ", ".join(sorted(wrong)[:4])
            raise UserError(f"the state of the steps is that of other adapters: {len(wrong)} keys differ ({some})")
        if wrong := [key for key, t in own.items() if t.shape != state[key].shape]:
            raise UserError(f"the state of the steps is that of adapters of another size: {', '.join(wrong[:4])}")
        for key, t in own.items():
            owner, rest = (name, key) if name is not None else key.split("/", 1)
            if rest == "random":
                self.generators[owner].set_state(state[key].cpu())
                self._restart_step(owner)
            elif rest == "steps":
                self.counts[owner] = int(state[key]), self._counter_version(owner)
            else:
                t.copy_(state[key])
