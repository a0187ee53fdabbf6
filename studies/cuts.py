"""Is one DyLoRA better at lower ranks than a LoRA that is cut? `python studies/cuts.py --data DIR [--seeds 3]`.

STS-B, 2,600 rows, minilm, as in studies/osnabrueck-ranks.toml. LoRA of rank 8 is cut to each rank in two ways without
training: to its first ranks, and to the best update of that rank (SVD of B A). DyLoRA is read at the same ranks. The
table is Pearson on the validation rows, mean (sd) over seeds. Runs are kept in runs/cuts and not run again.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from loralab import adapters
from loralab.algebra import combine
from loralab.files import AdapterFile
from loralab.run import Settings, train
from loralab.run.bar import Bar
from loralab.run.setup import objective_of, task_of
from loralab.serve.answers import predictions
from loralab.serve.loading import on_base

RUNS = Path("runs/cuts")
RANKS = (1, 2, 4, 8)


def first_ranks(file: AdapterFile, rank: int) -> AdapterFile:
    """Return the adapter with the first `rank` rows of A and columns of B."""
    whole, shape = combine([file], [1.0]).file, combine([file], [1.0], rank=rank).file
    cut = {"A": lambda A: A[:rank], "B": lambda B: B[:, :rank]}  # (r, in) -> (rank, in); (out, r) -> (out, rank)
    return replace(shape, tensors={k: cut.get(k[-1], lambda t: t)(t).contiguous() for k, t in whole.tensors.items()})


def best_update(file: AdapterFile, rank: int) -> AdapterFile:
    """Return the adapter whose every update is the nearest one of this rank."""
    return combine([file], [1.0], rank=rank).file


def scores(data: Path, seed: int) -> Iterator[tuple[str, int, float]]:
    """Yield (what, rank, Pearson) of one seed."""
    common = {"task": "stsb", "data": data, "train_rows": 2600, "model": "minilm", "epochs": 3, "seed": seed}
    runs = {m: Settings(**common, method=m, out=RUNS / f"{m}-{seed}", resume=True) for m in ("lora", "dylora")}
    results = {method: train(run, Bar()) for method, run in runs.items()}
    for rank in RANKS:
        yield "DyLoRA, one training", rank, results["dylora"]["by_rank"][str(rank)]["pearson"]
    run, folder = runs["lora"], runs["lora"].folder / "adapter"
    task, objective = task_of(run), objective_of(run)
    for what, cut in (("LoRA r=8, first ranks", first_ranks), ("LoRA r=8, best update", best_update)):
        for rank in RANKS:
            handle, tokenizer = on_base("minilm", cut(adapters.read(folder), rank), folder)
            found, rows = predictions(handle, task, task.validation["validation"], tokenizer, run.max_length)
            yield what, rank, objective.score(task, found, rows.labels.numpy())["pearson"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the GLUE tasks")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, dict[int, list[float]]] = {}
    for seed in range(given.seeds):
        for what, rank, score in scores(given.data, seed):
            found.setdefault(what, {}).setdefault(rank, []).append(score)
    print(f"| rank | {' | '.join(map(str, RANKS))} |\n| --- |{' ---: |' * len(RANKS)}")
    for what, ranks in found.items():
        cells = (f"{mean(s):.3f} ({stdev(s) if len(s) > 1 else 0:.3f})" for s in ranks.values())
        print(f"| {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
