"""What does an adapter cost at inference, and one DyLoRA against four LoRAs? `python studies/latency.py`.

minilm, in bfloat16 where the processor multiplies it fast. First a forward pass of one row and of 32, 64 tokens each:
the base alone (a fully tuned model is as large), a merged adapter, and adapters unmerged, as `loralab predict` runs
them. Then a training step of 32 rows with LoRA at ranks 1, 2, 4 and 8, and with DyLoRA, which trains all ranks up to 8.
All take turns, in an order drawn anew each time; medians and quartiles. For a machine that does nothing else.
"""

import argparse
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median, quantiles

import torch

import loralab
from loralab import models
from loralab.cache import Scope
from loralab.fast.machine import precision

ROWS, TOKENS = 32, 64
Work = Callable[[], object]


def batch(rows: int) -> dict[str, torch.Tensor]:
    """Return a batch of full rows with labels."""
    ids = torch.randint(1000, 20000, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def base() -> torch.nn.Module:
    """Return minilm as a classifier, in float32."""
    return models.classifier("minilm", 2, regression=False, dtype=torch.float32, seed=0)[0]


def adapted(method: str, **given) -> tuple[torch.nn.Module, loralab.Adapters]:
    """Return minilm with an adapter whose parameters are off their start, and its handle."""
    model = base()
    handle = loralab.attach(model, method, head=True, **given)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += 0.01 * torch.randn_like(p)
    return model, handle


def inference(rows: int) -> dict[str, Work]:
    """Return a forward pass of each kind of model."""
    work: dict[str, Work] = {}

    given = {key: value for key, value in batch(rows).items() if key != "labels"}

    def add(name: str, model: torch.nn.Module, handle: loralab.Adapters | None = None) -> None:
        kept = Scope()  # what adapters are lowered to, computed once

        def forward() -> None:
            with torch.no_grad(), handle.caching(kept) if handle else nullcontext():
                model(**given)

        model.eval()
        work[name] = forward

    add("base", base().to(precision("auto")))
    for method in ("lora", "dora", "vera"):
        model, handle = adapted(method)
        if method == "lora":
            add("lora, merged", handle.merge().to(precision("auto")))
        handle.fast(quiet=True)
        add(f"{method}, unmerged", model, handle)
    return work


def training() -> dict[str, Work]:
    """Return a training step with LoRA at each rank and with DyLoRA."""
    work: dict[str, Work] = {}
    for name, method, given in [
        *((f"lora r={rank}", "lora", {"rank": rank}) for rank in (1, 2, 4, 8)),
        ("dylora r<=8", "dylora", {"rank": 8}),
    ]:
        model, handle = adapted(method, **given)
        handle.fast(quiet=True)
        optimizer = torch.optim.AdamW(handle.parameter_groups(lr=1e-3, weight_decay=0.01))
        work[name] = partial(_step, model.train(), optimizer, batch(ROWS))
    return work


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, torch.Tensor]) -> None:
    model(**rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(work: dict[str, Work], repeats: int, calls: int) -> dict[str, list[float]]:
    """Return milliseconds a call of each, by repeat; they take turns in an order drawn anew."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name in random.Random(repeat).sample(list(work), len(work)):
            began = time.perf_counter()
            for _ in range(calls):
                work[name]()
            if repeat:  # the first is to warm up
                found[name].append(1000 * (time.perf_counter() - began) / calls)
    return found


def show(title: str, found: dict[str, list[float]], against: str) -> None:
    """Print a table: milliseconds and the ratio to one of the rows, medians and quartiles over repeats."""
    print(f"\n| {title} | ms | times {against} |\n| --- | ---: | ---: |")
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found[against], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(f"| {name} | {median(times):.1f} | {median(ratios):.2f} ({low:.2f}-{high:.2f}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    if given.repeats < 2:
        parser.error(f"--repeats {given.repeats}: expected 2 or more, for quartiles")
    for rows in (1, ROWS):
        show(f"a forward pass of {rows} x {TOKENS}", measure(inference(rows), given.repeats, 96 // rows), "base")
    found = measure(training(), given.repeats, 2)
    show(f"a training step of {ROWS} x {TOKENS}", found, "lora r=8")
    four = sum(median(found[f"lora r={rank}"]) for rank in (1, 2, 4, 8))
    print(f"\nfour LoRA trainings take {four / median(found['dylora r<=8']):.2f} times one DyLoRA training")


if __name__ == "__main__":
    main()
