"""Read a study from its TOML file: everything is checked before anything runs, and all problems are named at once.

What a setting may be is read off the type hints of `Settings` and of the methods, so there is no second list of it.
"""

import math
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from loralab import options
from loralab.data import tables
from loralab.data.endpoints import PARTS
from loralab.errors import UserError, hint
from loralab.objectives import METRICS
from loralab.recipe import NAMED
from loralab.run import Settings
from loralab.study.definition import (
    MARGIN,
    OF_RUN,
    RELATIVE,
    Compare,
    Definition,
    StudyMethod,
    StudyTask,
    Tune,
    grid_points,
    halving_problem,
)  # fmt: skip
from loralab.study.statistics.endpoint import NAMES as ENDPOINTS

HINTS = typing.get_type_hints(Settings)
OF_TASK = ("task", "text", "label", "problem_type", "validation")
NOT_YOURS = {  # settings that the study itself decides
    "seed": "seeds = [...] of the study gives it",
    "model": "models = [...] of the study gives it",
    "data": "data = ... of the study gives it",
    "out": "runs lie in the store",
    "resume": "a study always goes on",
    "set": "write the setting itself, as wait = 20",
}
OF_METHOD = tuple(name for name in options.names() if name not in OF_RUN)
FREE = (*(key for key in HINTS if key not in (*OF_TASK, *NOT_YOURS)), *OF_METHOD)  # for protocol, tasks and methods
GRID = (*FREE, RELATIVE)
TOP = (
    "name", "about", "tasks", "models", "methods", "seeds", "data", "store", "adapters", "packed", "registered",
    "protocol", "tune", "compare",
)  # fmt: skip
LARGEST_SEED = 2**32 - 1  # numpy's
LONGEST_FORM = 6  # characters of the format of a setting in a name
NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false", Path: "a path"}


class Problems(list[str]):
    """All that is wrong with a study."""

    def add(self, where: str, message: str) -> None:
        if (line := f"{where}: {message}") not in self:
            self.append(line)

    def unknown_keys(self, where: str, table: Mapping[str, Any], allowed: Collection[str]) -> None:
        """Name each key that is not allowed, with the nearest that is, or all there are."""
        for key in table:
            if key in allowed:
                continue
            meant = f": {NOT_YOURS[key]}" if key in NOT_YOURS else hint(key, allowed)
            self.add(where, f"no {key!r}{meant or ': there are ' + ', '.join(allowed)}")

    def table(self, where: str, value: Any, example: str) -> dict[str, Any]:
        """A table, {} for anything else."""
        if isinstance(value, dict):
            return dict(value)
        self.add(where, f"{value!r}: expected a table, as {example}")
        return {}

    def typed(self, where: str, value: Any, kind: Any, default: Any, base: Path = Path()) -> Any:
        """The value as its type wants it, the default for a wrong one."""
        try:
            return converted(value, kind, base)
        except TypeError as error:
            self.add(where, f"{value!r}: expected {error}")
            return default

    def settings(self, where: str, table: Mapping[str, Any], base: Path) -> dict[str, Any]:
        """The settings of a table that are of the right type; paths are relative to `base`."""
        found = {}
        for key, value in table.items():
            try:
                found[key] = converted(value, HINTS[key] if key in HINTS else method_types()[key], base)
            except TypeError as error:
                self.add(where, f"{key}={value!r}: expected {error}")
        return found

    def names(self, where: str, value: Any, example: str) -> tuple[str, ...]:
        """One text or a list of different texts, none of them empty."""
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(x, str) and x for x in names):
            self.add(where, f"{value!r}: expected names, as [{example!r}]")
            return ()
        return tuple(names)

    def different(self, where: str, labels: Sequence[str]) -> None:
        if twice := sorted({x for x in labels if labels.count(x) > 1}):
            self.add(where, f"{', '.join(twice)} named twice: give each its own name")


# ---- values ----------------------------------------------------------------------------------------------------------


@cache
def method_types() -> dict[str, Any]:
    """Setting of a method -> its type, a union where methods differ."""
    found: dict[str, Any] = {}
    for method in NAMED:
        for name, option in options.options(method).items():
            found[name] = found[name] | option.type if name in found else option.type
    return found


