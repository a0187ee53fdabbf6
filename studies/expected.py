"""What studies will take: `python studies/expected.py STORE FILE...`, hours by the pace of runs that a store has.

The pace of LoRA is seconds of training for a row and epoch, the median of the finished runs of a model and task; of
another method LoRA's times the median ratio of the two over tasks, because some stored runs were paused. Evaluating a
row is taken for a third of training on it. The pace is that of the machine and the passes of the stored runs.
"""

import sys
from pathlib import Path
from statistics import median

from loralab.data import glue
from loralab.data.selection import UNUSED
from loralab.disk import read_json
from loralab.run.settings import REPORTED_ROWS
from loralab.study.definition import KEPT
from loralab.study.toml import read

FORWARD = 1 / 3  # of a training step
Pace = dict[tuple[str, str, str], float]  # model, task, method -> seconds for a row and epoch


def pace(store: Path) -> Pace:
    found: dict[tuple[str, str, str], list[float]] = {}
    for file in store.glob("*/result.json"):
        result, epochs = read_json(file), len(file.with_name("metrics.jsonl").read_text().splitlines())
        rows = result["protocol"]["train"] * epochs
        key = result["model"], result["task"], result["method"]
        found.setdefault(key, []).append(result["time"]["train_s"] / rows)
    return {key: median(seconds) for key, seconds in found.items()}


def nearest(known: Pace, model: str, task: str, method: str) -> float:
    """The pace of a method on a task, also where no run tells it."""
    tasks = [t for m, t, name in known if (m, name) == (model, method) and (model, t, "lora") in known]
    ratio = median([known[model, t, method] / known[model, t, "lora"] for t in tasks] or [1.0])
    slowest = max((x for (m, _, name), x in known.items() if (m, name) == (model, "lora")), default=0.0)
    return ratio * known.get((model, task, "lora"), slowest)


def hours(file: Path, known: Pace) -> tuple[int, float]:
    """(runs without extensions, hours)."""
    d = read(file)
    runs, seconds = 0, 0.0
    for model in d.models:
        for task in d.tasks:
            name = glue.canonical(task.settings["task"])
            official = glue.TABLE[name].official
            for method in d.methods:
                s = d.settings(task, model, method, 0, {})
                train = s.train_rows or round(0.9 * official["train"])
                held_out = min(UNUSED, official["train"] - train) if s.held_out == "unused" else official["train"] / 10
                reported = sum(min(s.validation_rows or (REPORTED_ROWS if s.reads_validation_once else rows), rows)
                               for split, rows in official.items() if split != "train")  # fmt: skip
                after_each, at_end = (held_out, reported) if s.reads_validation_once else (held_out + reported, 0)
                rows = s.epochs * train + FORWARD * (s.epochs * after_each + at_end)
                count = d.budget(method) + len(d.seeds)
                runs += count
                seconds += count * rows * nearest(known, Path(model).name, name, s.method)
    return runs, seconds / 3600


if __name__ == "__main__":
    paces = pace(Path(sys.argv[1]))
    print("| study | runs | hours |")
    print("| --- | ---: | ---: |")
    for name in sys.argv[2:]:
        count, long = hours(Path(name), paces)
        print(f"| {Path(name).stem} | {count} | {long:.1f} |")
    print(f"\nRuns beyond an edge, {2 * 2} a method and task at most, and the {KEPT} of a second seed at most.")
