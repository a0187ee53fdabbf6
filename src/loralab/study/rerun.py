"""Repeat a run that is on record, and compare: the same settings, in another folder, on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loralab.disk import read_tensors
from loralab.errors import UserError
from loralab.recipe import OLD_FIELDS
from loralab.run import Settings, train
from loralab.run.bar import Reporter
from loralab.run.records import predictions_of, read_facts, read_history, read_result
from loralab.study.packed import PREDICTIONS
from loralab.study.toml import HINTS, converted

NOT_HERE = ("threads", "device", "checkpoint_every")  # they change no result, and are this machine's own


@dataclass(frozen=True)
class Repeat:
    """Two runs of one recipe: numbers of the first and the second by name, and what differs around them."""

    numbers: dict[str, tuple[float, float]]
    logits: float | None  # the largest difference of an output; None where one of them kept no predictions
    other_answers: int | None  # rows that are answered otherwise
    rows: int | None
    around: list[str]  # versions, hardware, precision and the number of runs in a pass that are not the same

    @property
    def same(self) -> bool:
        """Whether the two are one to the bit, as far as is known."""
        return not self.logits and all(a == b for a, b in self.numbers.values())

    @property
    def largest(self) -> float:
        """The largest difference of a number of the table."""
        return max((abs(a - b) for a, b in self.numbers.values()), default=0.0)


def settings_of(folder: Path) -> Settings:
    """The settings of a recorded run, also of older versions. Raises UserError for a run that this version lacks."""
    found: dict[str, Any] = {}
    known, wrong = {f.name for f in fields(Settings)}, []
    for old, value in read_facts(folder).get("settings", {}).items():
        key = OLD_FIELDS.get(old, old)
        if key not in known and value is not None:
            wrong.append(f"{old}={value!r}")
        if key not in known or key in NOT_HERE or value is None:
            continue
        try:
            found[key] = converted(value, HINTS[key], Path())
        except TypeError as error:
            wrong.append(f"{old}={value!r}, expected {error}")
    if wrong:
        raise UserError(f"{folder / 'run.json'} has settings that this version lacks: {', '.join(wrong)}")
    return Settings(**found)


def rerun(folder: Path, out: Path, data: Path | None = None, reporter: Reporter | None = None) -> Repeat:
    """Train the run of a folder again into `out` and compare the two.

    `data` is the folder of GLUE, where it lies elsewhere now. Raises UserError for a folder without a finished run, and
    for data or a base that are not those of the first run.
    """
    read_result(folder)
    s = settings_of(folder)
    s = replace(s, out=out, data=s.data if data is None else data)
    train(s, reporter)
    before, now = read_facts(folder), read_facts(out)
    for name, of in (("data", lambda facts: facts.get("data", {}).get("sha256")), ("base", _base)):
        if of(before) != of(now):
            raise UserError(f"{folder}: the {name} of that run had another hash, so this is another run")
    return compare(folder, out)


def _base(facts: Mapping[str, Any]) -> Any:
    return facts.get("base_sha256")


def compare(one: Path, other: Path) -> Repeat:
    """Compare two finished run folders. Raises UserError for a folder without one."""
    a, b = read_result(one), read_result(other)
    numbers = {a["metric"]["name"]: (a["metric"]["selected"], b["metric"]["selected"])}
    for x, y in zip(read_history(one), read_history(other), strict=False):
        numbers[f"training loss, epoch {x['epoch']:g}"] = x["train_loss"], y["train_loss"]
    found = [predictions_of(read_tensors(f / PREDICTIONS), f) for f in (one, other) if (f / PREDICTIONS).is_file()]
    logits = other_answers = rows = None
    if len(found) == 2 and found[0].keys() == found[1].keys():
        pairs = [(x, found[1][split][0]) for split, (x, _) in found[0].items() if x.shape == found[1][split][0].shape]
        logits = max((float((x - y).abs().max()) for x, y in pairs), default=None)
        classes = all(labels.ndim == 1 and not labels.is_floating_point() for _, labels in found[0].values())
        if pairs and classes:
            other_answers = sum(int((x.argmax(1) != y.argmax(1)).sum()) for x, y in pairs)
            rows = sum(len(x) for x, _ in pairs)
    facts = read_facts(one), read_facts(other)
    around = [
        f"{name}: {x} then, {y} now"
        for part in ("versions", "hardware")
        for name in dict.fromkeys([*facts[0].get(part, {}), *facts[1].get(part, {})])
        for x, y in [(facts[0].get(part, {}).get(name), facts[1].get(part, {}).get(name))]
        if x != y
    ]
    precision = [facts[i].get("precision") for i in (0, 1)]
    if precision[0] != precision[1]:
        around.append(f"precision: {precision[0]} then, {precision[1]} now")
    shared = [result["time"].get("together", 1) for result in (a, b)]
    if shared[0] != shared[1]:  # products of several runs in one are divided otherwise
        around.append(f"runs that shared its passes: {shared[0]} then, {shared[1]} now")
    return Repeat(numbers, logits, other_answers, rows, around)
