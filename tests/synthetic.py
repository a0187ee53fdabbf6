"""Run folders and studies with invented numbers in the real format, for tests of what reads them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from loralab.recipe import recipe, to_json

GOOD = {"full": 0.62, "lora": 0.60, "dora": 0.605, "vera": 0.57, "lora-fa": 0.585, "qlora": 0.595, "head": 0.2}
SIZE = {"full": 109_000_000, "vera": 61_000, "head": 0, "lora-fa": 147_000}
SPEED = {"full": 110, "lora": 150, "dora": 96, "vera": 130, "lora-fa": 158, "qlora": 61, "head": 400}
MEMORY = {"full": 2.9, "lora": 1.7, "dora": 2.2, "vera": 1.8, "lora-fa": 1.5, "qlora": 1.1, "head": 0.6}
SHIFT = {"cola": 0.0, "mrpc": 0.28, "stsb": 0.29}
METRIC = {"cola": "matthews_correlation", "mrpc": "f1", "stsb": "pearson"}
ACCURACY = 0.1  # below F1, of MRPC
ROWS = 400


def run(folder, task="cola", model="mpnet", method="lora", seed=0, epochs=4, selection="held-out", **settings):
    """Write a finished run folder. The score is that of GOOD, raised by the rank, with noise."""
    chance = np.random.default_rng([seed, sum(map(ord, f"{task}{model}{method}{sorted(settings.items())}"))])
    rank, targets = settings.get("rank") or 8, settings.get("targets", "all-linear")
    gain = 0.012 * np.log2(rank) - 0.03 * (targets == "attention-qv") if "rank" in settings else 0
    best = GOOD.get(method, 0.5) + SHIFT.get(task, 0) + gain + chance.normal(0, 0.008)
    scores = [round(float(best - 0.35 * 0.4**e + chance.normal(0, 0.004)), 5) for e in range(1, epochs + 1)]
    name, chosen = METRIC.get(task, "accuracy"), epochs - 2
    history = [
        {"epoch": e, "step": 100 * e, "train_loss": 0.7 * 0.7**e, "held_out": {name: s},
         "validation": {name: s} | ({"accuracy": s - ACCURACY} if name == "f1" else {}),
         "seconds": 9.0, "one_class": False} for e, s in enumerate(scores, 1)
    ]  # fmt: skip
    counts = {"adapter": SIZE.get(method, 36_864 * rank), "head": 592_130, "base": 109_486_464}
    seconds = float(3000 / SPEED.get(method, 100) * chance.normal(1, 0.02))
    result = {
        "task": task, "model": model, "method": method, "seed": seed,
        "metric": {"name": name, "selected": scores[chosen], "last": scores[-1], "best_on_validation": max(scores)},
        "metrics": {name: scores[chosen]}, "selected_epoch": chosen + 1,
        "counts": {**counts, "trainable": counts["adapter"] + counts["head"]},
        "time": {"train_s": seconds, "examples_per_s": 3000 / seconds, "tokens_per_s": 30_000 / seconds,
                 "together": 1 if method == "full" else 4},
        "memory": {"peak_bytes": int(MEMORY.get(method, 2) * 1e9),
                   "ledger": {"weights": 440_000_000, "activations": int(MEMORY.get(method, 2) * 3e8) + seed}},
        "protocol": {"selection": selection, "optimistic": selection == "validation", "train": 3000, "held_out": 300,
                     "start": "pretrained"},
        "notes": [], "warnings": [], "collapsed": False,
    }  # fmt: skip
    if method == "dylora":
        result["by_rank"] = {str(r): {name: scores[chosen] - 0.1 / r} for r in (1, 2, 3, 4)}
    given = {"rank": rank} if "rank" in vars(recipe(method).factors or object) else {}
    facts = {
        "settings": {"task": task, "model": model, "method": method, "seed": seed, "epochs": epochs,
                     "selection": selection, "targets": targets, **settings},
        "recipe": to_json(recipe(method, **given)) | {k: settings[k] for k in ("lr",) if k in settings},
        "seed": seed, "versions": {"loralab": "synthetic"},
        "hardware": {"machine": "synthetic", "cpu": None, "amx": False, "threads": 2, "gpu": None},
        "data": {"sha256": f"{task}-rows", "train": 3000, "held_out": 300, "validation": ROWS},
        "base_sha256": f"{model}-weights", "counts": result["counts"], "notes": [],
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def predictions(folder, score, seed):
    """Write the predictions of two classes beside a run, right with that chance; all runs have the same labels."""
    labels = np.random.default_rng(0).integers(0, 2, ROWS)
    right = np.random.default_rng([1, seed]).random(ROWS) < score
    logits = np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)]
    tensors = {"validation/logits": torch.tensor(logits), "validation/labels": torch.tensor(labels)}
    save_file(tensors, folder / "predictions.safetensors")


def study(folder: Path, seeds=3, tasks=("cola", "mrpc"), methods=tuple(GOOD), pending=1) -> Path:
    """Write a study with its store: methods on tasks, LoRA at several ranks and targets, and runs still to be made."""
    planned = []

    def plan(label, task, seed, made=True, **given):
        address = f"{len(planned):04d}"
        if made:
            run(folder / "store" / address, task=task, seed=seed, **given)
            predictions(folder / "store" / address, GOOD.get(given["method"], 0.5) + 0.3, seed)
        planned.append({"task": task, "model": "mpnet", "method": label, "seed": seed, "role": "final",
                        "settings": given, "address": address, "tried": {}})  # fmt: skip

    for task in tasks:
        for method in methods:
            for seed in range(seeds):
                plan(method, task, seed, method=method)
    for rank in (1, 2, 4, 16):
        for targets in ("attention-qv", "attention", "all-linear"):
            for seed in range(seeds):
                plan(f"lora r={rank} {targets}", tasks[0], seed, method="lora", rank=rank, targets=targets)
    for seed in range(pending):
        plan("delta-lora", tasks[0], seed, made=False, method="delta-lora")
    about = "Synthetic: every number of this study is invented, to try what reads a study."
    compare = {"alpha": 0.05, "margin": {"default": 0.01}, "against": "full"}
    data = {"name": "synthetic", "about": about, "store": "store", "definition": {}, "compare": compare,
            "planned": planned, "notes": []}  # fmt: skip
    (folder / "study.json").write_text(json.dumps(data))
    return folder


TRIED = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # times a method's own rate
CONTRASTS = {"alpha": 0.05, "margin": {"default": 0.01}, "against": None, "reference": "lora",
             "family": "mean of tasks", "endpoints": ["selected"]}  # fmt: skip


def planned(folder: Path, seeds=6, tasks=("cola", "mrpc", "stsb"), methods=tuple(GOOD)) -> Path:
    """Write a study with planned contrasts, tuned by halving: a rate far from the best scores less, the largest one
    collapses for full, and one reported run of vera did not learn."""
    schedule = []

    def plan(task, method, seed, role, tried, rung=None, lost=False):
        address, lr = f"{len(schedule):04d}", float(f"{recipe(method).lr * tried:.4g}")
        place = run(folder / "store" / address, task=task, seed=seed, method=method, lr=lr, epochs=3)
        far = abs(np.log10(tried / (3.0 if method == "vera" else 1.0)))
        _edit(place, far, lost)
        if role == "final":
            predictions(place, GOOD[method] + 0.3, seed)
        schedule.append({"task": task, "model": "mpnet", "method": method, "seed": seed, "role": role, "settings": {},
                         "address": address, "tried": {"lr_times": tried}, "rung": rung})  # fmt: skip

    for task in tasks:
        for method in methods:
            best = 3.0 if method == "vera" else 1.0
            for times in TRIED:
                plan(task, method, 1000, "tune", times, "1", lost=method == "full" and times > 3)
            for times in (best / 3, best, best * 3):
                plan(task, method, 1001, "tune", times, "2")
            for seed in range(seeds):
                plan(task, method, seed, "final", best, lost=(task, method, seed) == (tasks[0], "vera", 1))
    data = {"name": "planned", "about": "Synthetic: every number is invented.", "store": "store", "definition": {},
            "compare": CONTRASTS, "planned": schedule, "notes": []}  # fmt: skip
    (folder / "study.json").write_text(json.dumps(data))
    return folder


def _edit(place: Path, far: float, lost: bool) -> None:
    """Lower the scores of a run whose rate is far from the best, and let one that is lost predict one class."""
    result = json.loads((place / "result.json").read_text())
    name = result["metric"]["name"]
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for split in ("held_out", "validation"):
            row[split][name] = 0.0 if lost else row[split][name] - 0.06 * far**2
    result["metric"]["selected"] = rows[result["selected_epoch"] - 1]["validation"][name]
    result["metrics"][name] = result["metric"]["selected"]
    result["collapsed"] = lost
    (place / "result.json").write_text(json.dumps(result))
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
