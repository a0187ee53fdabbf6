"""Estimate the memory of a training step by taking one on fake tensors, with the code of a real run.

PyTorch's FakeTensorMode gives every operation tensors of the right size without data. `Meter` sees each storage come
and go. The highest sum is the peak of a step: weights and optimizer, what is saved for backward, and temporaries.

    from loralab.run.estimate import EstimateSettings, estimate
    estimate(EstimateSettings(model="minilm", batch_size=32, max_length=64)).peak
"""

import sys
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loralab import fast, models, objectives
from loralab.adapted import HANDLE
from loralab.adapters import Adapters
from loralab.errors import UserError
from loralab.fast import heap
from loralab.optimizers import adamw
from loralab.recipe import Recipe
from loralab.run.memory import Layers, by_layer, held, ledger, saved_by_layer, tensor_bytes
from loralab.run.settings import Settings, StepSettings
from loralab.run.setup import check_length, recompute
from loralab.run.step import apply_gradients, forward_loss
from loralab.stores import keep

OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # operations that flop_registry lacks -> one it has
NO_TENSORS = 20_000_000  # bytes besides tensors: what oneDNN prepares for products (see docs/memory.md)
WARM = 2  # steps taken
STEPS = 10**9  # of the run, for methods whose schedule depends on its length; their memory does not


@dataclass(frozen=True, kw_only=True)
class EstimateSettings(StepSettings):
    """The settings that decide the memory of a step; weights are not loaded. `batch_size` is of a forward pass."""

    labels: int = 2
    """Outputs of a new head."""
    objective: str = "classification"
    """Kind of task, which decides the model class and the loss."""

    @classmethod
    def of_run(cls, settings: Settings, labels: int, objective: str, rows: int, width: int) -> "EstimateSettings":
        """Those of a step of a run with `rows` sequences of `width` tokens in a forward pass."""
        return cls(
            **{f.name: getattr(settings, f.name) for f in fields(StepSettings)}
            | {
                "batch_size": rows,
                "max_length": width,
                "speed": "off" if settings.speed == "compile" else settings.speed,
                "dtype": str(settings.precision).removeprefix("torch."),
            },
            labels=labels,
            objective=objective,
        )

    def recipe(self) -> Recipe:
        """Make the recipe as a run begins with it. Raises UserError."""
        return ready(super().recipe())


def ready(recipe: Recipe) -> Recipe:
    """Return a recipe as a run begins with it. A policy that has made no rank map yet is left out."""
    recipe = recipe.for_steps(STEPS)
    return recipe if recipe.ranks is not None else replace(recipe, policy=None)


@dataclass(frozen=True)
class Estimate:
    """Bytes that a training step needs."""

    settings: EstimateSettings
    loading: int  # peak before the first step: weights as loaded, and as stored where that differs
    tensors: int  # peak of all tensors during a step, temporaries included
    training: int  # peak of resident memory during a step
    products: int  # floating-point operations of the products of a step
    layers: Layers

    @property
    def peak(self) -> int:
        """The most that is resident while loading or training."""
        return max(self.loading, self.training)

    @property
    def ledger(self) -> dict[str, int]:
        """Bytes by purpose."""
        return ledger(self.layers)


def estimate(settings: EstimateSettings, recipe: Recipe | None = None) -> Estimate:
    """Estimate the memory of a step, of `recipe` if it is given. Raises UserError for what a run would refuse too."""
    recipe = ready(recipe) if recipe else settings.recipe()  # outside the fake mode: its check looks at values
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own copy.deepcopy does
        if recipe.store:
            keep(nn.Linear(8, 8), recipe.store)  # its library caches tables, which later runs need with values
        try:
            return _estimate(settings, recipe)
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            what = f"batch_size={settings.batch_size} with max_length={settings.max_length}"
            raise UserError(f"{what}: a tensor would have more bytes than 64 bits can count") from error


