"""What the stored runs say when they are asked again: `python studies/afterwards.py STUDY`, as Markdown.

These questions were put after the runs were seen, so the tables are leads, no confirmation: planned contrasts against
LoRA with what they could have found, AUC and likelihood from the stored predictions, losses of training, accuracy
beside F1, and runs that did not learn.
"""

import math
import sys
from collections.abc import Iterable
from importlib import import_module
from unittest import mock

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, roc_auc_score
from tables import spread

from loralab.data import is_flat
from loralab.study import load
from loralab.study.statistics.contrasts import Contrast, paired, smallest_difference

planned = import_module("loralab.study.statistics.planned")  # the package has a function of that name
MARGIN = 0.01


def main(folder: str) -> None:
    study = load(folder)
    cells = {key: cell for key, cell in study.cells().items() if cell.runs}
    for model in dict.fromkeys(key[1] for key in cells):
        own = {(key[0], key[2]): cell for key, cell in cells.items() if key[1] == model}
        tasks, methods = (list(dict.fromkeys(key[i] for key in own)) for i in (0, 1))
        print(f"## {folder}, {model}\n")
        reference = next((m for m in ("LoRA", "lora") if m in methods), methods[0])
        if study.compare.get("reference"):
            without_failed_regressions(study, model)
        else:
            found_by_design(own, tasks, methods, study.compare["against"])
        mean_of_tasks(own, tasks, methods, reference)
        for task in tasks:
            again(task, {m: own[task, m].runs for m in methods if (task, m) in own}, reference)


def without_failed_regressions(study, model) -> None:
    """The planned contrasts on the mean of tasks; a regression of nearly one value counts as a collapse."""
    counts = planned.collapses
    with mock.patch.object(planned, "collapses", lambda run: counts(run) or failed(run)):
        families = planned.planned(study)
    print(f"Regressions that gave nearly one value: {', '.join(failures(study)) or 'none'}\n")
    for family in families:
        if family.name == planned.MEAN and family.model == model:
            show(f"{family.endpoint}, mean of tasks, without these seeds", family.contrasts)


def failed(run) -> bool:
    """Whether it has collapsed by the rule that came after the study (docs/decisions.md)."""
    found = predicted(run) if run.result["metric"]["name"] == "pearson" else None
    return found is not None and is_flat(found[0][:, 0], found[1])


def failures(study) -> list[str]:
    """Each method with failed regressions, and how many."""
    cells = study.cells().items()
    return [f"{key[2]} {n} of {len(cell.runs)}" for key, cell in cells if (n := sum(map(failed, cell.runs)))]


def found_by_design(own, tasks, methods, against) -> None:
    """What the study's own comparisons could find at Holm's first step, in standard deviations of a difference."""
    there = [sum((t, m) in own for m in methods) for t in tasks]
    pairs = sum(n - 1 if against is not None else math.comb(n, 2) for n in there)
    seeds = min(len(cell.runs) for cell in own.values())
    if seeds < 2 or not pairs:
        return
    least = smallest_difference(1 / math.sqrt(seeds), seeds - 1, 0.05 / pairs)
    print(f"{pairs} comparisons, {seeds} seeds: the smallest difference found with 80 % power is {least:.1f} standard")
    print("deviations of a paired difference.\n")


def mean_of_tasks(own, tasks, methods, reference) -> None:
    """Each method that learns through the layers, on the mean of tasks, against the reference."""
    everywhere = [m for m in methods if all((t, m) in own for t in tasks) and m not in ("head", reference)]
    if len(tasks) < 2 or not everywhere or not all((t, reference) in own for t in tasks):
        return
    scores = {(t, m): {r.seed: r.selected for r in own[t, m].runs} for t in tasks for m in [*everywhere, reference]}
    seeds = sorted(set.intersection(*(set(s) for s in scores.values())))
    differences = [
        np.array([np.mean([scores[t, m][s] - scores[t, reference][s] for t in tasks]) for s in seeds])
        for m in everywhere
    ]
    show(f"mean of {', '.join(tasks)}, against {reference}", paired(everywhere, differences, MARGIN))


def show(title: str, contrasts: Iterable[Contrast]) -> None:
    print(f"| {title} | difference | 95 % | p | Holm | equal within {MARGIN} (Holm) | could have found |")
    print("| --- |" + " ---: |" * 6)
    for c in contrasts:
        interval = "" if math.isnan(c.low) else f"{c.low:+.3f} to {c.high:+.3f}"  # two seeds have none
        numbers = ["" if math.isnan(x) else f"{x:.3f}" for x in (c.p, c.p_holm, c.p_equivalent_holm, c.smallest)]
        difference = "" if math.isnan(c.difference) else f"{c.difference:+.4f}"  # a method without a seed on all tasks
        print(f"| {c.method} | {difference} | {interval} | {' | '.join(numbers)} |")
    print()


def again(task: str, runs, reference: str) -> None:
    """One task: the mean (standard deviation over seeds) of what else the runs tell."""
    columns = (
        "score", "AUC", "likelihood", "accuracy", "training loss, last epoch", "one class", "lowest seed", "called 1",
    )  # fmt: skip
    labels = next((found[1] for own in runs.values() for run in own if (found := predicted(run))), None)
    if labels is not None and set(np.unique(labels)) == {0, 1}:
        share = float(np.mean(labels))
        print(
            f"{task}: {100 * share:.0f} % of the rows are of class 1; one class for all: {max(share, 1 - share):.3f}\n"
        )
    print(f"| {task} | {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * len(columns))
    aucs = {}
    for method, own in runs.items():
        kept = [predicted(run) for run in own]
        if all(kept) and kept[0][0].shape[1] == 2:
            aucs[method] = {r.seed: roc_auc_score(y, x[:, 1] - x[:, 0]) for r, (x, y) in zip(own, kept, strict=True)}
        classes = all(kept) and kept[0][0].shape[1] > 1
        nll = [-log_softmax(x, 1)[np.arange(len(y)), y.astype(int)].mean() for x, y in kept] if classes else []
        right = [r.result["metrics"]["accuracy"] for r in own if "accuracy" in r.result["metrics"]]
        right = right or ([accuracy_score(y, x.argmax(1)) for x, y in kept] if classes else [])
        cells = [
            spread(r.selected for r in own), spread(aucs.get(method, {}).values()), spread(nll), spread(right),
            spread(r.history[-1]["train_loss"] for r in own), str(sum(bool(r.result["warnings"]) for r in own)),
            f"{min(r.selected for r in own):.3f}", called_1(kept),
        ]  # fmt: skip
        print(f"| {method} | {' | '.join(cells)} |")
    print()
    if reference in aucs and len(next(iter(aucs.values()))) > 1:
        others = [m for m in aucs if m not in (reference, "head")]
        seeds = {m: sorted(aucs[m].keys() & aucs[reference].keys()) for m in others}
        differences = [np.array([aucs[m][s] - aucs[reference][s] for s in seeds[m]]) for m in others]
        if others and all(len(d) > 1 for d in differences):
            show(f"{task}, AUC, against {reference}", paired(others, differences, MARGIN))


def called_1(kept) -> str:
    """The lowest and the highest share of rows that a run calls class 1."""
    shares = [100 * float(np.mean(x.argmax(1))) for found in kept if found for x in found[:1] if x.shape[1] == 2]
    return f"{min(shares):.0f} to {max(shares):.0f} %" if shares else ""


def predicted(run):
    """(logits (rows, outputs), labels (rows,)) of the reported split; None where a run kept none."""
    splits = run.predictions
    if not splits:
        return None
    first = next(iter(splits.values()))
    return first.logits, first.labels


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
