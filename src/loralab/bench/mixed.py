"""Rows of many adapters in one batch: against one merged adapter, against PEFT's adapter_names, and 1 to 1,000 loaded.

    python -m loralab.bench.mixed --model minilm

All ratios are of medians of one process, the variants in turn, so that a slow minute hits them alike.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import loralab
from loralab import fast, models
from loralab.adapters import Adapters

Batch = dict[str, torch.Tensor]
Variant = Callable[[], torch.Tensor]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--targets", default="attention-qv")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="of a batch, an adapter each")
    parser.add_argument("--tokens", type=int, default=32, help="of a row")
    parser.add_argument("--loaded", type=int, default=1000, help="adapters in the largest case")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--bfloat16", action="store_true", help="keep and compute the base in it")
    parser.add_argument("--no-peft", action="store_true")
    return parser.parse_args()


def fresh(args: argparse.Namespace) -> torch.nn.Module:
    model: torch.nn.Module = models.classifier(args.model, 2, False, torch.float32, seed=0)[0]
    return model


def worn(args: argparse.Namespace, count: int) -> Adapters:
    """A base with that many adapters, each off its start."""
    model = fresh(args)
    settings = {"rank": args.rank, "targets": args.targets, "head": True}
    adapters = loralab.attach(model, args.method, name="a0", **settings)
    for i in range(1, count):
        adapters.add(f"a{i}", args.method, seed=i, **settings)
    with torch.no_grad():
        for name in adapters.names:
            for role, tensor in adapters.tensors(name).values():
                if role != "head":
                    tensor.add_(torch.randn_like(tensor), alpha=0.02)
    model.eval()
    return adapters


def prepared(model: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    fast.prepare(model, store="bfloat16" if args.bfloat16 else None)
    return model


def mixed(adapters: Adapters, batch: Batch, rows: int) -> Variant:
    """Each call takes the next `rows` of the loaded adapters, around and around."""
    names = itertools.cycle(adapters.names)
    ids = list(range(rows))

    def run() -> torch.Tensor:
        chosen = list(itertools.islice(names, rows)) if len(adapters.names) >= rows else [adapters.names[0]] * rows
        live = adapters.use(chosen[0]) if len(set(chosen)) == 1 else adapters.use(chosen, ids)
        with live:
            logits: torch.Tensor = adapters.model(**batch).logits
        return logits

    return run


def plain(model: torch.nn.Module, batch: Batch) -> Variant:
    return lambda: model(**batch).logits


def peft(args: argparse.Namespace, batch: Batch) -> dict[str, Variant]:
    """PEFT with one adapter, and with one of `rows` for each row."""
    from peft import LoraConfig, get_peft_model

    suffixes = tuple({path.rpartition(".")[2] for path in worn(args, 1).layers})
    config = LoraConfig(r=args.rank, lora_alpha=16, target_modules=list(suffixes), init_lora_weights=False)
    model: Any = get_peft_model(fresh(args), config, adapter_name="a0").eval()
    for i in range(1, args.rows):
        model.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(args.rows)]
    return {
        "PEFT, one adapter": lambda: model(**batch).logits,
        "PEFT, adapter_names": lambda: model(**batch, adapter_names=names).logits,
    }


def variants(args: argparse.Namespace, batch: Batch) -> Iterator[tuple[str, Variant]]:
    one = worn(args, 1)
    merged = one.merge("a0").requires_grad_(False)
    yield "merged, plain layers", plain(one.merge("a0").requires_grad_(False), batch)
    yield "merged", plain(prepared(merged, args), batch)
    for count in sorted({1, args.rows, args.loaded}):
        adapters = one if count == 1 else worn(args, count)
        prepared(adapters.model, args)
        yield f"{count} loaded", mixed(adapters, batch, args.rows)
    if not args.no_peft:
        yield from peft(args, batch).items()


def largest_difference(args: argparse.Namespace, batch: Batch) -> float:
    """Of a logit of a mixed batch from that of the row alone."""
    adapters = worn(args, args.rows)
    prepared(adapters.model, args)
    together, worst = mixed(adapters, batch, args.rows)(), 0.0
    for row, name in enumerate(adapters.names):
        with adapters.use(name):
            alone = adapters.model(**{key: t[row : row + 1] for key, t in batch.items()}).logits[0]
        worst = max(worst, float((alone - together[row]).abs().max()))
    return worst


@torch.no_grad()
def measured(args: argparse.Namespace, batch: Batch) -> dict[str, float]:
    """Median seconds of a batch by variant, every adapter having been used before: its first use lowers it."""
    found = dict(variants(args, batch))
    for name, run in found.items():
        for _ in range(max(3, -(-int(name.split()[0]) // args.rows) if "loaded" in name else 0)):
            run()
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, run in found.items():
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 2000, (args.rows, args.tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seconds = measured(args, batch)
    all_of, many = seconds[f"{args.rows} loaded"], seconds[f"{args.loaded} loaded"]
    ratios = {
        "mixed over merged, throughput (0.95 wanted)": seconds["merged"] / all_of,
        "mixed over merged on plain layers": seconds["merged, plain layers"] / all_of,
        f"{args.loaded} over 1 loaded, throughput (0.9 wanted)": seconds["1 loaded"] / many,
        f"{args.loaded} over {args.rows} loaded": all_of / many,
    }
    if not args.no_peft:
        ratios["mixed over PEFT's adapter_names, throughput (1 wanted)"] = seconds["PEFT, adapter_names"] / all_of
        ratios["PEFT's adapter_names over its one adapter"] = (
            seconds["PEFT, one adapter"] / seconds["PEFT, adapter_names"]
        )
    with torch.no_grad():
        worst = largest_difference(args, batch)
    told = {"settings": vars(args), "milliseconds": {k: 1e3 * s for k, s in seconds.items()}, "ratios": ratios}
    print(json.dumps({**told, "largest difference of a row from the row alone": worst}, indent=1))


if __name__ == "__main__":
    main()
