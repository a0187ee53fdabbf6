"""The tables of a report: results, comparisons and runs, each written four ways.

CSV has every number unrounded, Markdown and LaTeX are for papers, and the page has its own (page.html).
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loralab.disk import size_text
from loralab.report import numbers as n
from loralab.report.findings import Findings, Result
from loralab.study import Comparison, Run
from loralab.study.record import number

MARKS = {
    "better": "good", "worse": "bad", "equivalent": "same", "same runs": "same", "indistinguishable": "unsure",
    "one seed": "unsure",
}  # fmt: skip
LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$", "×": r"$\times$",
    "<": "$<$", ">": "$>$",
})  # fmt: skip
LATEX_ROWS = 40  # of a table on one page, at the 10 points of the class article, with a caption of some lines
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # starts of text that a spreadsheet would run as a formula


# ---- tables and their files ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One column: how a row is shown in it, and what it is sorted by."""

    title: str
    show: Callable[[Any], str]
    sort: Callable[[Any], Any] | None = None  # a number; None sorts by what is shown
    help: str = ""
    short: bool = True  # also in the tables for papers, and shown before "All columns"
    mark: Callable[[Any], str] | None = None  # a class of the page's style

    @property
    def number(self) -> bool:
        return self.sort is not None


@dataclass(frozen=True)
class Table:
    name: str  # of its files
    title: str
    columns: Sequence[Column]
    rows: Sequence[Any]
    raw: Callable[[Any], dict[str, Any]]  # a row as plain numbers, for the CSV
    notes: Sequence[str] = ()  # what its numbers mean, below it
    about: str = ""  # what must be read before them
    foreign: bool = False  # numbers of other people's work

    def cells(self, columns: Sequence[Column]) -> list[list[str]]:
        return [[column.show(row) for column in columns] for row in self.rows]


def to_csv(table: Table) -> str:
    """Every number unrounded."""
    rows = [table.raw(row) for row in table.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def to_markdown(table: Table) -> str:
    """A Markdown table with its notes."""
    columns = [column for column in table.columns if column.short]
    cells = [
        [column.title for column in columns],
        ["--:" if c.number else "---" for c in columns],
        *table.cells(columns),
    ]
    lines = ["| " + " | ".join(_bar(cell) for cell in row) + " |" for row in cells]
    return "\n".join([f"## {table.title}", "", *lines, "", *(f"* {note}" for note in table.notes), ""])


def _bar(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def to_latex(table: Table) -> str:
    """LaTeX tables with booktabs that fit a page: what all rows share is in the caption, and many rows are divided."""
    short = [column for column in table.columns if column.short]
    shown = {column.title: {column.show(row) for row in table.rows} for column in short}
    same = [column for column in short if len(table.rows) > 1 and len(shown[column.title]) == 1]
    columns = [column for column in short if column not in same] or short[:1]
    shared = [f"{column.title}: {next(iter(shown[column.title]))}" for column in same]
    said = [*([f"In every row {', '.join(shared)}"] if shared else []), *table.notes]
    cells = table.cells(columns)
    parts = [cells[i : i + LATEX_ROWS] for i in range(0, len(cells), LATEX_ROWS)] or [[]]
    captions = [" ".join([f"{table.title}.", *(f"{note}." for note in said)])]
    captions += [f"{table.title}, continued ({i} of {len(parts)})." for i in range(2, len(parts) + 1)]
    pages = [_latex_page(columns, part, caption) for part, caption in zip(parts, captions, strict=True)]
    return "\n".join([r"% \usepackage{booktabs,graphicx}", *pages, ""])


def _latex_page(columns: Sequence[Column], cells: Sequence[Sequence[str]], caption: str) -> str:
    """One table, made smaller where it is wider than the page."""
    body = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in cells]
    head = " & ".join(column.title.translate(LATEX) for column in columns) + r" \\"
    align = "".join("r" if column.number else "l" for column in columns)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{caption.translate(LATEX)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}}",
        r"\end{table}",
    ])  # fmt: skip


WRITERS: dict[str, Callable[[Table], str]] = {"csv": to_csv, "md": to_markdown, "tex": to_latex}


def tables(f: Findings) -> list[Table]:
    """Results, comparisons where there are any, and runs."""
    made = [results(f)]
    if f.comparisons:
        made.append(comparisons(f))
    return [*made, runs(f)]


# ---- results ---------------------------------------------------------------------------------------------------------


def results(f: Findings) -> Table:
    """A row for each method on each task and model."""
    compared = any(r.comparison for r in f.results)
    columns = [*_scores(), *([_verdict()] if compared else []), *_protocol(), *_costs()]
    return Table("results", "Results", columns, f.results, raw_result, notes(f))


