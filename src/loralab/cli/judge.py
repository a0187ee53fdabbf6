"""`loralab judge`: which methods of a table of results differ from one of them."""

import dataclasses
import math
from pathlib import Path

from loralab.cli.show import Json, as_json, table
from loralab.study.judge import Judgement
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
        The column with the score; larger is better.
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
        The chance of a false finding in each family of comparisons.
    """
    found = judged(file, method, score, seed, task, rows, reference, margin, alpha)
    if json:
        as_json(dataclasses.asdict(found))
        return
    for family in found.families:
        named = "" if family.name == "all" else f"{family.name}: "
        shown = sorted(family.contrasts, key=lambda c: -c.difference)
        cells = [_cells(c) for c in shown[:MOST]]
        title = f"\n{named}{len(shown)} methods against {found.reference}, tested over {found.by}"
        heads = ("method", "differs by", "95 % interval", "p", "Holm", "verdict")
        table(title, heads, cells)
        if len(shown) > MOST:
            print(f"... {len(shown) - MOST} more below these; --json lists all")
        print(_summary(found, shown))
    for note in found.notes:
        print(f"note: {note}")


def _cells(c: Contrast) -> tuple[str, ...]:
    verdict = SHORT.get(c.verdict, c.verdict)
    if math.isnan(c.p):
        return c.method, f"{c.difference:+.3f}", "", "", "", verdict
    return c.method, f"{c.difference:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}", f"{c.p:.3f}", f"{c.p_holm:.3f}", verdict


def _summary(found: Judgement, contrasts: list[Contrast]) -> str:
    above = [c for c in contrasts if c.difference > 0]
    counts = {v: sum(c.verdict == v for c in contrasts) for v in ("better", "worse", "equal within the margin")}
    least = min((c.p for c in above if not math.isnan(c.p)), default=math.nan)
    text = f"{len(above)} of {len(contrasts)} lie above {found.reference}"
    text += "" if math.isnan(least) else f", the smallest p among them is {least:.3f}"
    text += f"; after Holm's correction {counts['better']} are better, {counts['worse']} worse"
    smallest = [c.smallest for c in contrasts if not math.isnan(c.smallest)]
    if smallest:
        low, high = min(smallest), max(smallest)
        reach = f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"
        text += f". Where none was found, a true difference of {reach} would have been, with 80 % power"
    return text + "."
