"""`loralab judge`: which methods of a table of results differ from one of them."""

import dataclasses
import math
from pathlib import Path

from loralab.cli.show import Json, as_json, say, table
from loralab.study.judge import ALL, Family, Judgement
from loralab.study.judge import judge as judged
from loralab.study.statistics.contrasts import Contrast

SHORT = {"equal within the margin": "equal", "no difference found": "not found"}
MOST = 12  # contrasts of a family that are printed; --json has all


def judge(
    file: Path,
    /,
    *,
    method: str,
    score: str,
    seed: str | None = None,
    task: str | None = None,
    rows: int | None = None,
    reference: str | None = None,
    margin: float = 0.01,
    alpha: float = 0.05,
    lower_is_better: bool = False,
    json: Json = False,
) -> None:
    """Compare the methods of anybody's results with one of them, corrected for how many there are.

    Parameters
    ----------
    file: Path
        Results as CSV, TSV, JSON, JSONL or parquet, one row for each score.
    method: str
        The column that names the method.
    score: str
        The column with the score; larger is better, unless --lower-is-better is given.
    seed: str
        The column of seeds; methods are then compared on the same seeds.
    task: str
        The column of tasks; the mean of them is the first question.
    rows: int
        Test rows behind each score, where there is one run a method and a score is a share of rows.
    reference: str
        The method to compare with; lora by default.
    margin: float
        A difference nobody would change method for; within it two methods are equal.
    alpha: float
        The chance of a false finding on the mean of tasks, and once more of one on any task.
    lower_is_better: bool
        The score is a loss or an error: a method below the reference is better.
    """
    found = judged(file, method, score, seed, task, rows, reference, margin, alpha, lower_is_better)
    if json:
        as_json(dataclasses.asdict(found))
        return
    for family in found.families:
        _show(found, family)
    for note in found.notes:
        say(f"note: {note}")


def _show(found: Judgement, family: Family) -> None:
    named, many = "" if family.name == ALL else f"{family.name}: ", len(family.contrasts)
    sign = 1 if found.lower_is_better else -1  # the best method first
    rows = sorted(zip(family.contrasts, family.runs, strict=True), key=lambda row: sign * row[0].difference)
    title = f"\n{named}{many} method{'s' * (many > 1)} against {found.reference}, tested over {found.by}"
    seeds = found.by == "seeds"
    heads = ("method", "differs by", "95 % interval", "p", "Holm", "verdict", *["seeds"] * seeds)
    digits = _digits(family.contrasts)
    table(title, heads, [(*_cells(c, digits), *[str(runs)] * seeds) for c, runs in rows[:MOST]])
    if many > MOST:
        print(f"... {many - MOST} more below these; --json lists all")
    say(_summary(found, family, digits))


def _digits(contrasts: list[Contrast]) -> int:
    """Decimals of a family: three, or as many as show two digits of its largest difference."""
    largest = max((abs(c.difference) for c in contrasts), default=0.0)
    return max(3, 1 - math.floor(math.log10(largest))) if largest > 0 else 3


def _cells(c: Contrast, digits: int) -> tuple[str, ...]:
    interval = "" if math.isnan(c.low) else f"{c.low:+.{digits}f} to {c.high:+.{digits}f}"
    verdict = SHORT.get(c.verdict, c.verdict)
    return c.method, f"{c.difference:+.{digits}f}", interval, _p(c.p), _p(c.p_holm), verdict


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _summary(found: Judgement, family: Family, digits: int) -> str:
    contrasts, tests = family.contrasts, family.corrected_over
    over = f" over {tests} tests, those of all tasks," * (tests > sum(not math.isnan(c.p) for c in contrasts))
    sign, side = (-1, "below") if found.lower_is_better else (1, "above")
    ahead = [c for c in contrasts if sign * c.difference > 0]
    counts = {v: sum(c.verdict == v for c in contrasts) for v in ("better", "worse", "equal within the margin")}
    least = min((c.p for c in ahead if not math.isnan(c.p)), default=math.nan)
    text = f"{len(ahead)} of {len(contrasts)} lie{'s' * (len(ahead) == 1)} {side} {found.reference}"
    text += "" if math.isnan(least) else f", the smallest p among them is {_p(least)}"
    text += f"; after Holm's correction{over} {counts['better']} better, {counts['worse']} worse"
    smallest = [c.smallest for c in contrasts if not math.isnan(c.smallest)]
    if smallest:
        low, high = min(smallest), max(smallest)
        reach = " to ".join(dict.fromkeys([f"{low:.{digits}f}", f"{high:.{digits}f}"]))
        text += f". A true difference of {reach} is found with 80 % power"
    return text + "."
