"""What a training step needs in memory, found by taking one without memory: the very code of a run on fake tensors.

PyTorch's FakeTensorMode gives every operation tensors of the right size and no data. `Meter` sees each storage come and
go, so its highest sum is the peak of a step: what is kept, what is saved for backward, and temporaries.

    from loralab.train.planner import Setup, plan
    plan(Setup(model="minilm", batch=32, length=64)).peak
"""

import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loralab import models, speed
from loralab.attach import HANDLE, Adapters
from loralab.bases import keep
from loralab.errors import UserError
from loralab.optimizers import adamw
from loralab.recipe import Recipe, recipe
from loralab.speed import heap
from loralab.speed.machine import precision
from loralab.train.batches import longest
from loralab.train.memory import Layers, by_layer, held, ledger, saved_by_layer, tensor_bytes

OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # what the registry has no word for -> its like
BESIDE = 20_000_000  # bytes of what is no tensor: products that oneDNN prepared, its scratch (see docs/memory.md)
WARM = 2  # steps
STEPS = 1000  # for methods whose start depends on the length of training; what they need does not


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What decides the memory of a step."""

    model: str = "minilm"
    """A local folder, a hub name, or an alias: minilm, mpnet, smollm2. Its weights are not loaded."""
    method: str = "lora"
    """A row of `loralab methods`."""
    batch: int = 32
    """Rows of one forward pass: the batch size over --accumulate of a run."""
    length: int = 128
    """Tokens of each row, padding included."""
    targets: str = "all-linear"
    """A preset or a regular expression over layer paths, as in `loralab train`."""
    rank: int | None = None
    """Rank r; the method's own by default."""
    store: str | None = None
    """How frozen weights are kept: float32, bfloat16, int8, nf4, nf4-dq or int2; as loaded by default."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products run in; auto: bfloat16 where this machine multiplies it fast."""
    speed: Literal["auto", "off"] = "auto"
    """auto: the fast path, as far as machine and model take it; off: the plain one."""
    labels: int = 2
    """Outputs of the head."""
    checkpointing: bool = False
    """Whether activations within a layer are made anew in backward (`activation_checkpointing_enable`); plain path."""

    def __post_init__(self) -> None:
        least = {"batch": 1, "length": 1, "labels": 1}
        wrong = [f"{k}={getattr(self, k)}: expected {n} or more" for k, n in least.items() if getattr(self, k) < n]
        if wrong:
            raise UserError("; ".join(wrong))

    def recipe(self) -> Recipe:
        given = {key: value for key in ("rank", "store") if (value := getattr(self, key)) is not None}
        return ready(recipe(self.method, **given))

    @property
    def precision(self) -> torch.dtype:
        return precision(self.dtype)


def ready(made: Recipe) -> Recipe:
    """As a run begins with it; without a rank map that is still to be planned."""
    made = made.planned(STEPS)
    return made if made.ranks is not None else replace(made, plan=None)


@dataclass(frozen=True)
class Plan:
    """Bytes that a setup needs."""

    setup: Setup
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


def plan(setup: Setup, made: Recipe | None = None) -> Plan:
    """Of a recipe of one's own, else of the setup's; raises UserError for what a run would refuse too."""
    made = ready(made) if made else setup.recipe()  # its check looks at values
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own copy.deepcopy does
        if made.store:
            keep(nn.Linear(8, 8), made.store)  # its library keeps tables, which later runs want with values
        return _plan(setup, made)


def _plan(setup: Setup, made: Recipe) -> Plan:
    with Sizes(allow_non_fake_inputs=True), Meter() as meter:
        model = models.blank(setup.model, setup.labels)
        _check(model, setup)
        loaded = tensor_bytes([*model.parameters(), *model.buffers()])
        step = Step(model, setup, made)
        for _, t in held(model):
            meter.meet(t)  # shared constants, which are there before
        kept = meter.restart()
        for _ in range(WARM):  # the first leaves the optimizer's state, the second finds its holes
            step(setup)
        layers = by_layer(model, held(model), step.learned, step.optimizer, step.kept)
    loading = loaded + (kept if kept < loaded else 0) + BESIDE
    return Plan(setup, loading, meter.most, _resident(meter, step.heap_kept), meter.products // WARM, layers)


def _resident(meter: "Meter", kept: bool) -> int:
    """Of the tensors that a meter saw: on a GPU PyTorch keeps blocks that fit again (not measured)."""
    held = None if torch.cuda.is_available() else heap.resident(meter.events, kept)
    return (meter.most if held is None else held) + BESIDE


def largest_batch(found: Plan, memory: int) -> int:
    """The largest batch, to 2 %, whose peak is at most `memory` bytes, 0 if none is: memory is nearly linear in it."""
    least = plan(replace(found.setup, batch=1)).peak
    if least > memory:
        return 0
    low, high = 1, sys.maxsize  # one that fits, one that does not
    rows, peak = found.setup.batch, found.peak
    while True:
        low, high = (max(low, rows), high) if peak <= memory else (low, rows)
        if high - low <= max(1, low // 50):
            return low
        each = max(1.0, (peak - least) / max(1, rows - 1))
        rows = min(max(1 + int((memory - least) / each), low + max(1, low // 50)), high - max(1, high // 50))
        rows = max(rows, low + 1)
        peak = plan(replace(found.setup, batch=rows)).peak


class Step:
    """One optimizer step of a run after another, on zeros."""

    def __init__(self, model: nn.Module, setup: Setup, made: Recipe | None = None) -> None:
        handle = Adapters(model)
        if made is not None:  # a plan's
            handle._sha256 = "not known without weights"
        handle.add("plan", made or setup.recipe(), targets=setup.targets, head=True, filled=made is not None)
        setattr(model, HANDLE, handle)
        handle.live.names = ("plan",)
        how = "off" if setup.checkpointing else setup.speed  # the fast path keeps what it keeps
        choices, self.autocast = speed.quicken(model, how, setup.precision)
        self.heap_kept = any(c.piece == "heap" and c.used for c in choices)
        if setup.checkpointing:
            _checkpoint(model, setup.model)
        self.steps = handle.steps
        self.model = model.train()
        self.kept: dict[str, int] = {}
        self.optimizer = adamw(handle.parameter_groups(lr=1e-3), fused=True)
        self.learned = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, setup: Setup) -> None:
        from loralab.train.loop import row_losses

        ids = torch.ones(setup.batch, setup.length, dtype=torch.long)
        labels = torch.zeros(setup.batch, dtype=torch.long if setup.labels > 1 else torch.float32)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # some padding, as in a run
        for name in self.steps.generators:  # nothing is drawn: of many ranks the largest needs most
            self.steps.drawn[name] = max(self.steps.factors(name).ranks, default=None)
        with saved_by_layer(self.model) as self.kept:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                logits = self.model(input_ids=ids, attention_mask=mask).logits
            loss = row_losses(logits.float(), labels).mean()
        del logits
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


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


def _check(model: Any, setup: Setup) -> None:
    most = longest(model)
    if most is not None and setup.length > most:
        raise UserError(f"--length {setup.length}: {setup.model} takes {most} tokens at most")