def converted(value: Any, kind: Any, base: Path) -> Any:
    """The value as its type wants it; TypeError says what was expected."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return _of_union(value, [k for k in typing.get_args(kind) if k is not types.NoneType], base)
    if typing.get_origin(kind) is Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        raise TypeError(" or ".join(map(repr, typing.get_args(kind))))
    if typing.get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(x, str) for x in values):
            return tuple(values)
        raise TypeError("text or a list of texts")
    return _plain(value, kind, base)


def _of_union(value: Any, kinds: Sequence[Any], base: Path) -> Any:
    expected = []
    for kind in kinds:
        try:
            return converted(value, kind, base)
        except TypeError as error:
            expected.append(str(error))
    raise TypeError(" or ".join(dict.fromkeys(expected)))


def _plain(value: Any, kind: Any, base: Path) -> Any:
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is Path and isinstance(value, str) and value and "\0" not in value:
        return base / value
    if kind is not float and type(value) is kind:
        return value
    raise TypeError(NAMES.get(kind, str(kind)))


def _whole(problems: Problems, where: str, value: Any, default: int, least: int, most: float = math.inf) -> int:
    if type(value) is int and least <= value <= most:
        return value
    limit = f"{least} or more" if most == math.inf else f"{least} to {most}"
    problems.add(where, f"{value!r}: expected a whole number, {limit}")
    return default


# ---- the file --------------------------------------------------------------------------------------------------------


def read(file: Path, **flags: Any) -> Definition:
    """Read the study of a file, with the flags that were passed in the place of its entries.

    Raises UserError, with every problem at once.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} is no TOML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply to be a study") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text: expected a TOML file") from error
    return define(table, file.stem, file.parent, **flags)


def define(table: dict[str, Any], name: str, base: Path, **flags: Any) -> Definition:
    """The study of a parsed file; paths in it are relative to `base`. Raises UserError with every problem at once."""
    problems = Problems()
    problems.unknown_keys("study", table, TOP)
    flags = {key: value for key, value in flags.items() if value not in (None, ())}
    definition = Definition(
        name=_name(table.get("name", name), problems),
        about=problems.typed("about", table.get("about", ""), str, ""),
        tasks=_tasks(table.get("tasks"), flags.get("tasks", ()), base, problems),
        methods=_methods(table.get("methods"), base, problems),
        models=_models(table.get("models", ["minilm"]), flags.get("models", ()), base, problems),
        seeds=_seeds(list(flags["seeds"]) if "seeds" in flags else table.get("seeds", [0, 1, 2]), problems),
        data=flags.get("data")
        or (problems.typed("data", table["data"], Path, None, base) if "data" in table else None),
        store=flags.get("store") or problems.typed("store", table.get("store", "runs/store"), Path, Definition.store),
        adapters=problems.typed("adapters", table.get("adapters", True), bool, True),
        packed=problems.typed("packed", table.get("packed", False), bool, False),
        registered=problems.typed("registered", table.get("registered", False), bool, False),
        dtype=flags.get("dtype"),
        protocol=_protocol(table.get("protocol", {}), base, problems),
        tune=_tune(table.get("tune", {}), base, problems),
        compare=_compare(table.get("compare", {}), problems),
    )
    _check_runs(definition, problems)
    if problems:
        raise UserError(f"{base / name}.toml: " + "; ".join(problems))
    return definition


def _name(value: Any, problems: Problems) -> str:
    if isinstance(value, str) and value.strip() and not set(value) & set("/\\\0") and value not in (".", ".."):
        return value
    problems.add("name", f"{value!r}: expected text that can name a folder")
    return "study"


def _models(value: Any, wanted: Sequence[str], base: Path, problems: Problems) -> tuple[str, ...]:
    """A folder of the file, written ./NAME, is relative to the file."""
    of_file = problems.names("models", value, "minilm")  # also checked where flags replace it
    models = tuple(wanted) or tuple(str(base / x) if x.startswith(".") else x for x in of_file)
    problems.different("models", models)
    return models


