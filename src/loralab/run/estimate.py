"""What a training step needs in memory, found by taking one without memory: the very code of a run on fake tensors.

PyTorch's FakeTensorMode gives every operation tensors of the right size and no data. `Meter` sees each storage come and
go, so its highest sum is the peak of a step: what is kept, what is saved for backward, and temporaries.

    from loralab.run.estimate import EstimateSettings, estimate
    estimate(EstimateSettings(model="minilm", batch_size=32, max_length=64)).peak
"""

import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loralab import fast, models
from loralab.adapted import HANDLE
from loralab.adapters import Adapters
from loralab.data.batches import longest
from loralab.errors import UserError
from loralab.fast import heap
from loralab.optimizers import adamw
from loralab.recipe import Recipe
from loralab.run.memory import Layers, by_layer, held, ledger, saved_by_layer, tensor_bytes
from loralab.run.settings import StepSettings
from loralab.run.step import apply_gradients, forward_loss
from loralab.stores import keep

OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # what the registry has no word for -> its like
BESIDE = 20_000_000  # bytes of what is no tensor: products that oneDNN prepared, its scratch (see docs/memory.md)
WARM = 2  # steps
STEPS = 1000  # for methods whose start depends on the length of training; what they need does not


@dataclass(frozen=True, kw_only=True)
class EstimateSettings(StepSettings):
    """What decides the memory of a step; the weights are not loaded. `batch_size` is the rows of one forward pass."""

    labels: int = 2
    """Outputs of the head."""
    checkpointing: bool = False
    """Whether activations within a layer are made anew in backward (`activation_checkpointing_enable`); plain path."""

    def recipe(self) -> Recipe:
        return ready(super().recipe())


def ready(made: Recipe) -> Recipe:
    """As a run begins with it; without a rank map that is still to be planned."""
    made = made.for_steps(STEPS)
    return made if made.ranks is not None else replace(made, policy=None)


@dataclass(frozen=True)
class Estimate:
    """Bytes that a settings needs."""

    settings: EstimateSettings
    loading: int  # the most before the first step: weights as loaded, beside those as kept where that differs
    tensors: int  # the most that tensors take at once during a step, temporaries among them
    training: int  # the most that is resident during a step
    products: int  # operations of a step's products, two for a multiplication and its sum
    layers: Layers

    @property
    def peak(self) -> int:
        return max(self.loading, self.training)

    @property
    def ledger(self) -> dict[str, int]:
        return ledger(self.layers)


def estimate(settings: EstimateSettings, made: Recipe | None = None) -> Estimate:
    """Of a recipe of one's own, else of the settings's; raises UserError for what a run would refuse too."""
    made = ready(made) if made else settings.recipe()  # its check looks at values
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own copy.deepcopy does
        if made.store:
            keep(nn.Linear(8, 8), made.store)  # its library keeps tables, which later runs want with values
        return _estimate(settings, made)


def _estimate(settings: EstimateSettings, made: Recipe) -> Estimate:
    with Sizes(allow_non_fake_inputs=True), Meter() as meter:
        model = models.blank(settings.model, settings.labels)
        _check(model, settings)
        loaded = tensor_bytes([*model.parameters(), *model.buffers()])
        step = Step(model, settings, made)
        for _, t in held(model):
            meter.meet(t)  # shared constants, which are there before
        kept = meter.restart()
        for _ in range(WARM):  # the first leaves the optimizer's state, the second finds its holes
            step(settings)
        layers = by_layer(model, held(model), step.learned, step.optimizer, step.kept)
    loading = loaded + (kept if kept < loaded else 0) + BESIDE
    return Estimate(settings, loading, meter.most, _resident(meter, step.heap_kept), meter.products // WARM, layers)


def _resident(meter: "Meter", kept: bool) -> int:
    """Of the tensors that a meter saw: on a GPU PyTorch keeps blocks that fit again (not measured)."""
    held = None if torch.cuda.is_available() else heap.resident(meter.events, kept)
    return (meter.most if held is None else held) + BESIDE


def largest_batch(found: Estimate, memory: int) -> int:
    """The largest batch, to 2 %, whose peak is at most `memory` bytes, 0 if none is: memory is nearly linear in it."""
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


class Step:
    """One optimizer step of a run after another, on zeros."""

    def __init__(self, model: nn.Module, settings: EstimateSettings, made: Recipe | None = None) -> None:
        handle = Adapters(model)
        if made is not None:  # of an estimate
            handle._sha256 = "not known without weights"
        handle.add("estimate", made or settings.recipe(), targets=settings.targets, head=True, filled=made is not None)
        setattr(model, HANDLE, handle)
        handle.active.names = ("estimate",)
        how = "off" if settings.checkpointing else settings.speed  # the fast path keeps what it keeps
        choices, self.autocast = fast.quicken(model, how, settings.precision)
        self.heap_kept = any(c.piece == "heap" and c.used for c in choices)
        if settings.checkpointing:
            _checkpoint(model, settings.model)
        self.steps = handle.steps
        self.model = model.train()
        self.kept: dict[str, int] = {}
        self.optimizer = adamw(handle.parameter_groups(lr=1e-3), fused=True)
        self.learned = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, settings: EstimateSettings) -> None:
        ids = torch.ones(settings.batch_size, settings.max_length, dtype=torch.long)
        labels = torch.zeros(settings.batch_size, dtype=torch.long if settings.labels > 1 else torch.float32)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # some padding, as in a run
        for name in self.steps.generators:  # nothing is drawn: of many ranks the largest needs most
            self.steps.drawn[name] = max(self.steps.factors(name).ranks, default=None)
        with saved_by_layer(self.model) as self.kept:
            loss = forward_loss(self.model, {"input_ids": ids, "attention_mask": mask}, labels, self.autocast)
        loss.backward()
        apply_gradients(self.optimizer, self.learned, clip=1.0)


class Sizes(FakeTensorMode):
    """Tensors of a size and without data. Asked for a value (a step's number, say) they answer 1, or False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is not torch.bool and 1
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> "Sizes":
        return self  # each tensor has its mode, and a head is copied


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations under it made and that are alive, the most there were at once, and the
    operations of products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.products = 0
        self.alive: dict[int, int] = {}  # storage -> bytes
        self.events: list[heap.Event] = []  # as they came and went

    def restart(self) -> int:
        """From here on, with what is alive now, whose bytes this returns."""
        self.most, self.products, self.events = self.now, 0, list(self.alive.items())
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.meet(t)
        if operations := flop_registry.get(OUT_OF_PLACE.get(func._overloadpacket, func._overloadpacket)):
            self.products += operations(*args, **(kwargs or {}), out_val=out)
        return out

    def meet(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self.alive:
            self.alive[key] = size
            self.events.append((key, size))
            finalize(storage, self._gone, key).atexit = False
            self.now += size
            self.most = max(self.most, self.now)

    def _gone(self, key: int) -> None:
        self.events.append((key, 0))
        self.now -= self.alive.pop(key)


def _checkpoint(model: Any, name: str) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"checkpointing: {name} cannot make its activations anew")
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


def _check(model: Any, settings: EstimateSettings) -> None:
    most = longest(model)
    if most is not None and settings.max_length > most:
        raise UserError(f"--max-length {settings.max_length}: {settings.model} takes {most} tokens at most")