def _estimate(settings: EstimateSettings, recipe: Recipe) -> Estimate:
    with Sizes(allow_non_fake_inputs=True), Meter() as meter:
        objective = objectives.OBJECTIVES[settings.objective]
        model = models.blank(settings.model, settings.labels if objective.new_head else None, objective.task_type)
        objective.prepare(model)
        check_length(model, settings)
        loaded = tensor_bytes([*model.parameters(), *model.buffers()])
        step = BlankStep(model, settings, recipe)
        for _, t in held(model):
            meter.count(t)  # shared constants, which exist already
        stored = meter.restart()
        for _ in range(WARM):  # the first step makes the optimizer's state, the second finds the heap as it stays
            step(settings)
        layers = by_layer(model, held(model), step.learned, step.optimizer, step.activations)
    loading = loaded + (stored if stored < loaded else 0) + NO_TENSORS
    return Estimate(settings, loading, meter.most, _resident(meter, step.heap_kept), meter.products // WARM, layers)


def _resident(meter: "Meter", heap_kept: tuple[bool, bool]) -> int:
    """Return the peak of resident memory for the tensors that a meter saw (on a GPU, not measured, of the tensors)."""
    resident = None if torch.cuda.is_available() else heap.resident(meter.events, *heap_kept)
    return (meter.most if resident is None else resident) + NO_TENSORS


def largest_batch(found: Estimate, memory: int) -> int:
    """Return the largest batch, within 2 %, whose peak is at most `memory` bytes, or 0 if even one row needs more.

    The search starts from the estimate `found` and uses that memory is nearly linear in the batch.
    """
    least = estimate(replace(found.settings, batch_size=1)).peak
    if least > memory:
        return 0
    low, high = 1, sys.maxsize  # one that fits, one that does not
    rows, peak = found.settings.batch_size, found.peak
    while True:
        low, high = (max(low, rows), high) if peak <= memory else (low, rows)
        if high - low <= max(1, low // 50):
            return low
        each = max(1.0, (peak - least) / max(1, rows - 1))
        rows = min(max(1 + int((memory - least) / each), low + max(1, low // 50)), high - max(1, high // 50))
        rows = max(rows, low + 1)
        peak = estimate(replace(found.settings, batch_size=rows)).peak


class BlankStep:
    """A run without data: each call takes an optimizer step on constant inputs."""

    def __init__(self, model: nn.Module, settings: EstimateSettings, recipe: Recipe | None = None) -> None:
        self.objective = objectives.OBJECTIVES[settings.objective]
        fake = recipe is not None  # an estimate passes the recipe that it has checked
        handle = Adapters(model)
        if fake:
            handle._sha256 = "not known without weights"
        handle.add(
            "estimate", recipe or settings.recipe(), **settings.chosen_layers, head=self.objective.new_head, filled=fake
        )
        setattr(model, HANDLE, handle)
        handle.active.activate("estimate")
        choices = fast.enable(model, settings.precision, settings.path)
        self.autocast = choices.autocast
        self.heap_kept = any(c.piece == "heap" and c.used for c in choices), fast.keeps_large(model)
        if settings.checkpointing:
            recompute(model, settings.model)
        self.steps = handle.steps
        self.model = model.train()
        self.activations: dict[str, int] = {}  # by layer
        self.optimizer = adamw(handle.parameter_groups(lr=1e-3), fused=True)
        self.learned = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, settings: EstimateSettings) -> None:
        ids = torch.ones(settings.batch_size, settings.max_length, dtype=torch.long)  # (b, t)
        labels = self.objective.blank(settings.batch_size, settings.labels)  # (rows, ...)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # some padding, as in a run
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.objective.task_type != "SEQ_CLS":
            batch["labels"] = torch.zeros_like(ids)
        for name in self.steps.generators:  # draw nothing: of many ranks the largest needs most
            self.steps.drawn[name] = max(self.steps.factors(name).ranks, default=None)
        with saved_by_layer(self.model) as self.activations:
            loss = forward_loss(self.model, self.objective, batch, labels, len(ids), self.autocast)
        loss.backward()
        apply_gradients(self.optimizer, self.learned, clip=1.0)


class Sizes(FakeTensorMode):
    """Tensors with a size and without data. Asked for a value (the number of a step, say) they answer 1, or False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is not torch.bool and 1
        if func is torch.ops.aten.nonzero.default:  # as if all were
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> "Sizes":
        return self  # each tensor has its mode, and a head is copied


class Meter(TorchDispatchMode):
    """Counts the bytes of living storages that operations under it made, their peak, and the operations of products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.products = 0
        self.alive: dict[int, int] = {}  # storage -> bytes
        self.events: list[heap.Event] = []  # (storage, bytes) when one is made, (storage, 0) when it is freed

    def restart(self) -> int:
        """Forget peak and past events; return the bytes that are alive."""
        self.most, self.products, self.events = self.now, 0, list(self.alive.items())
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.count(t)
        if operations := flop_registry.get(OUT_OF_PLACE.get(func._overloadpacket, func._overloadpacket)):
            self.products += operations(*args, **(kwargs or {}), out_val=out)
        return out

    def count(self, t: Tensor) -> None:
        """Count the storage of a tensor from now until it is freed."""
        storage = t.untyped_storage()
        key, size = self.key(storage), storage.nbytes()
        if size and key not in self.alive:
            self.alive[key] = size
            self.events.append((key, size))
            finalize(storage, self._gone, key).atexit = False
            self.now += size
            self.most = max(self.most, self.now)

    def key(self, storage: torch.UntypedStorage) -> int:
        """What a storage is known by."""
        return int(storage._cdata)

    def _gone(self, key: int) -> None:
        self.events.append((key, 0))
        self.now -= self.alive.pop(key)
