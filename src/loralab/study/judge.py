"""The planned contrasts of a study, on anybody's results: a table of methods and scores, perhaps of seeds and tasks.

Each method is compared with one reference. With seeds the comparison is paired by seed and task, on the mean of tasks
first and by task after it; with one run a method, `rows` test rows say what the luck of the rows alone allows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab.data import tables
from loralab.errors import UserError, hint
from loralab.study.statistics.contrasts import Contrast, paired, proportions

MEAN = "mean of tasks"


@dataclass(frozen=True)
class Family:
    """The contrasts of one question."""

    name: str  # a task, or the mean of them
    runs: int  # scores that enter
    contrasts: list[Contrast]


@dataclass(frozen=True)
class Judgement:
    """What results say about methods against a reference."""

    reference: str
    by: str  # what was resampled or repeated: seeds, or rows
    alpha: float
    margin: float
    families: list[Family]
    notes: list[str]


Scores = dict[str, dict[str, dict[str, float]]]  # task -> method -> seed -> score


def judge(
    file: Path,
    method: str,
    score: str,
    seed: str | None = None,
    task: str | None = None,
    rows: int | None = None,
    reference: str | None = None,
    margin: float = 0.01,
    alpha: float = 0.05,
) -> Judgement:
    """Compare the methods of a CSV, TSV, JSON, JSONL or parquet file; the arguments name its columns.

    `rows` is the number of test rows behind each score, for results with one run a method; scores are then shares of
    them. Raises UserError for columns that are not there, scores that are no numbers, and results that cannot be
    tested.
    """
    table = _read(file)
    columns = {"--method": method, "--score": score, "--seed": seed, "--task": task}
    _check_columns(file, table, {flag: name for flag, name in columns.items() if name is not None})
    scores, notes = _scores(file, table, method, score, seed, task), []
    methods = list(dict.fromkeys(m for by_method in scores.values() for m in by_method))
    chosen = _reference(methods, reference)
    if reference is None:
        notes.append(f"the reference is {chosen}; another with --reference")
    most = max(len(by_seed) for by_method in scores.values() for by_seed in by_method.values())
    if most > 1:
        families, by = _by_seed(scores, chosen, margin, alpha), "seeds"
    elif rows is not None:
        families, by = _by_rows(scores, chosen, rows, margin, alpha), "rows"
        notes.append("one run a method: only the luck of the test rows is tested, not that of the seed")
    else:
        raise UserError(
            f"{file}: one score for each method says nothing of luck: name the column of seeds with --seed, or give "
            "the number of test rows with --rows"
        )
    return Judgement(chosen, by, alpha, margin, families, notes)


def _by_seed(scores: Scores, reference: str, margin: float, alpha: float) -> list[Family]:
    """The mean of tasks first, where there are several, then each task."""
    found = []
    if len(scores) > 1:
        found.append(_family(MEAN, _mean_of_tasks(scores), reference, margin, alpha))
    return found + [_family(task, by_method, reference, margin, alpha) for task, by_method in scores.items()]


def _family(
    name: str, by_method: Mapping[str, Mapping[str, float]], reference: str, margin: float, alpha: float
) -> Family:
    base = by_method.get(reference, {})
    others = [m for m in by_method if m != reference and by_method[m].keys() & base.keys()]
    differences = [
        np.array([by_method[m][s] - base[s] for s in sorted(by_method[m].keys() & base.keys())]) for m in others
    ]
    return Family(name, sum(map(len, by_method.values())), paired(others, differences, margin, alpha))


def _mean_of_tasks(scores: Scores) -> dict[str, dict[str, float]]:
    """Method -> seed -> mean score, of the seeds that a method has on every task."""
    everywhere = set.intersection(*(set(by_method) for by_method in scores.values()))
    found: dict[str, dict[str, float]] = {}
    for m in [m for m in next(iter(scores.values())) if m in everywhere]:
        seeds = set.intersection(*(set(by_method[m]) for by_method in scores.values()))
        if seeds:
            found[m] = {s: float(np.mean([by_method[m][s] for by_method in scores.values()])) for s in sorted(seeds)}
    return found


def _by_rows(scores: Scores, reference: str, rows: int, margin: float, alpha: float) -> list[Family]:
    if rows < 2:
        raise UserError(f"--rows {rows}: expected the number of test rows, 2 or more")
    found = []
    for task, by_method in scores.items():
        single = {m: next(iter(by_seed.values())) for m, by_seed in by_method.items()}
        if bad := [f"{m} {x:g}" for m, x in single.items() if not 0 <= x <= 1]:
            raise UserError(f"--rows: a score must be a share of the rows, 0 to 1, not {', '.join(bad[:3])}")
        if reference not in single:
            continue
        others = [m for m in single if m != reference]
        made = proportions(others, [single[m] for m in others], single[reference], rows, margin, alpha)
        found.append(Family(task, len(single), made))
    return found


def _reference(methods: Sequence[str], wanted: str | None) -> str:
    """The method to compare with: the one asked for, else lora, else the shortest name that begins with it."""
    if wanted is not None:
        if wanted not in methods:
            few = ", ".join(methods[:8]) + (f", ... ({len(methods)} methods)" if len(methods) > 8 else "")
            raise UserError(f"--reference {wanted!r} is no method of the file{hint(wanted, methods)}: there are {few}")
        return wanted
    alike = [m for m in methods if m.lower() == "lora"] or sorted(
        (m for m in methods if m.lower().startswith("lora")), key=len
    )
    if not alike:
        raise UserError(f"--reference: none of the methods is called lora; name one of {', '.join(methods[:8])}")
    return alike[0]


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; cells of a CSV are texts."""
    columns = tables.read_all(file)
    if not any(columns.values()):
        raise UserError(f"{file} has no rows")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _check_columns(file: Path, table: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    there = list(dict.fromkeys(key for row in table for key in row if key is not None))
    wrong = [f"{flag} {name!r}{hint(name, there)}" for flag, name in columns.items() if name not in there]
    if wrong:
        raise UserError(f"{file} has no column {', '.join(wrong)}: its columns are {', '.join(there)}")


def _scores(
    file: Path, table: Sequence[Mapping[str, Any]], method: str, score: str, seed: str | None, task: str | None
) -> Scores:
    found: Scores = {}
    wrong: list[str] = []
    for place, row in enumerate(table, 1):
        try:
            value = float(row[score])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            wrong.append(f"row {place} has {score} {row.get(score)!r}, no number")
            continue
        by_seed = found.setdefault("all" if task is None else str(row.get(task)), {}).setdefault(
            str(row.get(method)), {}
        )
        key = "" if seed is None else str(row.get(seed))
        if key in by_seed:
            more = "name the column of seeds with --seed" if seed is None else "each seed once"
            wrong.append(f"row {place} is a second score of {row.get(method)}: {more}")
            continue
        by_seed[key] = value
    if wrong:
        raise UserError(f"{file}: " + "; ".join(wrong[:10]) + (f"; {len(wrong) - 10} more" if len(wrong) > 10 else ""))
    return found