def _tasks(value: Any, wanted: Sequence[str], base: Path, problems: Problems) -> tuple[StudyTask, ...]:
    """Tasks of the file, names or tables; with flags those named, with the file's settings where it has the task."""
    entries = [] if value is None and wanted else [value] if isinstance(value, str) and value else value
    if not isinstance(entries, list) or not all(isinstance(x, str | dict) for x in entries) or not (entries or wanted):
        example = "['cola', { task = 'sst2', train_rows = 4000 }]"
        problems.add("tasks", f"{value!r}: expected names or tables, as {example}")
        entries = []
    tables = [{"task": x} if isinstance(x, str) else dict(x) for x in entries]
    tasks = [_task(f"tasks {place}", table, base, problems) for place, table in enumerate(tables, 1)]
    problems.different("tasks", [task.label for task in tasks])
    if not wanted:
        return tuple(tasks)
    named = {task.label: task for task in tasks}
    chosen = [named.get(x, StudyTask(_stem(x), {"task": x})) for x in wanted]
    problems.different("tasks", [task.label for task in chosen])
    return tuple(chosen)


def _task(where: str, table: dict[str, Any], base: Path, problems: Problems) -> StudyTask:
    label = _label(where, table, problems)
    problems.unknown_keys(where, table, ("name", *OF_TASK, *FREE))
    if table.get("task", "") == "":
        problems.add(where, "no 'task': a GLUE name or a file")
    settings = problems.settings(where, {key: x for key, x in table.items() if key in (*OF_TASK, *FREE)}, base)
    task = settings.get("task", "")
    settings["task"] = str(base / task) if _is_file(task) else task  # a file is relative to the study's own
    return StudyTask(label or _stem(task), settings)


def _label(where: str, table: dict[str, Any], problems: Problems) -> str | None:
    """Take the name out of the table of a task or method."""
    label = table.pop("name", None)
    if label is None or (isinstance(label, str) and label):
        return label
    problems.add(where, f"name={label!r}: expected text")
    return None


def _is_file(task: str) -> bool:
    return Path(task).suffix.lower() in tables.READERS


def _stem(task: str) -> str:
    return Path(task).stem if _is_file(task) else task


def _methods(value: Any, base: Path, problems: Problems) -> tuple[StudyMethod, ...]:
    if not isinstance(value, list) or not value:
        got = "" if value is None else f"{value!r}: "
        problems.add("methods", f"{got}expected one or more, as [[methods]] or as names: methods = ['full', 'lora']")
        return ()
    methods: list[StudyMethod] = []
    for place, entry in enumerate(value, 1):
        table = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(table, dict):
            problems.add(f"methods {place}", f"{entry!r}: expected a table or a name")
            continue
        methods += _each(f"methods {place}", dict(table), base, problems)
    problems.different("methods", [method.label for method in methods])
    return tuple(methods)


def _each(where: str, table: dict[str, Any], base: Path, problems: Problems) -> list[StudyMethod]:
    """The methods of an entry: one, or with `each = {rank = [1, 2]}` one for every point."""
    label = _label(where, table, problems)
    each, own = table.pop("each", {}), table.pop("tune", None)
    problems.unknown_keys(where, table, ("name", "each", "tune", *FREE))
    settings = problems.settings(where, {key: x for key, x in table.items() if key in FREE}, base)
    axes = _grid(f"{where} each", each, FREE, base, problems)
    for key in [key for key, values in axes.items() if isinstance(values, dict)]:
        problems.add(f"{where} each", f"{key}={axes.pop(key)}: expected a list of values")
    if fixed := sorted(axes.keys() & settings.keys()):
        problems.add(where, f"{', '.join(fixed)} is set and also in each: leave one out")
    grid = None if own is None else _grid(f"{where} tune", own, GRID, base, problems)
    methods = []
    for point in grid_points(axes) or [{}]:
        chosen = {**settings, **point}
        default = " ".join([str(chosen.get("method", "lora")), *(f"{key}={x}" for key, x in point.items())])
        try:
            methods.append(StudyMethod(_filled(label, chosen) if label else default, chosen, grid))
        except KeyError as error:
            problems.add(where, f"name={label!r}: {error} is not among {', '.join(chosen)}")
        except (IndexError, ValueError, AttributeError, TypeError) as error:
            problems.add(where, f"name={label!r}: {error}; expected settings as {{rank}}, and other braces doubled")
    return methods


