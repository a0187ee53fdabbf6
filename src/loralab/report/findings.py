"""What a report is made of: a study, or any folder in which runs lie, read as a study of its own.

Runs of a plain folder that differ in nothing but the seed are one cell. What else differs is in the cell's label, so
no two settings are mixed; runs on other rows of a task, or over another base of that name, are not compared at all.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.disk import read_header
from loralab.errors import UserError
from loralab.run import Settings
from loralab.study import Planned, Study, load
from loralab.study.definition import MARGIN, Compare

COMPARE = {"alpha": Compare.alpha, "margin": {"default": MARGIN}, "against": Compare.against}
DEFAULTS = {f.name: f.default for f in dataclasses.fields(Settings)}
# settings that are not in a label: the cell says them, or they decide nothing
UNLABELLED = ("task", "model", "method", "seed", "data", "validation", "threads", "track", "checkpoint_every")
Found = tuple[str, dict[str, Any], dict[str, Any]]  # address, result.json, run.json


def read(folder: Path | str) -> Study:
    """The study of a folder, or one made of the runs in it. Raises UserError where there is no run."""
    folder = Path(folder)
    if (folder / "study.json").is_file():
        return load(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected a study, or a folder with runs of `loralab train`")
    found = [run for file in sorted(folder.rglob("result.json")) if (run := _run(file, folder))]
    if not found:
        raise UserError(f"{folder} holds no finished run: expected a study, or a folder with runs of `loralab train`")
    planned, doubles = _planned(found)
    unfinished = sum(not (file.parent / "result.json").exists() for file in folder.rglob("run.json"))
    told = {
        "{} with the settings and the seed of another run, which alone is counted": doubles,
        "{} not finished, and not counted": unfinished,
    }
    notes = tuple(note.format(f"{count} run" + "s" * (count > 1)) for note, count in told.items() if count)
    about = "Runs of a folder. They were not planned as one study, so nothing says that tuning was equal."
    return Study(folder, folder.resolve().name, about, folder, {}, dict(COMPARE), tuple(planned), notes)


def _run(file: Path, folder: Path) -> Found | None:
    """A run as it lies there; other tools write files of that name too."""
    result = read_header(file)
    if not {"task", "model", "method", "seed", "metric"} <= result.keys() or not file.with_name("run.json").is_file():
        return None
    return str(file.parent.relative_to(folder)), result, read_header(file.with_name("run.json"))


def _planned(found: Sequence[Found]) -> tuple[list[Planned], int]:
    """The runs as a study would name them, and how many repeat another."""
    tasks = dict(_named("task", "data", found))
    models = dict(_named("model", "base", found))
    groups: dict[tuple[str, str, str], list[Found]] = {}
    for run in found:
        groups.setdefault((tasks[run[0]], models[run[0]], run[1]["method"]), []).append(run)
    planned: dict[tuple[str, str, str, int], Planned] = {}
    for (task, model, method), runs in groups.items():
        for (address, result, _), label, settings in zip(runs, *_labels(method, runs), strict=True):
            plan = Planned(task, model, label, result["seed"], "final", settings, address, {})
            planned.setdefault((*plan.key, plan.seed), plan)
    return list(planned.values()), len(found) - len(planned)


def _named(key: str, of: str, found: Sequence[Found]) -> Iterator[tuple[str, str]]:
    """Address -> name, with the start of a hash where one name stands for several things."""
    hashes = {address: _hash(of, facts) for address, _, facts in found}
    several = {
        name for name in {result[key] for _, result, _ in found}
        if len({hashes[address] for address, result, _ in found if result[key] == name}) > 1
    }  # fmt: skip
    for address, result, _ in found:
        name = result[key]
        yield address, f"{name} ({of} {hashes[address][:6]})" if name in several else name


def _hash(of: str, facts: Mapping[str, Any]) -> str:
    data = facts.get("data", {})
    return str({"data": data.get("sha256"), "base": facts.get("base_sha256")}[of])


def _labels(method: str, runs: Sequence[Found]) -> tuple[list[str], list[dict[str, Any]]]:
    """The label of every run of one method: the method, and the settings in which its runs differ."""
    settings = [DEFAULTS | facts.get("settings", {}) for _, _, facts in runs]
    keys = [key for key in dict.fromkeys(k for s in settings for k in s) if key not in UNLABELLED]
    differ = [key for key in keys if len(Counter(str(s.get(key)) for s in settings)) > 1]
    labels = [" ".join([method, *(f"{key}={_value(s.get(key))}" for key in differ)]) for s in settings]
    return labels, settings


def _value(value: Any) -> str:
    return "default" if value is None else str(value)
