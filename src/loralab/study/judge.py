"""The planned contrasts of a study, on anybody's results: a table of methods and scores, perhaps of seeds and tasks.

Each method is compared with one reference. With seeds the comparison is paired by seed and task, on the mean of tasks
first and by task after it, where all tasks are one family. With one run a method, `rows` test rows say what the luck of
the rows alone allows.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.data import checks, tables
from loralab.data.metrics import LOWER_IS_BETTER
from loralab.errors import UserError, hint
from loralab.schema import listed
from loralab.study.statistics.contrasts import Contrast, mirrored, paired, proportions, signs_agree, with_signs
from loralab.study.statistics.estimates import evened

MEAN, ALL = "mean of tasks", ""  # ALL: where no column names tasks


@dataclass(frozen=True)
class Family:
    """The contrasts of one task, or of the mean of tasks."""

    name: str  # a task, or the mean of them
    contrasts: list[Contrast]
    runs: list[int]  # of each contrast: the pairs of scores in it
    corrected_over: int  # tests that Holm's correction counts: those of all tasks together, or of their mean


@dataclass(frozen=True)
class Judgement:
    """What results say about methods against a reference."""

    reference: str
    by: str  # what was resampled or repeated: seeds, or rows
    alpha: float
    margin: float
    lower_is_better: bool
    families: list[Family]
    notes: list[str]


Scores = dict[str, dict[str, dict[str, float]]]  # task -> method -> seed -> score
Left = dict[str, list[str]]  # why something does not count -> what
WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")  # of the name of a column: eval_loss, valLoss, WER
LOWER_WORDS = LOWER_IS_BETTER | {"ppl", "error", "wer", "cer", "mse", "rmse", "mae"}
SHOWN = 5  # things that a note or an error names


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
    lower_is_better: bool = False,
) -> Judgement:
    """Compare the methods of a CSV, TSV, JSON, JSONL or parquet file; the arguments name its columns.

    Differences are those of the scores as they are; with `lower_is_better` one below 0 is better. `rows` is the number
    of test rows behind each score, for results with one run a method; scores are then shares of them. Raises UserError
    for columns that are not there, scores that are no numbers, and results that cannot be tested.
    """
    columns = {"--method": method, "--score": score, "--seed": seed, "--task": task}
    named = {flag: name for flag, name in columns.items() if name is not None}
    _check(named, margin, alpha)
    scores = _scores(file, _read(file, named), method, score, seed, task)
    methods = list(dict.fromkeys(m for by_method in scores.values() for m in by_method))
    chosen = _reference(methods, reference)
    if len(methods) == 1:
        raise UserError(f"{file} has one method, {chosen}: there is nothing to compare it with")
    families, by, notes = _families(file, scores, chosen, rows, margin, alpha)
    if lower_is_better:
        families = [replace(f, contrasts=[mirrored(c) for c in f.contrasts]) for f in families]
    elif told := LOWER_WORDS & {word.lower() for word in WORD.findall(score)}:
        notes.insert(0, f"{score}: larger is taken for better; if a lower {min(told)} is, say --lower-is-better")
    if reference is None:
        notes.insert(0, f"the reference is {chosen}; another with --reference")
    highest = max(abs(x) for by_method in scores.values() for by_seed in by_method.values() for x in by_seed.values())
    if highest > 1:
        notes.append(f"scores go up to {highest:g}: the margin of {margin:g} is in the same units")
    return Judgement(chosen, by, alpha, margin, lower_is_better, families, notes)


def _families(
    file: Path, scores: Scores, reference: str, rows: int | None, margin: float, alpha: float
) -> tuple[list[Family], str, list[str]]:
    """The families with a contrast, what they are tested over, and what does not count."""
    left: Left = {}
    here = {task: by_method for task, by_method in scores.items() if reference in by_method}
    if without := [task for task in scores if task not in here]:
        left[f"{reference} has no score on these tasks, which are left out"] = without
    most = max(len(by_seed) for by_method in scores.values() for by_seed in by_method.values())
    if most > 1:
        families, by = _by_seed(here, reference, margin, alpha, left), "seeds"
    elif rows is not None:
        families, by = _by_rows(here, reference, rows, margin, alpha), "rows"
    else:
        raise UserError(
            f"{file}: one score for each method says nothing of luck: name the column of seeds with --seed, or give "
            "the number of test rows with --rows"
        )
    families = [f for f in families if f.contrasts]
    notes = [f"{why}: {listed(what, SHOWN)}" for why, what in left.items()]
    if not families:
        raise UserError(f"{file}: nothing can be compared with {reference}: {'; '.join(notes)}")
    if by == "rows":
        notes.append("one run a method: only the luck of the test rows is tested, not that of the seed")
    elif rows is not None:
        notes.append("--rows is not used: methods have several seeds, and their luck is tested")
    if signs := signs_agree([(_named(c.method, f.name), c) for f in families for c in f.contrasts], alpha):
        notes.append(signs)
    if still := [_named(c.method, f.name) for f in families for c in f.contrasts if math.isnan(c.p)]:
        why = "too few right or wrong answers" if by == "rows" else "one seed, or differences that do not vary"
        notes.append(f"not tested, {why}: {listed(still, SHOWN)}")
    return families, by, notes


def _by_seed(scores: Scores, reference: str, margin: float, alpha: float, left: Left) -> list[Family]:
    """The mean of tasks first, where there are several, then each task; the tasks are corrected together."""
    found = []
    if len(scores) > 1:
        means = _mean_of_tasks(scores)
        everywhere = dict.fromkeys(m for by_method in scores.values() for m in by_method)
        if lacking := [m for m in everywhere if m not in means]:
            left["not in the mean, without a seed on every task"] = lacking
        found += _tested({MEAN: _differences(MEAN, means, reference, left)}, margin, alpha)
    return found + _tested({t: _differences(t, own, reference, left) for t, own in scores.items()}, margin, alpha)


def _differences(
    name: str, by_method: Mapping[str, Mapping[str, float]], reference: str, left: Left
) -> dict[str, NDArray[Any]]:
    """Method -> (seeds,) its differences to the reference, on the seeds that both have."""
    base = by_method.get(reference, {})
    shared = {m: sorted(by_method[m].keys() & base.keys()) for m in by_method if m != reference}
    for m, seeds in shared.items():
        if not seeds:
            left.setdefault(f"left out, no seed in common with {reference}", []).append(_named(m, name))
        elif len(seeds) < max(len(by_method[m]), len(base)):
            left.setdefault(f"compared on the seeds that {reference} has too", []).append(_named(m, name))
    found = {}
    for m, seeds in shared.items():
        own, other = (np.array([scores[s] for s in seeds]) for scores in (by_method[m], base))
        if seeds:
            found[m] = evened(own - other, float(np.abs([own, other]).max()))
    return found


def _tested(families: Mapping[str, Mapping[str, NDArray[Any]]], margin: float, alpha: float) -> list[Family]:
    """The contrasts of (seeds,) differences, corrected over all of these families together."""
    names = [m for own in families.values() for m in own]
    differences = [d for own in families.values() for d in own.values()]
    made = with_signs(paired(names, differences, margin, alpha), differences, alpha)
    return _parts(made, {name: [len(d) for d in own.values()] for name, own in families.items()})


def _parts(contrasts: Sequence[Contrast], runs: Mapping[str, list[int]]) -> list[Family]:
    """The families that contrasts which were corrected together belong to, in their order."""
    rest, tested = iter(contrasts), sum(not math.isnan(c.p) for c in contrasts)
    return [Family(name, [next(rest) for _ in own], own, tested) for name, own in runs.items()]


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
    """Each task, all corrected together."""
    if rows < 2:
        raise UserError(f"--rows {rows}: expected the number of test rows, 2 or more")
    single = {task: {m: next(iter(s.values())) for m, s in by_method.items()} for task, by_method in scores.items()}
    if bad := [f"{m} {x:g}" for own in single.values() for m, x in own.items() if not 0 <= x <= 1]:
        raise UserError(f"--rows: a score must be a share of the rows, 0 to 1, not {', '.join(bad[:3])}")
    found = [(m, x, own[reference]) for own in single.values() for m, x in own.items() if m != reference]
    methods, own_scores, base = [m for m, _, _ in found], [x for _, x, _ in found], [x for _, _, x in found]
    made = proportions(methods, own_scores, base, rows, margin, alpha)
    return _parts(made, {task: [1] * (len(own) - 1) for task, own in single.items()})


def _named(method: str, family: str) -> str:
    return method if family == ALL else f"{method} ({family})"


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


def _read(file: Path, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of a file with the columns that flags name, and no others; cells of a CSV are texts."""
    there = tables.names(file)
    if not there:
        raise UserError(f"{file} has no rows")
    if wrong := [f"{flag} {name!r}{hint(name, there)}" for flag, name in wanted.items() if name not in there]:
        listed = ", ".join(map(checks.one_line, filter(None, dict.fromkeys(there))))
        raise UserError(f"{file} has no column {', '.join(wrong)}: its columns are {listed or 'none'}")
    columns = tables.read(file, list(wanted.values()))
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _check(columns: Mapping[str, str], margin: float, alpha: float) -> None:
    wrong = []
    flags: dict[str, list[str]] = {}
    for flag, name in columns.items():
        flags.setdefault(name, []).append(flag)
    wrong += [f"{' and '.join(same)} are both {name!r}" for name, same in flags.items() if len(same) > 1]
    if not 0 < margin < math.inf:
        wrong.append(f"--margin {margin:g}: expected a number above 0, in units of the score")
    if not 0 < alpha < 1:
        wrong.append(f"--alpha {alpha:g}: expected a number between 0 and 1")
    if wrong:
        raise UserError("; ".join(wrong))