def _scores() -> list[Column]:
    return [
        Column("task", lambda r: r.place[0]),
        Column("model", lambda r: r.place[1]),
        Column("method", lambda r: r.label),
        Column("metric", lambda r: n.metric(r.summary.metric)),
        Column("score", lambda r: n.mean_sd(r.summary.mean, r.summary.sd), lambda r: r.summary.mean,
               "mean of the selected epoch over seeds ± standard deviation over seeds"),
        Column("95 % interval", lambda r: n.interval(r.summary.low, r.summary.high), lambda r: r.summary.low,
               "over seeds and, where predictions were kept, validation rows"),
        Column("seeds", lambda r: f"{len(r.seeds)} ({n.seeds(r.seeds)})", lambda r: len(r.seeds)),
        Column("rows", lambda r: f"{r.validation_rows:,}", lambda r: r.validation_rows, "validation rows"),
    ]  # fmt: skip


def _verdict() -> Column:
    return Column("verdict", verdict, mark=lambda r: MARKS[r.comparison.verdict] if r.comparison else "")


def _protocol() -> list[Column]:
    return [
        Column("selection", lambda r: r.selection + " (optimistic)" * r.optimistic,
               help="the rows on which the epoch was chosen", mark=lambda r: "warn" if r.optimistic else ""),
        Column("best − selected", lambda r: n.signed(r.summary.inflation), lambda r: r.summary.inflation,
               "score at the best epoch of the reported split, minus the selected one"),
        Column("start", lambda r: r.start, short=False, help="what training started from"),
        Column("tuning runs", lambda r: str(r.summary.tuning), lambda r: r.summary.tuning, short=False),
        Column("unfinished", unfinished, short=False),
    ]  # fmt: skip


def _costs() -> list[Column]:
    return [
        Column("trainable", lambda r: n.count(r.cost.trainable), lambda r: r.cost.trainable,
               "trainable parameters, adapter and head"),
        Column("of which head", lambda r: n.count(r.cost.head), lambda r: r.cost.head, short=False),
        Column("memory", lambda r: size_text(r.cost.step_bytes), lambda r: r.cost.step_bytes,
               "of a step of one run: weights, gradients, optimizer, activations"),
        Column("peak", lambda r: size_text(r.cost.peak_bytes), lambda r: r.cost.peak_bytes,
               "of the process, with all runs that shared it", short=False),
        Column("rows/s", lambda r: n.count(r.cost.examples_per_s), lambda r: r.cost.examples_per_s,
               "training examples per second"),
        Column("runs in a pass", lambda r: str(r.cost.together), lambda r: r.cost.together,
               "the most runs that shared passes, each of which is charged an equal part of the time", short=False),
        Column("training", lambda r: n.duration(r.cost.train_s), lambda r: r.cost.train_s, short=False),
    ]  # fmt: skip


def notes(f: Findings) -> list[str]:
    """What the numbers of the results mean."""
    over = {
        (True,): "seeds and validation rows",
        (False,): "seeds (Student's t); predictions were not kept, so it holds for these validation rows only",
        (False, True): "seeds, and over validation rows where predictions were kept",
    }[tuple(sorted({bool(r.summary.rows) for r in f.results}))]
    lines = ["Score: mean ± standard deviation over seeds, at the selected epoch"]
    lines.append(f"Interval: 95 %, over {over}")
    if any(r.comparison for r in f.results):
        alpha = f.study.compare["alpha"]
        lines.append(f"Verdict: against {reference(f)}, paired by seed, at {alpha:g} after Holm's correction")
    if shared := sum(r.cost.together > 1 for r in f.results):
        whose = f"in {shared} of {len(f.results)} results runs shared passes"
        lines.append(f"rows/s: {whose}; each has an equal part of their time, which is not its own speed")
    if any(len(r.seeds) == 1 for r in f.results):
        lines.append("One seed has no spread, so no interval and no verdict")
    return lines


def reference(f: Findings) -> str:
    return ", ".join(dict.fromkeys(r.against for r in f.results if r.against))


def verdict(r: Result) -> str:
    return n.NONE if r.comparison is None else r.comparison.verdict


def unfinished(r: Result) -> str:
    counts = {"pending": r.summary.pending, "failed": r.summary.failed}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or n.NONE


