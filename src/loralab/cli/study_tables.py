"""A study as tables on the terminal."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.cli.show import say, table
from loralab.disk import size_text
from loralab.run.bar import clock
from loralab.study.record import Study
from loralab.study.statistics import Comparison, PlannedFamily, Summary, comparisons, planned, remarks, summaries

PLANNED = (
    "method", "difference", "95 % interval", "p", "p equal", "margin", "verdict", "could find", "seeds", "collapsed",
)  # fmt: skip
SHOWN = 20  # comparisons; of more, those that differ
RESULTS = ("method", "mean", "sd", "95 % interval", "seeds", "inflation", "learns", "tuned")
COMPARED = ("a", "b", "a - b", "95 % interval", "p (Holm)", "verdict", "could find")


def show(study: Study) -> None:
    """A table for each task and model, then one of the comparisons there."""
    cells, found = study.cells(), comparisons(study)
    differ = [c for c in found if c.verdict in ("better", "worse")] if len(found) > SHOWN else found
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in summaries(study):
        groups.setdefault((s.task, s.model), []).append(s)
    for (task, model), group in groups.items():
        rows = [_result(s, cells[task, model, s.method].runs[0].result) for s in group]
        table(f"{task}, {Path(model).name}: {group[0].metric}", RESULTS, rows)
        for s in group:
            _states(s)
        print()
        if here := [c for c in differ if (c.task, c.model) == (task, model)]:
            table(f"{task}, {Path(model).name}: a against b", COMPARED, [_comparison(c) for c in here], 2)
            print()
    families = planned(study)
    for family in families:
        _planned(family, study)
    for line in remarks(families, study.compare["alpha"]):
        say(line)
    _footnotes(study, found)


def _planned(family: PlannedFamily, study: Study) -> None:
    """A family of planned contrasts."""
    model, endpoint = Path(family.model).name, "" if family.endpoint == "selected" else f", {family.endpoint}"
    title = f"planned: against {study.compare['reference']}, {family.name}, {model}{endpoint}"
    rows = []
    parts = zip(family.contrasts, family.margins, family.seeds, family.collapsed, strict=True)
    for c, margin, seeds, lost in parts:
        tests = [f"{p:.3g}" if p == p else "" for p in (c.p_holm, c.p_equivalent_holm)]
        rows.append((c.method, _signed(c.difference), _interval(c.low, c.high), *tests, f"{margin:g}", c.verdict,
                     _number(c.smallest), str(seeds), str(lost)))  # fmt: skip
    table(title, PLANNED, rows)
    print()


def _result(s: Summary, result: dict[str, Any]) -> tuple[str, ...]:
    numbers = (f"{s.mean:.3f}", _number(s.sd), _interval(s.low, s.high), str(s.seeds), _signed(s.inflation))
    return s.method, *numbers, f"{result['counts']['trainable']:,}", str(s.tuning)


def _power(found: dict[str, Any]) -> str:
    """A line of what a family of tests can find."""
    unit = " standard deviations of a paired difference over seeds" * (found["source"] == "unknown")
    n = found["differences"]
    source = f"the upper 80 % bound from {n} differences of finished runs" if n else f"by {found['source']}"
    known = "" if unit else f" (a paired difference over seeds varies by {found['sd']:.3f}, {source})"
    digits = 1 if unit else 3
    smallest = "none that can be named" if math.isnan(found["smallest"]) else f"{found['smallest']:.{digits}f}{unit}"
    return (
        f"{found['family']}, {Path(found['model']).name}, {found['tests']} test{'s' * (found['tests'] > 1)}, "
        f"{found['seeds']} seeds: can find "
        f"{smallest}, and show equal within {found['margin']:.{digits}f}, "
        f"each with 80 % power{known}"
    )


def _states(s: Summary) -> None:
    """What is odd about a cell, in a line of its own."""
    states = ((s.pending, "to do"), (s.failed, "failed"), (s.unlearnt, "did not learn: the same for every row"))
    if text := "; ".join(f"{n} {what}" for n, what in states if n):
        say(f"{s.method}: {text}")


def _comparison(c: Comparison) -> tuple[str, ...]:
    tested = not math.isnan(c.p_holm)
    verdict = c.verdict + "*" * (c.within_margin and c.verdict in ("better", "worse"))
    return (
        c.a,
        c.b,
        f"{c.difference:+.3f}",
        _interval(c.low, c.high),
        f"{c.p_holm:.3g}" * tested,
        verdict,
        _number(c.smallest),
    )


def _footnotes(study: Study, found: Sequence[Comparison]) -> None:
    if found:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(c.verdict for c in found).most_common())
        print(f"{len(found)} comparisons: {counts}" + "; those that differ are shown" * (len(found) > SHOWN))
        margins = ", ".join(f"{c.metric} {c.margin:g}" for c in {c.metric: c for c in found}.values())
        alpha = f"alpha {study.compare['alpha']:g} after Holm's correction"
        print(f"a against b on the same seeds; {alpha}; margin {margins} (*: within it)")
        rows = {c.rows > 0 for c in found}
        over = {True: "seeds and validation rows", False: "seeds alone, so they are about these rows"}
        print(f"intervals are over {' or '.join(over[x] for x in sorted(rows, reverse=True))}")
        print("could find: the smallest true difference that this comparison finds with 80 % power, corrected")
    print("inflation: what choosing the epoch on the reported split would have added")
    for note in study.notes:
        say(f"note: {note}")


def _signed(x: float) -> str:
    return "" if math.isnan(x) else f"{x:+.3f}"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}" if low < 0 else f"{low:.3f} to {high:.3f}"


def show_outline(outline: dict[str, Any]) -> None:
    rows = [
        (c["task"], Path(c["model"]).name, c["method"], str(c["tune"]), str(c["final"]), str(c["done"]))
        for c in outline["cells"]
    ]
    table(f"{outline['name']}: the schedule", ("task", "model", "method", "tuning", "runs", "done"), rows, 3)
    more = outline["shared"]
    shared = f" ({more} more {'are' if more > 1 else 'is'} shared)" if more else ""
    print(f"{_runs(outline['runs'])}{shared}, {outline['done']} done")
    for found in outline["power"]:
        say(_power(found))
    guess = outline["estimate"]
    if guess["guessed"] or guess["planned"]:
        print(f"left: about {clock(guess['seconds'])} of training; peak memory {size_text(guess['peak_bytes'])}")
    known = {
        "guessed": "by finished runs like them",
        "planned": "roughly, by an estimate of a step",
        "unknown": "not known: their model or rows are not on this machine, or a step of them cannot be estimated",
    }
    for key, how in known.items():
        if guess[key]:
            print(f"  {_runs(guess[key])} {how}")
