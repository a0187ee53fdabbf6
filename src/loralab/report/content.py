"""The tables of a report: results, comparisons, runs."""

from dataclasses import asdict
from typing import Any

from loralab.report import numbers as n
from loralab.report.rows import Findings, Result
from loralab.report.tables import Column, Table
from loralab.study import Comparison, Run

MARKS = {
    "better": "good", "worse": "bad", "equivalent": "same", "same runs": "same", "indistinguishable": "unsure",
    "one seed": "unsure",
}  # fmt: skip


def tables(f: Findings) -> list[Table]:
    made = [results(f)]
    if f.comparisons:
        made.append(comparisons(f))
    return [*made, runs(f)]


# ---- results ---------------------------------------------------------------------------------------------------------


def results(f: Findings) -> Table:
    compared = any(r.comparison for r in f.results)
    columns = [*_scores(), *([_verdict()] if compared else []), *_protocol(), *_costs()]
    return Table("results", "Results", columns, f.results, raw_result, notes(f))


def _scores() -> list[Column]:
    return [
        Column("task", lambda r: r.place[0]),
        Column("model", lambda r: r.place[1]),
        Column("method", lambda r: r.label),
        Column("metric", lambda r: n.metric(r.summary.metric)),
        Column("score", lambda r: n.spread(r.summary.mean, r.summary.sd), lambda r: r.summary.mean,
               "mean of the selected epoch over seeds ± standard deviation over seeds"),
        Column("95 % interval", lambda r: n.interval(r.summary.low, r.summary.high), lambda r: r.summary.low,
               "over seeds and, where predictions were kept, validation rows"),
        Column("seeds", lambda r: f"{len(r.seeds)} ({n.spans(r.seeds)})", lambda r: len(r.seeds)),
        Column("rows", lambda r: f"{r.validation_rows:,}", lambda r: r.validation_rows, "validation rows"),
    ]  # fmt: skip


def _verdict() -> Column:
    return Column("verdict", verdict, mark=lambda r: MARKS[r.comparison.verdict] if r.comparison else "")


def _protocol() -> list[Column]:
    return [
        Column("selection", lambda r: r.selection + " (optimistic)" * r.optimistic,
               help="what chose the epoch", mark=lambda r: "warn" if r.optimistic else ""),
        Column("best − selected", lambda r: n.signed(r.summary.inflation), lambda r: r.summary.inflation,
               "what choosing the epoch on the reported split would have added"),
        Column("start", lambda r: r.start, short=False, help="what training started from"),
        Column("tuning runs", lambda r: str(r.summary.tuning), lambda r: r.summary.tuning, short=False),
        Column("unfinished", waiting, short=False),
    ]  # fmt: skip


def _costs() -> list[Column]:
    return [
        Column("learns", lambda r: n.count(r.cost.trainable), lambda r: r.cost.trainable,
               "values that learn, adapter and head"),
        Column("of them head", lambda r: n.count(r.cost.head), lambda r: r.cost.head, short=False),
        Column("memory", lambda r: n.size(r.cost.step_bytes), lambda r: r.cost.step_bytes,
               "of one run's step: weights, gradients, optimizer, activations"),
        Column("peak", lambda r: n.size(r.cost.peak_bytes), lambda r: r.cost.peak_bytes,
               "of the process, all runs in it", short=False),
        Column("rows/s", lambda r: n.count(r.cost.examples_per_s), lambda r: r.cost.examples_per_s,
               "training examples per second"),
        Column("in passes of", lambda r: str(r.cost.together), lambda r: r.cost.together,
               "the most runs that shared passes; time is an equal part of them", short=False),
        Column("training", lambda r: n.duration(r.cost.train_s), lambda r: r.cost.train_s, short=False),
    ]  # fmt: skip


def notes(f: Findings) -> list[str]:
    """What the numbers of the results are."""
    over = {
        (True,): "seeds and validation rows",
        (False,): "seeds (Student's t); predictions were not kept, so it speaks of these validation rows only",
        (False, True): "seeds, and over validation rows where predictions were kept",
    }[tuple(sorted({bool(r.summary.rows) for r in f.results}))]
    told = ["Score: mean ± standard deviation over seeds, at the epoch that the selection chose"]
    told.append(f"Interval: 95 %, over {over}")
    if any(r.comparison for r in f.results):
        alpha = f.study.compare["alpha"]
        told.append(f"Verdict: against {reference(f)}, paired by seed, corrected by Holm, at {alpha:g}")
    if shared := sum(r.cost.together > 1 for r in f.results):
        whose = f"in {shared} of {len(f.results)} results runs shared passes"
        told.append(f"rows/s: {whose}; an equal part of a pass is no speed")
    if any(len(r.seeds) == 1 for r in f.results):
        told.append("One seed has no spread: no interval and no verdict")
    return told


def reference(f: Findings) -> str:
    return ", ".join(dict.fromkeys(r.against for r in f.results if r.against))


def verdict(r: Result) -> str:
    return n.NONE if r.comparison is None else r.comparison.verdict


def waiting(r: Result) -> str:
    told = [f"{r.summary.pending} pending"] * bool(r.summary.pending) + [f"{r.summary.failed} failed"] * bool(
        r.summary.failed
    )
    return ", ".join(told) or n.NONE


