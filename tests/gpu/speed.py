"""Is it fast, and how many adapters at once: steps, batches and an epoch, against PEFT and full fine-tuning."""

import importlib.util
import itertools
import statistics
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from laws import flat, off
from models import BF16, DEVICE, FLOAT, GPU, TOY, free, fresh, inputs, shake, timed
from torch.nn import functional as F

from loralab import attach, fast, models
from loralab.cache import Scope, caching
from loralab.errors import UserError
from loralab.fast.layers import layers_of
from loralab.objectives import vocabulary

JOBS = {  # job -> method, rank, how the names of adapted layers end
    "lora r8 q,v": ("lora", 8, ("query", "value", "q_proj", "v_proj")),
    "lora r16 all": ("lora", 16, ""),
    "dora r16 all": ("dora", 16, ""),
    "vera r256 all": ("vera", 256, ""),
}
SIDES = ("full", "PEFT autocast", "PEFT bf16", "PEFT bf16 autocast", "plain", "held", "fast", "block")
LOSSES = ("PEFT bf16", "fast", "fast pieces", "PEFT bf16 liger", "fast liger")  # of a decoder: who computes its loss


def compared(makers: dict[str, Callable[[], Callable[[], Any]]]) -> dict[str, Any]:
    """Milliseconds of each call, the median of alternating turns, and GB at its peak, what others hold left out."""
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    sides: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            free()
            before, call = torch.cuda.memory_allocated(), make()  # 0 without a GPU
            took = min(timed(call, 1) for _ in range(3))
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            timed(call, 1)
            sides[name] = {"GB": (torch.cuda.max_memory_allocated() - before) / 1e9, "turns": []}
            calls[name] = (call, max(1, min(10, int(0.2 / took))))
        except Exception:
            sides[name] = {"error": traceback.format_exc()}
    for turn in range(2 if TOY else 6):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            sides[name]["turns"].append(1e3 * timed(*calls[name]))
    for name in calls:
        sides[name]["ms"] = statistics.median(sides[name]["turns"])
    return {"sides": sides}


def with_peft(model: Any, method: str, rank: int, paths: list[str], head: bool) -> Any:
    """The model with PEFT's adapter on these layers."""
    import peft

    kind: Any = partial(peft.LoraConfig, lora_alpha=16, use_dora=method == "dora")
    if method == "vera":
        kind = peft.VeraConfig
    config = kind(r=rank, target_modules=paths, modules_to_save=["classifier"] if head else None)
    return peft.get_peft_model(model, config).to(DEVICE)


def side(name: str, shape: str, method: str, rank: int, ends: Any) -> tuple[Any, bool]:
    """(model, whether its forward pass runs under autocast) of one way to do a job; all adapt the same layers."""
    model, head = fresh(shape, BF16 if name.startswith("PEFT bf16") else FLOAT), shape != "llama-1b"
    inner = [path for path, m in model.base_model.named_modules() if type(m) is torch.nn.Linear and path.endswith(ends)]
    paths = [f"{model.base_model_prefix}.{path}" for path in inner]
    if name.endswith("liger"):
        with_liger(model)
    if not head:
        vocabulary.prepare(model)
    if name == "full":
        return model, True
    if name.startswith("PEFT"):
        return with_peft(model, method, rank, paths, head), "autocast" in name
    attach(model, method, rank=rank, targets=paths, head=head)
    if name == "plain":
        return model, True
    if name == "held":
        fast.prepare(model, "off", "bfloat16")
        return model, False
    choices = fast.enable(model, BF16, "compile" if name == "compile" else "auto")
    if name == "block":  # what the rule by device leaves out
        for layer in layers_of(model):
            layer.forward._why_not_on = lambda *_: None
    return model, choices.autocast


def with_liger(model: Any) -> None:
    """liger-kernel's loss, which never makes the logits, and nothing else of it."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    rest = dict.fromkeys(("rope", "cross_entropy", "rms_norm", "swiglu"), False)
    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, **rest)


def in_pieces(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of the next tokens as `loralab train` computes it, on a few hundred tokens at a time."""
    at = torch.ones_like(ids[:, 1:]).nonzero(as_tuple=True)  # (n,), (n,): every token but the last of a row
    return vocabulary.likelihoods(model, {"input_ids": ids}, at, ids[:, 1:].flatten())[0].mean()


def loss_of(
    model: Any,
    autocast: bool,
    batch: dict[str, torch.Tensor],
    use: AbstractContextManager[Any],
    runs: int,
    pieces: bool = False,
) -> torch.Tensor:
    """The sum of the mean losses of as many runs, each an equal part of the batch."""
    with use, torch.autocast(DEVICE.type, BF16, enabled=autocast):
        if pieces:
            return in_pieces(model, batch["input_ids"])
        out = model(**batch)
    if runs == 1:
        return out.loss
    return F.cross_entropy(out.logits.float(), batch["labels"], reduction="none").view(runs, -1).mean(1).sum()


