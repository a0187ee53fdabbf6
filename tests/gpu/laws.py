"""Is it right: what a method computes on the GPU, against the CPU and against itself by another way."""

import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import transformers as hf
from models import BF16, DEVICE, GPU, adapted, build, shake
from torch.nn import functional as F

from loralab import fast, load, recipe
from loralab.optimizers import adamw

METHODS = ("lora", "rslora", "dora", "vera", "lora-fa", "dylora", "delta-lora", "adalora", "pissa", "lokr", "superlora")
ENCODERS = ("bert", "roberta")


def logits(model: Any, rows: slice = slice(None), use: AbstractContextManager[Any] | None = None) -> torch.Tensor:
    """The logits (6, 3) of a batch with padding, or of some of its rows."""
    ids = torch.randint(5, 101, (6, 16), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(16) < 16 - 3 * (ids[:, :1] % 2)).long()
    with use or nullcontext():
        return model(input_ids=ids[rows].to(model.device), attention_mask=mask[rows].to(model.device)).logits


def backward(out: torch.Tensor) -> None:
    """Backward from the logits of `logits`."""
    F.cross_entropy(out.float(), torch.tensor([0, 1, 2, 2, 1, 0], device=out.device)).backward()


def learned(model: Any, adapters: Any, autocast: bool = False) -> tuple[torch.Tensor, ...]:
    """(logits, gradients, what a step of SGD at rate 1 adds to the adapter) of a training pass."""
    with torch.autocast(model.device.type, BF16, enabled=autocast):
        out = logits(model.train())
    backward(out)
    state = adapters.state("a").values()
    gradients, before = flat(t.grad for t in state if t.grad is not None), flat(state)
    torch.optim.SGD(adapters.parameter_groups(lr=1.0)).step()
    return out, gradients, flat(state) - before


def flat(tensors: Any) -> torch.Tensor:
    """All values as one vector in float64 on the CPU."""
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])


def off(found: Any, expected: Any) -> float:
    """Relative error; what is not finite, or nothing at all, counts as 1e9."""
    found, expected = flat([found]), flat([expected])
    return float(((found - expected).norm() / expected.norm()).nan_to_num(1e9, 1e9))


def worst(found: Any, expected: Any) -> float:
    """The largest relative error among pairs of tensors."""
    return max(map(off, found, expected))


def mixed(model: Any, adapters: Any, store: str | None, quick: torch.dtype | None = None) -> float:
    """Rows that use two adapters, in one batch against each alone."""
    adapters.add("b", "rslora", rank=5, head=True, store=store)
    shake(adapters, "b")
    ids = [1, 0, 0, 1, 0, 1]
    alone = [logits(model, slice(i, i + 1), adapters.use("ab"[k])) for i, k in enumerate(ids)]
    if quick:
        fast.enable(model, quick)
    return off(logits(model, use=adapters.use(["a", "b"], ids=ids)), torch.cat(alone))


def resumed(start: Callable[[], tuple[Any, Any]], plain: Callable[[], Any]) -> float:
    """The second of two steps, from a file of the adapter and the optimizer's state, against two steps in one go."""

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        backward(logits(model.train()))
        optimizer.step()

    def momentum(adapters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(adapters.parameter_groups(lr=0.1), momentum=0.9)

    model, adapters = start()
    optimizer = momentum(adapters)
    step(model, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(folder)
        torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
        step(model, optimizer)
        again = load(plain(), folder)
        optimizer = momentum(again)
        optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt"))
    step(again.model, optimizer)
    return off(flat(again.state("a").values()), flat(adapters.state("a").values()))


def filed(model: Any, adapters: Any, plain: Callable[[], Any]) -> float:
    """A saved and loaded adapter against itself."""
    with tempfile.TemporaryDirectory() as folder:
        return off(logits(model), logits(load(plain(), adapters.save(folder)).model))


@cache
def on_cpu(kind: str, method: str, store: str | None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """(logits, `learned`) in float32 on the CPU."""
    model, adapters = adapted(kind, method, "cpu", store=store)
    return logits(model).detach(), tuple(t.detach() for t in learned(model, adapters))


def gains_of_zero(made: tuple[Any, Any], quick: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """`learned` of an adapter whose first gains are 0 and 1e-3."""
    model, adapters = made
    for role, t in adapters.tensors("a").values():
        if role == "m":
            t.data[:4] = 0
            t.data[4:8] *= 1e-3
    if quick:
        fast.enable(model, quick)
    return learned(model, adapters)


def paged(kind: str) -> dict[str, Any]:
    """A step of paged AdamW on 4-bit weights against torch's AdamW."""
    if not (GPU and hf.utils.is_bitsandbytes_available()):
        return {"left out": "needs a GPU and bitsandbytes"}
    states = []
    for pages in (False, True):
        model, adapters = adapted(kind, "qlora", DEVICE)
        optimizer = adamw(adapters.parameter_groups(lr=1e-2), paged=pages)
        before = flat(adapters.state("a").values())
        backward(logits(model.train()))
        optimizer.step()
        states.append(flat(adapters.state("a").values()) - before)
    return judged({"paged AdamW": lambda: off(*states)}, 1e-3)


def laws(kind: str, method: str, dtype: torch.dtype, store: str | None = None) -> dict[str, Any]:
    """check -> relative error and whether it is small, or a traceback. The CPU's side is always float32."""
    if store and not hf.utils.is_bitsandbytes_available():
        return {"left out": "no bitsandbytes"}
    factors, narrow = recipe(method).factors, dtype == BF16
    here = partial(on_cpu, kind, method, store)
    there = partial(adapted, kind, method, DEVICE, dtype, store)
    quick = partial(adapted, kind, method, DEVICE, store=store, quick=dtype)

    def plain() -> Any:
        return build(kind, dtype).to(DEVICE)

    def merged() -> float:
        model, adapters = there()
        return off(logits(adapters.merge("a")), logits(model))

    checks: dict[str, Callable[[], float]] = {
        "merged": merged,
        "as CPU": lambda: worst(learned(*there()), here()[1]),
        "moved": lambda: off(logits(there(moved=True)[0]), here()[0]),
        "mixed": lambda: mixed(*there(), store),
        "file": lambda: filed(*there(), plain),
        "fast": lambda: worst(learned(*quick()), here()[1]),
    }
    if not store:
        checks["fresh"] = lambda: off(logits(there(moves=0)[0]), logits(plain()))
    if kind in ENCODERS and not store:
        checks["mixed, fast"] = lambda: mixed(*there(), store, quick=dtype)
    if narrow:
        checks["autocast"] = lambda: worst(learned(*quick(), autocast=True), here()[1])
    elif not (store or factors is None or factors.stepped):
        checks["resumed"] = lambda: resumed(there, plain)
    if method == "dora" and not store:
        checks["gain 0"] = lambda: worst(gains_of_zero(there(), dtype), gains_of_zero(adapted(kind, method, "cpu")))
    return judged(checks, 8e-2 if narrow else 1e-4)


def judged(checks: dict[str, Callable[[], float]], limit: float) -> dict[str, Any]:
    """check -> its value and whether it is within the limit, or its traceback."""
    out: dict[str, Any] = {}
    for name, check in checks.items():
        try:
            out[name] = {"value": (value := check()), "ok": value <= limit}
        except Exception:
            out[name] = {"ok": False, "error": traceback.format_exc()}
    return {"checks": out, "limit": limit}
