"""A study as tables on the terminal."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.cli.show import size, table
from loralab.study.estimate import clock
from loralab.study.record import Study
from loralab.study.statistics import Comparison, Summary, comparisons, summaries

SHOWN = 20  # comparisons; of more, those that say something
RESULTS = ("task", "model", "method", "metric", "mean", "sd", "95 % interval", "seeds", "inflation", "learns", "tuned")
COMPARED = ("task", "a", "b", "a - b", "95 % interval", "p (Holm)", "verdict", "seeds needed")


def show(study: Study) -> None:
    cells = study.cells()
    table(
        study.name, RESULTS, [_result(s, cells[s.task, s.model, s.method].runs[0].result) for s in summaries(study)], 4
    )
    found = comparisons(study)
    if found:
        told = [c for c in found if c.verdict in ("better", "worse")] if len(found) > SHOWN else found
        print()
        table(_heading(found, len(told)), COMPARED, [_comparison(c) for c in told], 3)
    _footnotes(study, found)


def _result(s: Summary, result: dict[str, Any]) -> tuple[str, ...]:
    states = ((s.pending, "to do"), (s.failed, "failed"), (s.unlearnt, "did not learn"))
    left = "".join(f", {n} {what}" for n, what in states if n)
    learns = f"{result['counts']['trainable']:,}"
    numbers = (f"{s.mean:.3f}", _number(s.sd), _interval(s.low, s.high), f"{s.seeds}{left}", f"{s.inflation:+.3f}")
    return s.task, Path(s.model).name, s.method, s.metric, *numbers, learns, str(s.tuning)


def _comparison(c: Comparison) -> tuple[str, ...]:
    needed = str(c.seeds_needed or ("more than 1,024" if c.difference else ""))
    verdict = c.verdict + " (within the margin)" * (c.within_margin and c.verdict in ("better", "worse"))
    p = "" if math.isnan(c.p_holm) else f"{c.p_holm:.3g}"
    return c.task, c.a, c.b, f"{c.difference:+.3f}", _interval(c.low, c.high), p, verdict, "" if not p else needed


def _heading(found: Sequence[Comparison], shown: int) -> str:
    counts = Counter(c.verdict for c in found)
    told = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    return f"{len(found)} comparisons: {told}" + f"; the {shown} that differ:" * (shown < len(found))


def _footnotes(study: Study, found: Sequence[Comparison]) -> None:
    margins = ", ".join(f"{c.metric} {c.margin:g}" for c in {c.metric: c for c in found}.values())
    rows = {c.rows > 0 for c in found}
    over = {True: "seeds and validation rows", False: "seeds alone, so they are about these rows"}
    if found:
        print(
            f"a against b on the same seeds; alpha {study.compare['alpha']:g} after Holm's correction; margin {margins}"
        )
        print(f"intervals are over {' or '.join(over[x] for x in sorted(rows, reverse=True))}")
    print("inflation: what choosing the epoch on the reported split would have added")
    for note in study.notes:
        print(f"note: {note}")


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}" if low < 0 else f"{low:.3f} to {high:.3f}"


def show_outline(told: dict[str, Any]) -> None:
    rows = [
        (c["task"], Path(c["model"]).name, c["method"], str(c["tune"]), str(c["final"]), str(c["done"]))
        for c in told["cells"]
    ]
    table(f"{told['name']}: the plan", ("task", "model", "method", "tuning", "runs", "done"), rows, 3)
    shared = f" ({told['shared']} more are shared)" if told["shared"] else ""
    print(f"{told['runs']} runs{shared}, {told['done']} done")
    guess = told["estimate"]
    if guess["guessed"]:
        rest = f", and {guess['unknown']} runs like none that is finished" if guess["unknown"] else ""
        print(f"left: about {clock(guess['seconds'])} of training{rest}; peak memory {size(guess['peak_bytes'])}")
    elif guess["unknown"]:
        print("time and memory: not known, no run like these is finished")