def _filled(label: str, chosen: Mapping[str, Any]) -> str:
    """The name with settings in the places of {rank} or {lr:g}; what str.format raises, or ValueError."""
    for _, field, form, _ in Formatter().parse(label):
        if field and not field.isidentifier():
            raise ValueError(f"{{{field}}} is no setting")
        if form and ("{" in form or len(form) > LONGEST_FORM):  # a width of ten digits would fill the memory
            raise ValueError(f"the format {form!r} is not a short one such as g or .3f")
    return label.format(**chosen)


def _grid(where: str, value: Any, allowed: Collection[str], base: Path, problems: Problems) -> dict[str, Any]:
    """Setting -> list of values, or a range {low, high, log}."""
    table = problems.table(where, value, "{lr = [1e-4, 1e-3]}")
    problems.unknown_keys(where, table, allowed)
    found: dict[str, Any] = {}
    for key, values in table.items():
        if key not in allowed:
            continue
        kind = float if key == RELATIVE else HINTS[key] if key in HINTS else method_types()[key]
        if isinstance(values, dict):
            found[key] = _range(f"{where} {key}", values, kind, problems)
        elif not isinstance(values, list) or not values:
            problems.add(where, f"{key}={values!r}: expected a list of values")
        else:
            wrong = object()
            typed = [problems.typed(f"{where} {key}", x, kind, wrong, base) for x in values]
            found[key] = [x for x in typed if x is not wrong]
            if len({repr(x) for x in found[key]}) < len(found[key]):
                problems.add(where, f"{key}={values!r} has a value twice")
    return {key: values for key, values in found.items() if values}


def _range(where: str, table: dict[str, Any], kind: Any, problems: Problems) -> dict[str, Any]:
    """A range of numbers of a setting's type."""
    problems.unknown_keys(where, table, ("low", "high", "log"))
    if not {"low", "high"} <= table.keys():
        problems.add(where, f"{table}: a range needs low and high")
        return {}
    if not {int, float} & {kind, *typing.get_args(kind)}:
        problems.add(where, f"{table}: the setting is no number; expected a list of values")
        return {}
    count = len(problems)
    log = problems.typed(f"{where} log", table.get("log", False), bool, False)
    low, high = (problems.typed(f"{where} {key}", table[key], kind, 1) for key in ("low", "high"))
    if len(problems) == count and not low < high:
        problems.add(where, f"low={low}, high={high}: expected low below high")
    if len(problems) == count and log and low <= 0:
        problems.add(where, f"low={low} with log = true: expected above 0")
    return {"low": low, "high": high, "log": log}