def training(
    model: Any,
    autocast: bool,
    batch: dict[str, torch.Tensor],
    learns: list[torch.Tensor] | None = None,
    use: Callable[[], AbstractContextManager[Any]] = nullcontext,
    runs: int = 1,
    pieces: bool = False,
) -> Callable[[], None]:
    """A function that takes one step of as many runs: forward, backward, clipping, AdamW."""
    model.train()
    params = [p for p in model.parameters() if p.requires_grad] if learns is None else learns
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def step() -> None:
        loss_of(model, autocast, batch, use(), runs, pieces).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def job(shape: str, name: str, sides: tuple[str, ...]) -> dict[str, Any]:
    """A training step of one job, on each side; without liger-kernel what needs it is left out."""
    batch = inputs(shape)
    sizes = {"rows, tokens": list(batch["input_ids"].shape)}
    if not importlib.util.find_spec("liger_kernel"):
        sides = tuple(s for s in sides if not s.endswith("liger"))

    def made(s: str) -> Callable[[], None]:
        return training(*side(s, shape, *JOBS[name]), batch, pieces=s.endswith("pieces"))

    return sizes | compared({s: partial(made, s) for s in sides})


# ---- 3. how many at once ---------------------------------------------------------------------------------------------


def many(count: int) -> tuple[Any, Any, list[str]]:
    """(adapters, model, names) of a base with as many adapters."""
    settings = {"rank": 8, "targets": "attention-qv", "head": True}
    adapters = attach(fresh("roberta-base").eval(), name="run0", **settings)
    for i in range(1, count):
        adapters.add(f"run{i}", seed=i, **settings)
    for name in adapters.names:
        shake(adapters, name)
    return adapters, adapters.model, adapters.names


def together(count: int, rows: int) -> dict[str, Any]:
    """A step of as many runs of LoRA: all in one pass, one after the other, and one after the other with PEFT."""
    adapters, model, names = many(count)
    fast.enable(model, BF16)
    parts = [inputs("roberta-base", rows, seed) for seed in range(count)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    use = partial(adapters.use, names, torch.arange(count).repeat_interleave(rows))
    learns = [[t for t in adapters.state(name).values() if t.requires_grad] for name in names]

    def gradient(*arguments: Any) -> torch.Tensor:
        return flat(torch.autograd.grad(loss_of(model, False, *arguments), learns[-1]))  # of the last run

    error = off(gradient(whole, use(), count), gradient(parts[-1], adapters.use(names[-1]), 1))
    each = [
        training(model, False, part, own, partial(adapters.use, name))
        for part, own, name in zip(parts, learns, names, strict=True)
    ]

    def with_peft() -> Callable[[], None]:
        return training(*side("PEFT bf16 autocast", "roberta-base", *JOBS["lora r8 q,v"]), parts[0])

    def in_turn(steps: list[Callable[[], None]]) -> Callable[[], Any]:
        return lambda: [step() for step in steps]

    return {"error of a run's gradient": error} | compared(
        {
            "one pass": lambda: training(model, False, whole, list(itertools.chain(*learns)), use, count),
            "in turn": lambda: in_turn(each),
            "PEFT in turn": lambda: in_turn([with_peft()] * count),
        }
    )


def serving(count: int) -> dict[str, Any]:
    """A batch whose rows have an adapter each, against one merged adapter; nothing changes between batches."""
    adapters, model, names = many(count)
    merged, batch, scope = adapters.merge("run0").requires_grad_(False), inputs("roberta-base", count), Scope()
    fast.prepare(merged, store="bfloat16")
    fast.prepare(model, store="bfloat16")

    def answer(model: Any, use: Callable[[], AbstractContextManager[Any]] = nullcontext) -> torch.Tensor:
        with torch.no_grad(), caching(scope), use():
            return model(batch["input_ids"], batch["attention_mask"]).logits

    each = partial(adapters.use, names, list(range(count)))
    return compared({"merged": lambda: partial(answer, merged), "one each": lambda: partial(answer, model, each)})


# ---- 4. a whole epoch ------------------------------------------------------------------------------------------------

EPOCHS_OF = {  # side -> whose loop, method, runs that share passes
    "full in Trainer": ("peft", "full", 1),
    "PEFT in Trainer": ("peft", "lora", 1),
    "loralab": ("loralab", "lora", 1),
    "loralab, 16 in one pass": ("loralab", "lora", 16),
}


def cola(data: Path) -> dict[str, Any]:
    """An epoch of CoLA on minilm, twice on each side; milliseconds are for 1,000 rows, by the faster of the two."""
    from loralab.bench.cases import EpochCase  # these need more packages than the other parts
    from loralab.bench.epoch import EPOCHS

    try:
        found = models.resolve("minilm")
    except UserError as error:
        return {"left out": str(error)}
    if not (data / "cola").is_dir():
        return {"left out": f"no CoLA in {data}"}
    rows = 64 if TOY else None
    settings = {"task": "cola", "model": str(found), "data": data, "train_rows": rows, "max_length": 128}
    sides: dict[str, dict[str, Any]] = {name: {"turns": []} for name in EPOCHS_OF}
    for turn in range(2):
        for name in list(sides) if turn else list(sides)[::-1]:
            loop, method, runs = EPOCHS_OF[name]
            free()
            before = torch.cuda.memory_allocated()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            count, seconds = EPOCHS[loop](EpochCase(**settings, method=method, together=runs))
            sides[name]["turns"].append(1e6 * seconds / count)
            sides[name]["GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return {"sides": {name: side | {"ms": min(side["turns"])} for name, side in sides.items()}}