def _scores(
    file: Path, table: Sequence[Mapping[str, Any]], method: str, score: str, seed: str | None, task: str | None
) -> Scores:
    found: Scores = {}
    wrong: list[str] = []
    for place, row in enumerate(table, 1):
        names = {c: _text(row[c]) for c in (method, seed, task) if c is not None}
        try:
            value = checks.number(row[score])
        except ValueError:
            wrong.append(f"row {place} has {score} {checks.shown(row[score])}, no number")
            continue
        if task is not None and names[task] == MEAN:
            wrong.append(f"row {place} has the {task} {MEAN!r}, which is the mean over them here: call it otherwise")
            continue
        if empty := [c for c, name in names.items() if not name]:
            wrong.append(f"row {place} has no {' and no '.join(empty)}")
            continue
        by_seed = found.setdefault(names[task] if task else ALL, {}).setdefault(names[method], {})
        key = names[seed] if seed else ""
        if key in by_seed:
            more = "name the column of seeds with --seed" if seed is None else "each seed once"
            wrong.append(f"row {place} is a second score of {names[method]}: {more}")
            continue
        by_seed[key] = value
    if wrong:
        raise UserError(f"{file}: {'; '.join(wrong[:SHOWN])}" + f"; {len(wrong) - SHOWN} more" * (len(wrong) > SHOWN))
    return found


def _text(cell: Any) -> str:
    """A name as it is in a file, without blanks around it; none of an empty cell."""
    return "" if cell is None or cell != cell else str(cell).strip()