def raw_result(r: Result) -> dict[str, Any]:
    protocol = {
        "seed_list": " ".join(map(str, r.seeds)),
        "validation_rows": r.validation_rows,
        "selection": r.selection,
        "start": r.start,
        "against": r.against or "",
        "verdict": r.comparison.verdict if r.comparison else "",
    }
    return asdict(r.summary) | protocol | {"trainable": r.cost.trainable} | asdict(r.cost)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def comparisons(f: Findings) -> Table:
    """A row for each two methods that were compared."""
    columns = [
        Column("task", lambda c: c.task),
        Column("model", lambda c: c.model),
        Column("method", lambda c: c.a),
        Column("against", lambda c: c.b),
        Column("difference", lambda c: n.signed(c.difference), lambda c: c.difference, "mean over seeds, paired"),
        Column("95 % interval", lambda c: n.interval(c.low, c.high), lambda c: c.low),
        Column("p", lambda c: n.chance(c.p), lambda c: c.p, "of no difference, two-sided"),
        Column("p corrected", lambda c: n.chance(c.p_holm), lambda c: c.p_holm, "by Holm's method, over this table"),
        Column("margin", lambda c: f"{c.margin:g}", lambda c: c.margin, "smaller differences do not matter"),
        Column("p equivalent", lambda c: n.chance(c.p_equivalent_holm), lambda c: c.p_equivalent_holm,
               "of a difference beyond the margin (TOST), corrected"),
        Column("verdict", lambda c: c.verdict, mark=lambda c: MARKS[c.verdict]),
        Column("seeds", lambda c: str(c.seeds), lambda c: c.seeds, "that both have"),
        Column("rows", lambda c: f"{c.rows:,}" if c.rows else n.NONE, lambda c: c.rows,
               "validation rows, where predictions were kept"),
        Column("could find", lambda c: n.score(c.smallest), lambda c: c.smallest,
               "the smallest true difference that this comparison finds with 80 % power, corrected"),
    ]  # fmt: skip
    alpha = f.study.compare["alpha"]
    lines = [
        f"Paired on the same seeds; verdicts at {alpha:g} after Holm's correction over the {len(f.comparisons)} rows",
        "Equivalent: within the margin, by two one-sided tests; indistinguishable: neither a difference nor "
        "equivalence is shown",
    ]
    return Table("comparisons", "Comparisons", columns, f.comparisons, _raw_comparison, lines)


def _raw_comparison(c: Comparison) -> dict[str, Any]:
    return asdict(c) | {"mcnemar": " ".join(f"{p:.4g}" for p in c.mcnemar)}


# ---- runs ------------------------------------------------------------------------------------------------------------


def runs(f: Findings) -> Table:
    """A row for each finished run."""
    columns = [
        Column("task", lambda r: r.scheduled.task),
        Column("model", lambda r: r.scheduled.model),
        Column("method", lambda r: r.scheduled.method),
        Column("seed", lambda r: str(r.seed), lambda r: r.seed),
        Column("selected", lambda r: n.score(r.selected), lambda r: r.selected),
        Column("epoch", lambda r: str(r.result.get("selected_epoch", n.NONE)),
               lambda r: r.result.get("selected_epoch", 0), "that was selected"),
        Column("last", lambda r: n.score(_by_epoch(r, "last")), lambda r: _by_epoch(r, "last")),
        Column("best", lambda r: n.score(_by_epoch(r, "best_on_validation")),
               lambda r: _by_epoch(r, "best_on_validation"), "optimistic: chosen on the reported split"),
        Column("training", lambda r: n.duration(r.result["time"]["train_s"]), lambda r: r.result["time"]["train_s"]),
        Column("peak memory", lambda r: size_text(r.result["memory"]["peak_bytes"]),
               lambda r: r.result["memory"]["peak_bytes"]),
        Column("hardware", lambda r: hardware(r.facts), short=False),
        Column("notes", warnings_of, short=False),
        Column("folder", lambda r: r.scheduled.address or "", short=False),
    ]  # fmt: skip
    finished = [run for r in f.results for run in r.cell.runs]
    notes = ["Every finished run that the results are made of, without those of tuning"]
    return Table("runs", "Runs", columns, finished, _raw_run, notes)


def _by_epoch(run: Run, key: str) -> float:
    """A number that needs the validation split after each epoch; nan where it was read once."""
    return number(run.result["metric"][key])


def warnings_of(run: Run) -> str:
    return "; ".join([*run.result.get("warnings", []), *run.result.get("notes", [])]) or n.NONE


def hardware(facts: dict[str, Any]) -> str:
    """The machine of a run in a few words."""
    about = facts.get("hardware", {})
    count = about.get("threads")
    threads = f"{count} thread{'s' * (count != 1)}" if count else ""
    where = about.get("gpu") or " ".join(str(about[key]) for key in ("machine", "cpu") if about.get(key))
    return ", ".join(filter(None, [where, threads])) or "unknown"


def _raw_run(r: Run) -> dict[str, Any]:
    result = r.result
    return {
        "task": r.scheduled.task, "model": r.scheduled.model, "method": r.scheduled.method, "seed": r.seed,
        **result["metric"], **{f"validation_{k}": v for k, v in result.get("metrics", {}).items()},
        "selected_epoch": result.get("selected_epoch"), **result["counts"],
        **{k: v for k, v in result["time"].items() if not isinstance(v, dict)},
        "peak_bytes": result["memory"]["peak_bytes"], **_flat(result.get("protocol", {})),
        "folder": r.scheduled.address,
    }  # fmt: skip


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if not isinstance(value, dict | list)}
