"""How the label column of a data file is read: the class names are texts, whatever they look like.

A label of a CSV or TSV is the text of its cell; of JSON and parquet a string as it is, and any other value its JSON
literal. So 007, 1.50, true, 0x1F and 2024-01-01 name classes, and a train file and a validation file in different
formats name the same ones. Class names that look like one value, as 1 and 1.0, are classes of their own; the notes of
the task name them.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from loralab.data.checks import NUMBER, Faults, any_text, convert, kind, literal, number, raise_faults, shown
from loralab.data.tables import UNTYPED
from loralab.disk import read_json
from loralab.errors import UserError
from loralab.schema import problems

FEW = 10  # values up to which scores, and above which numbers as classes, make the notes say how labels were read
UNEQUAL = 4  # times that the largest class is the smallest from which the notes say so
MISSING = {"nan", "null", "none", "na", "n/a", "<na>"}  # what tools write for a label that is not there


def check(value: Any) -> Any:
    """Return a label of a file as it is. Raises ValueError for one that is missing, or names nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("null")
    if isinstance(value, str):
        if not any_text(value).strip():
            raise ValueError("empty")
    elif not isinstance(value, bool | int | float | date | datetime | time | Decimal):
        raise ValueError(f"{kind(value)} instead of text, a number, true or false")
    elif isinstance(value, float):
        number(value)
    return value


def check_types(path: Path, column: str, values: Sequence[Any]) -> None:
    """Raise where a column mixes text, numbers, and true and false: 1 and "1" would be one class."""
    first: dict[str, Any] = {}
    for value in values:
        first.setdefault(kind(value), value)
    if len(first) > 1:
        kinds = " and ".join(f"{name} ({_json(value)})" for name, value in sorted(first.items()))
        raise UserError(f"{path}: column {column!r} mixes {kinds}: write all labels as one type")


def _json(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else literal(value)


def is_regression(path: Path, values: Sequence[Any]) -> bool:
    """Tell whether labels are scores: all are numbers, and one is written with a fraction or an exponent."""
    if path.suffix.lower() not in UNTYPED:
        return set(map(kind, values)) == {"number"} and any(isinstance(value, float | Decimal) for value in values)
    written = {value.strip() for value in values if value.strip().lower() not in MISSING}
    return all(NUMBER.fullmatch(x) for x in written) and any(mark in x for x in written for mark in ".eE")


def numbers(path: Path, column: str, values: Sequence[Any]) -> list[float]:
    """Return the labels of a regression. Raises UserError that names the rows without a number."""
    faults: Faults = {}
    scores = convert(values, number, f"column {column!r}: ", faults)
    advice = "a regression needs numbers: mend or remove these rows, or let the labels be classes"
    raise_faults(path, faults, advice)
    return scores


def class_names(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the different labels as texts: in the order of numbers where all are numbers, else sorted as text."""
    found = sorted({literal(value) for value in values})
    return tuple(sorted(found, key=float)) if all(map(NUMBER.fullmatch, found)) else tuple(found)


def class_ids(path: Path, names: Sequence[str], values: Sequence[Any]) -> list[int]:
    """Return the place of each label among the names. Raises UserError that names the rows of other labels."""
    faults: Faults = {}
    ids = convert(values, _identify(names), "label: ", faults)
    raise_faults(path, faults)
    return ids


def _identify(names: Sequence[str]) -> Callable[[Any], int]:
    ids = {name: place for place, name in enumerate(names)}
    alike = {_value(name): name for name in names}

    def identify(value: Any) -> int:
        name = literal(value)
        if name not in ids:
            near = f" (it has {shown(alike[_value(name)])})" if _value(name) in alike else ""
            raise ValueError(f"new value {shown(name)}, which train lacks{near},")
        return ids[name]

    return identify


def _value(name: str) -> str:
    """Return what a label reads as: equal for 1, 1.0 and 01, for true and True, for 0x1F and 31, for é and e."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    plain = " ".join("".join(c for c in letters if not unicodedata.combining(c)).split())
    digits = plain.removeprefix("0x")
    if digits != plain and digits and all(digit in "0123456789abcdef" for digit in digits):
        return repr(float(int(digits, 16)))
    return repr(float(plain) + 0.0) if NUMBER.fullmatch(plain) else plain


def notes(values: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    """Say how the labels were read, since a guess is involved, and which of them may be mistakes."""
    if names is None:
        scores = [number(value) for value in values]
        few = len(set(scores)) <= FEW and all(score.is_integer() for score in scores)
        hint = "; they look like classes: choose --problem-type classification if they are" if few else ""
        return [f"labels are read as a regression, {min(scores)} to {max(scores)}{hint}"]
    counts = Counter(map(literal, values))
    first = ", ".join(f"{name} ({counts[name]})" for name in names[:FEW]) + ", ..." * (len(names) > FEW)
    numeric = sum(NUMBER.fullmatch(name.strip()) is not None for name in names)
    perhaps_scores = len(names) > FEW and numeric > len(names) / 2
    hint = "; if they are scores, choose --problem-type regression" if perhaps_scores else ""
    missing = [
        f"{counts[name]} rows have the label {name!r}: remove them if it stands for a missing one"
        for name in names
        if name.strip().lower() in MISSING
    ]
    told = f"labels are read as {len(names)} classes: {first}{hint}"
    return [told, *missing, *look_alikes(names), *imbalance({name: counts[name] for name in names})]


def imbalance(counts: Mapping[str, int]) -> list[str]:
    """Say that classes are of very different size, given their rows."""
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[largest] < UNEQUAL * max(1, counts[smallest]):
        return []
    return [
        f"classes are unequal: {shown(largest)} has {counts[largest]} rows, {shown(smallest)} {counts[smallest]}; "
        "accuracy hides a class that is never predicted; for that `loralab train` has --class-weights balanced and "
        "--select-by f1_macro"
    ]


def read_map(path: Path) -> dict[str, str]:
    """Read a label map: a JSON object, label -> the label that it counts as. Raises UserError."""
    content = read_json(path)
    if wrong := problems(content, dict[str, str], "label map"):
        raise UserError(f'{path}: {"; ".join(wrong)}: expected an object such as {{"Pos": "pos"}}')
    return dict(content)


def look_alikes(names: Sequence[str]) -> list[str]:
    """Name the classes that other tools would take for one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_value(name), []).append(name)
    alike = [(" and ".join(map(shown, group)), dict.fromkeys(group[1:], group[0])) for group in groups.values()]
    return [
        f"{listed} are different classes: write them alike if they mean one, or merge them with --label-map FILE.json, "
        f"which holds {json.dumps(merged, ensure_ascii=False)}"
        for listed, merged in alike
        if merged
    ]
