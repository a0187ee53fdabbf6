"""Measure what docs/objectives.md says of kinds of task: `python studies/kinds.py similarity|completion --data DIR`.

similarity: Spearman of minilm's embeddings on STS-B's validation rows before training, with LoRA and with full
fine-tuning, by seed. completion: SST-2 on smollm2 as prompts with one-word completions and as a classification with a
new head, accuracy on the validation rows, by seed. Runs are kept in runs/kinds and not run again.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from safetensors.numpy import load_file

from loralab.run import Settings, train
from loralab.run.bar import Bar
from loralab.run.setup import prepare
from loralab.serve.answers import predictions
from loralab.study.statistics import resampled
from loralab.study.statistics.contrasts import smallest_difference

RUNS = Path("runs/kinds")
SST2 = {"task": "sst2", "model": "smollm2", "train_rows": 2000, "max_length": 64, "epochs": 1, "batch_size": 16}
SST2 |= {"selection": "last"}  # one epoch, so nothing is held out to choose by
KINDS = {"completion": {"objective": "causal"}, "head": {}}
Row = tuple[str, int, float]  # what, seed, score


def similarity(data: Path, seeds: range) -> Iterator[Row]:
    """Yield Spearman of the cosine: pretrained, LoRA, full."""
    common = {"task": "stsb", "data": data, "objective": "similarity", "model": "minilm", "epochs": 2}
    run = prepare(Settings(**common))  # B is 0, so this is the base
    found, rows = predictions(run.adapters, run.task, run.task.validation["validation"], run.tokenizer, 128)
    yield "pretrained", 0, run.objective.score(run.task, found, rows.labels.numpy())["spearman"]
    rates = {"lora": 1e-3, "full": 5e-5}
    yield from _runs([(method, {"method": method, "lr": lr, **common}) for method, lr in rates.items()], seeds)


def completion(data: Path, seeds: range) -> Iterator[Row]:
    """Yield accuracy on SST-2 of 2,000 rows: as completion, and with a new head."""
    yield from _runs([(name, {**SST2, "data": data, **more, "lr": 1e-3}) for name, more in KINDS.items()], seeds)


def paired(seeds: range) -> str:
    """Compare completion and head on the same rows, averaged over seeds."""
    kept = [load_file(RUNS / f"sst2-{kind}-{seed}/predictions.safetensors") for seed in seeds for kind in KINDS]
    labels, logits = kept[0]["validation/labels"], [t["validation/logits"] for t in kept]  # (rows,), (rows, 2) each
    signs = np.tile([1, -1], len(seeds)) / len(seeds)  # (runs,): completion less head
    more = sum(sign * (x.argmax(1) == labels) for sign, x in zip(signs, logits, strict=True))  # (rows,)
    drawn = resampled("accuracy", logits, labels, 10_000, np.random.default_rng(0)) @ signs  # (10000,)
    low, high = np.percentile(drawn, [2.5, 97.5])
    found = smallest_difference(more.std() / math.sqrt(len(more)), len(more) - 1)
    return f"completion less head: {more.mean():.4f} ({low:.4f} to {high:.4f} over rows), could have found {found:.3f}"


def _runs(cells: list[tuple[str, dict]], seeds: range) -> Iterator[Row]:
    for seed in seeds:
        for name, given in cells:
            out = RUNS / f"{given['task']}-{name}-{seed}"
            yield name, seed, train(Settings(**given, seed=seed, out=out, resume=True), Bar())["metric"]["selected"]


MEASURES: dict[str, Callable[[Path, range], Iterator[Row]]] = {"similarity": similarity, "completion": completion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--data", type=Path, required=True, help="folder of the GLUE tasks")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    scores: dict[str, list[float]] = {}
    for name, seed, score in MEASURES[arguments.what](arguments.data, range(arguments.seeds)):
        print(f"{name} seed {seed}: {score:.4f}", flush=True)
        scores.setdefault(name, []).append(score)
    for name, found in scores.items():
        spread = f" (sd {stdev(found):.4f}, n {len(found)})" if len(found) > 1 else ""
        print(f"{name}: {mean(found):.4f}{spread}")
    if arguments.what == "completion":
        print(paired(range(arguments.seeds)))
    if {"pretrained", "lora", "full"} <= scores.keys():
        base, lora, full = (mean(scores[name]) for name in ("pretrained", "lora", "full"))
        print(f"LoRA gains {(lora - base) / (full - base):.0%} of what full fine-tuning gains")


if __name__ == "__main__":
    main()
