"""Rows of many adapters in one batch: against one merged adapter, against PEFT's adapter_names, and 1 to 1,000 loaded.

All ratios are of medians of one process, the variants in turn, so that a slow minute hits them alike.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from loralab import fast, models
from loralab.adapters import Adapters, attach
from loralab.bench.backends import FIRST_ID, peft_rank
from loralab.bench.cases import MixedCase
from loralab.cache import Scope

Batch = dict[str, torch.Tensor]
Variant = Callable[[], torch.Tensor]  # one forward pass, its logits
PEFT_METHOD = "lora"  # the only one whose adapters PEFT mixes in a batch
MERGED, PLAIN, PEFT_ONE, PEFT_MIXED = "merged", "merged, plain layers", "PEFT, one adapter", "PEFT, adapter_names"


def measure(case: MixedCase, repeats: int) -> dict[str, Any]:
    """Median seconds of a batch by variant, their ratios, and the largest difference of a row from the row alone."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = base(case).config.vocab_size
    ids = torch.randint(FIRST_ID, vocabulary, (case.batch_size, case.max_length), generator=generator)  # (rows, tokens)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seconds = times(case, batch, repeats)
    return {"seconds": seconds, "ratios": ratios(case, seconds), "largest_difference": largest_difference(case, batch)}


def ratios(case: MixedCase, seconds: dict[str, float]) -> dict[str, float]:
    """Throughput of one variant over that of another."""
    one, mixed, many = (seconds[loaded(count)] for count in (1, case.batch_size, case.loaded))
    found = {
        "mixed over merged": seconds[MERGED] / mixed,
        "mixed over merged on plain layers": seconds[PLAIN] / mixed,
        f"{case.loaded} over 1 loaded": one / many,
        f"{case.loaded} over {case.batch_size} loaded": mixed / many,
    }
    if PEFT_MIXED in seconds:
        found["mixed over PEFT's adapter_names"] = seconds[PEFT_MIXED] / mixed
        found["PEFT's adapter_names over its one adapter"] = seconds[PEFT_ONE] / seconds[PEFT_MIXED]
    return found


def loaded(count: int) -> str:
    """The variant with so many adapters loaded."""
    return f"{count} loaded"


@torch.no_grad()
def times(case: MixedCase, batch: Batch, repeats: int) -> dict[str, float]:
    """Median seconds of a batch by variant. Every adapter is used once before: its first use lowers it."""
    found = dict(variants(case, batch))
    warm = {loaded(count): -(-count // case.batch_size) for count in (1, case.batch_size, case.loaded)}
    for name, run in found.items():
        for _ in range(max(3, warm.get(name, 0))):
            run()
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, run in found.items():
            before = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - before)
    return {name: median(values) for name, values in taken.items()}


def variants(case: MixedCase, batch: Batch) -> Iterator[tuple[str, Variant]]:
    one = with_adapters(case, 1)
    merged = one.merge("a0").requires_grad_(False)
    yield PLAIN, plain(one.merge("a0").requires_grad_(False), batch)
    yield MERGED, plain(prepared(merged, case), batch)
    for count in sorted({1, case.batch_size, case.loaded}):
        adapters = one if count == 1 else with_adapters(case, count)
        prepared(adapters.model, case)
        yield loaded(count), mixed(adapters, batch, case.batch_size)
    if case.method == PEFT_METHOD:
        yield from peft(case, batch).items()


def base(case: MixedCase) -> Any:
    return models.classifier(case.model, 2, False, torch.float32, seed=0)[0]


def with_adapters(case: MixedCase, count: int) -> Adapters:
    """A base with that many adapters, each moved off its start."""
    model = base(case)
    given: dict[str, Any] = {"targets": case.targets, "head": True}
    adapters = attach(model, case.recipe(), name="a0", **given)
    for i in range(1, count):
        adapters.add(f"a{i}", case.recipe(), seed=i, **given)
    with torch.no_grad():
        for name in adapters.names:
            for role, tensor in adapters.tensors(name).values():
                if role != "head":
                    tensor.add_(torch.randn_like(tensor), alpha=0.02)
    model.eval()
    return adapters


def prepared(model: torch.nn.Module, case: MixedCase) -> torch.nn.Module:
    """The model with the fast path, in place."""
    fast.prepare(model, store="bfloat16" if case.precision == torch.bfloat16 else None)
    return model


def mixed(adapters: Adapters, batch: Batch, rows: int) -> Variant:
    """Each call gives the rows the next `rows` of the loaded adapters, starting again after the last.

    What adapters are lowered to is kept between calls, as `loralab predict` does.
    """
    names, scope = itertools.cycle(adapters.names), Scope()
    ids = list(range(rows))

    def run() -> torch.Tensor:
        chosen = list(itertools.islice(names, rows)) if len(adapters.names) >= rows else [adapters.names[0]] * rows
        active = adapters.use(chosen[0]) if len(set(chosen)) == 1 else adapters.use(chosen, ids)
        with active, adapters.caching(scope):
            logits: torch.Tensor = adapters.model(**batch).logits  # (rows, outputs)
        return logits

    return run


def plain(model: torch.nn.Module, batch: Batch) -> Variant:
    return lambda: model(**batch).logits


def peft(case: MixedCase, batch: Batch) -> dict[str, Variant]:
    """PEFT with one adapter, and with an adapter for each row."""
    from peft import LoraConfig, get_peft_model

    suffixes = {path.rpartition(".")[2] for path in with_adapters(case, 1).layers}
    config = LoraConfig(**peft_rank(case), target_modules=list(suffixes), init_lora_weights=False)
    model: Any = get_peft_model(base(case), config, adapter_name="a0").eval()
    for i in range(1, case.batch_size):
        model.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(case.batch_size)]
    return {
        PEFT_ONE: lambda: model(**batch).logits,
        PEFT_MIXED: lambda: model(**batch, adapter_names=names).logits,
    }


@torch.no_grad()
def largest_difference(case: MixedCase, batch: Batch) -> float:
    """The largest difference of a logit of a mixed batch from that of the row alone."""
    adapters = with_adapters(case, case.batch_size)
    prepared(adapters.model, case)
    together, worst = mixed(adapters, batch, case.batch_size)(), 0.0
    for row, name in enumerate(adapters.names):
        with adapters.use(name):
            alone = adapters.model(**{key: t[row : row + 1] for key, t in batch.items()}).logits[0]
        worst = max(worst, float((alone - together[row]).abs().max()))
    return worst