def raw_result(r: Result) -> dict[str, Any]:
    told = {
        "seed_list": " ".join(map(str, r.seeds)),
        "validation_rows": r.validation_rows,
        "selection": r.selection,
        "start": r.start,
        "against": r.against or "",
        "verdict": r.comparison.verdict if r.comparison else "",
    }
    return asdict(r.summary) | told | {"trainable": r.cost.trainable} | asdict(r.cost)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def comparisons(f: Findings) -> Table:
    columns = [
        Column("task", lambda c: c.task),
        Column("model", lambda c: c.model),
        Column("method", lambda c: c.a),
        Column("against", lambda c: c.b),
        Column("difference", lambda c: n.signed(c.difference), lambda c: c.difference, "mean over seeds, paired"),
        Column("95 % interval", lambda c: n.interval(c.low, c.high), lambda c: c.low),
        Column("p", lambda c: n.chance(c.p), lambda c: c.p, "two-sided, of no difference"),
        Column("p corrected", lambda c: n.chance(c.p_holm), lambda c: c.p_holm, "by Holm, over this table"),
        Column("margin", lambda c: f"{c.margin:g}", lambda c: c.margin, "differences below it do not matter"),
        Column("p equivalent", lambda c: n.chance(c.p_equivalent_holm), lambda c: c.p_equivalent_holm,
               "of a difference beyond the margin (TOST), corrected"),
        Column("verdict", lambda c: c.verdict, mark=lambda c: MARKS[c.verdict]),
        Column("seeds", lambda c: str(c.seeds), lambda c: c.seeds, "that both have"),
        Column("rows", lambda c: str(c.rows or n.NONE), lambda c: c.rows,
               "validation rows, where predictions were kept"),
        Column("seeds needed", needed, lambda c: c.seeds_needed or 10**6,
               "to find a difference of this size with 80 % power"),
    ]  # fmt: skip
    alpha = f.study.compare["alpha"]
    told = [
        f"Paired on the same seeds; verdicts at {alpha:g}, corrected by Holm over the {len(f.comparisons)} rows",
        "Equivalent: within the margin, by two one-sided tests; indistinguishable: neither is shown",
    ]
    return Table("comparisons", "Comparisons", columns, f.comparisons, _raw_comparison, told)


def needed(c: Comparison) -> str:
    return n.NONE if c.seeds < 2 or c.difference == 0 else "> 1,000" if c.seeds_needed is None else str(c.seeds_needed)


def _raw_comparison(c: Comparison) -> dict[str, Any]:
    return asdict(c) | {"mcnemar": " ".join(f"{p:.4g}" for p in c.mcnemar)}


# ---- runs ------------------------------------------------------------------------------------------------------------


def runs(f: Findings) -> Table:
    columns = [
        Column("task", lambda r: r.planned.task),
        Column("model", lambda r: r.planned.model),
        Column("method", lambda r: r.planned.method),
        Column("seed", lambda r: str(r.seed), lambda r: r.seed),
        Column("selected", lambda r: n.score(r.selected), lambda r: r.selected),
        Column("epoch", lambda r: str(r.result.get("selected_epoch", n.NONE)),
               lambda r: r.result.get("selected_epoch", 0), "that was selected"),
        Column("last", lambda r: n.score(r.result["metric"]["last"]), lambda r: r.result["metric"]["last"]),
        Column("best", lambda r: n.score(r.result["metric"]["best_on_validation"]),
               lambda r: r.result["metric"]["best_on_validation"], "optimistic: chosen on the reported split"),
        Column("training", lambda r: n.duration(r.result["time"]["train_s"]), lambda r: r.result["time"]["train_s"]),
        Column("peak memory", lambda r: n.size(r.result["memory"]["peak_bytes"]),
               lambda r: r.result["memory"]["peak_bytes"]),
        Column("hardware", lambda r: hardware(r.facts), short=False),
        Column("notes", told_of, short=False),
        Column("folder", lambda r: r.planned.address or "", short=False),
    ]  # fmt: skip
    found = [run for r in f.results for run in r.cell.runs]
    notes = ["Every finished run that the results are made of; runs of tuning are not among them"]
    return Table("runs", "Runs", columns, found, _raw_run, notes)


def told_of(run: Run) -> str:
    return "; ".join([*run.result.get("warnings", []), *run.result.get("notes", [])]) or n.NONE


def hardware(facts: dict[str, Any]) -> str:
    about = facts.get("hardware", {})
    count = about.get("threads")
    threads = f"{count} thread{'s' * (count != 1)}" if count else ""
    where = about.get("gpu") or " ".join(str(about[key]) for key in ("machine", "cpu") if about.get(key))
    return ", ".join(filter(None, [where, threads])) or "unknown"


def _raw_run(r: Run) -> dict[str, Any]:
    result = r.result
    return {
        "task": r.planned.task, "model": r.planned.model, "method": r.planned.method, "seed": r.seed,
        **result["metric"], **{f"validation_{k}": v for k, v in result.get("metrics", {}).items()},
        "selected_epoch": result.get("selected_epoch"), **result["counts"],
        **{k: v for k, v in result["time"].items() if not isinstance(v, dict)},
        "peak_bytes": result["memory"]["peak_bytes"], **_flat(result.get("protocol", {})), "folder": r.planned.address,
    }  # fmt: skip


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if not isinstance(value, dict | list)}