def _seeds(value: Any, problems: Problems) -> tuple[int, ...]:
    seeds = tuple(value) if isinstance(value, list) else ()
    if (
        not seeds
        or any(type(x) is not int or not 0 <= x <= LARGEST_SEED for x in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        problems.add("seeds", f"{value!r}: expected different whole numbers, 0 to {LARGEST_SEED}, as [0, 1, 2]")
        return (0,)
    return seeds


def _protocol(value: Any, base: Path, problems: Problems) -> dict[str, Any]:
    table = problems.table("protocol", value, "[protocol] with epochs = 3")
    problems.unknown_keys("protocol", table, FREE)
    return problems.settings("protocol", {key: x for key, x in table.items() if key in FREE}, base)


def _tune(value: Any, base: Path, problems: Problems) -> Tune:
    table = problems.table("tune", value, "[tune] with lr_times = [0.3, 1.0, 3.0]")
    search, trials, seed = (table.pop(key, getattr(Tune, key)) for key in ("search", "trials", "seed"))
    problems.unknown_keys("tune", table, ("search", "trials", "seed", *GRID))
    known = {key: x for key, x in table.items() if key in GRID}
    kind = typing.get_type_hints(Tune)["search"]
    search = problems.typed("tune search", search, kind, Tune.search)
    last = LARGEST_SEED - (len(Tune(search=search).seeds) - 1)  # the next rung of halving has the next seed
    return Tune(
        _grid("tune", known, GRID, base, problems),
        search,
        _whole(problems, "tune trials", trials, Tune.trials, 1),
        _whole(problems, "tune seed", seed, Tune.seed, 0, last),
    )


def _compare(value: Any, problems: Problems) -> Compare:
    table = problems.table("compare", value, "[compare] with margin = 0.01")
    problems.unknown_keys("compare", table, tuple(f.name for f in fields(Compare)))
    alpha, margin = table.get("alpha", Compare.alpha), table.get("margin", {})
    margins = margin if isinstance(margin, dict) else {"default": margin}
    problems.unknown_keys("compare margin", margins, (*METRICS, *PARTS, "default"))
    if type(alpha) is not float or not 0 < alpha < 1:
        problems.add("compare", f"alpha={alpha!r}: expected a number between 0 and 1")
        alpha = Compare.alpha
    for key, x in margins.items():
        if type(x) not in (int, float) or not 0 < x < math.inf:
            problems.add("compare margin", f"{key}={x!r}: expected a number above 0, in units of the metric")
    labels: dict[str, str | None] = {}
    for key in ("against", "reference"):
        labels[key] = table.get(key)
        if labels[key] is not None and not isinstance(labels[key], str):
            problems.add("compare", f"{key}={labels[key]!r}: expected the name of a method")
            labels[key] = None
    kind = typing.get_type_hints(Compare)["family"]
    family = problems.typed("compare family", table.get("family", Compare.family), kind, Compare.family)
    sd = table.get("sd")
    if sd is not None and (type(sd) not in (int, float) or not 0 < sd < math.inf):
        problems.add("compare", f"sd={sd!r}: expected a number above 0, the spread of a paired difference over seeds")
        sd = None
    endpoints = _endpoints(table.get("endpoints", list(Compare.endpoints)), problems)
    for key in sorted({"family", "endpoints"} & table.keys() if labels["reference"] is None else set()):
        problems.add("compare", f"{key} is of planned contrasts, which need a reference")
    return Compare(alpha, {"default": MARGIN, **margins}, **labels, family=family, endpoints=endpoints, sd=sd)


def _endpoints(value: Any, problems: Problems) -> tuple[str, ...]:
    endpoints = problems.names("compare endpoints", value, "selected")
    problems.unknown_keys("compare endpoints", dict.fromkeys(endpoints), (*ENDPOINTS, *METRICS))
    problems.different("compare endpoints", endpoints)
    return endpoints or Compare.endpoints


# ---- the parts together ----------------------------------------------------------------------------------------------


def _check_runs(d: Definition, problems: Problems) -> None:
    """What only shows when the parts are put together: make the settings of every run once, and throw them away."""
    labels = [method.label for method in d.methods]
    for key, named in (("against", d.compare.against), ("reference", d.compare.reference)):
        if named is not None and labels:
            problems.unknown_keys(f"compare {key}", {named: None}, labels)
    shared = sorted({*d.seeds} & {*d.tune.seeds})
    if shared and any(d.grid(method) for method in d.methods):
        which = f"{', '.join(map(str, shared))} of tuning too"
        problems.add("seeds", f"{which}: a reported run would be chosen by its own luck; give tune another seed")
    for method in d.methods:
        _check_tuning(d, method, problems)
        ranged = any(isinstance(values, dict) for values in d.grid(method).values())
        for task in d.tasks:
            for tried in [{}] if ranged else grid_points(d.grid(method)) or [{}]:
                try:
                    d.settings(task, d.models[0] if d.models else "", method, d.seeds[0], tried)
                except UserError as error:
                    problems.add(f"method {method.label}", str(error))


def _check_tuning(d: Definition, method: StudyMethod, problems: Problems) -> None:
    grid, where = d.grid(method), f"method {method.label}"
    if fixed := sorted(set(grid) & set(method.settings)):
        problems.add(where, f"{', '.join(fixed)} is both set and tuned: leave one out, or give it its own tune = {{}}")
    if grid and d.tune.search == "halving" and (why := halving_problem(grid)):
        problems.add(where, f"search = 'halving' {why}")
        return
    ranged = [key for key, values in grid.items() if isinstance(values, dict)]
    if ranged and d.tune.search != "optuna":
        problems.add(where, f"{', '.join(ranged)} is a range: only search = 'optuna' knows what to do with it")
