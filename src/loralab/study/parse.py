"""A study from its TOML file: everything is checked before anything runs, and all that is wrong is said at once."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.data import METRICS, tables
from loralab.errors import UserError
from loralab.study.definition import GRID, MARGIN, RELATIVE, Compare, Definition, Row, Tune, trials
from loralab.study.values import FREE, OF_TASK, Problems

TOP = (
    "name",
    "about",
    "tasks",
    "models",
    "methods",
    "seeds",
    "data",
    "store",
    "adapters",
    "protocol",
    "tune",
    "compare",
)


def read(file: Path, **flags: Any) -> Definition:
    """The study of a file, with the flags that were given in the place of its entries."""
    try:
        table = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} is no TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text: expected a TOML file") from error
    return define(table, file.stem, file.parent, **flags)


def define(table: dict[str, Any], name: str, base: Path, **flags: Any) -> Definition:
    """The study of a parsed file; paths in it are relative to `base`."""
    wrong = Problems()
    wrong.known("study", table, TOP)
    given = {**table, **{key: value for key, value in flags.items() if value not in (None, ())}}
    definition = Definition(
        name=str(given.get("name", name)),
        about=str(given.get("about", "")),
        tasks=_tasks(table.get("tasks"), flags.get("tasks") or (), base, wrong),
        methods=_methods(given.get("methods"), base, wrong),
        models=_models(table.get("models", ["minilm"]), flags.get("models") or (), base, wrong),
        seeds=_seeds(given.get("seeds", [0, 1, 2]), wrong),
        data=flags.get("data") or (base / str(table["data"]) if "data" in table else None),
        store=Path(given.get("store", Definition.store)),
        adapters=_bool("adapters", given.get("adapters", True), wrong),
        protocol=_protocol(table.get("protocol", {}), base, wrong),
        tune=_tune(table.get("tune", {}), base, wrong),
        compare=_compare(table.get("compare", {}), wrong),
    )
    _check(definition, wrong)
    if wrong:
        raise UserError(f"{base / name}.toml: " + "; ".join(wrong))
    return definition


def _models(value: Any, wanted: Sequence[str], base: Path, wrong: Problems) -> tuple[str, ...]:
    """A folder of the file, written ./NAME, is relative to the file."""
    of_file = [str(base / x) if x.startswith(".") else x for x in ([] if wanted else wrong.strings("models", value))]
    return _unique("models", tuple(wanted) or tuple(of_file), wrong)


def _tasks(value: Any, wanted: Sequence[str], base: Path, wrong: Problems) -> tuple[Row, ...]:
    """Rows of the file, names or tables; of flags those named, with the file's own settings where it has the task."""
    given = [] if value is None and wanted else value
    if not isinstance(given, list) or not all(isinstance(x, str | dict) for x in given) or not (given or wanted):
        wrong.say("tasks", f"{value!r}: expected names or tables, as ['cola', {{ task = 'sst2', train_rows = 4000 }}]")
        given = []
    rows = [_task(i, {"task": x} if isinstance(x, str) else dict(x), base, wrong) for i, x in enumerate(given, 1)]
    named = {row.label: row for row in rows}
    _unique("tasks", tuple(row.label for row in rows), wrong)
    return tuple(named.get(x, Row(_stem(x), {"task": x})) for x in wanted) if wanted else tuple(rows)


def _task(place: int, table: dict[str, Any], base: Path, wrong: Problems) -> Row:
    where = f"tasks {place}"
    label = table.pop("name", None)
    wrong.known(where, table, ("name", *OF_TASK, *FREE))
    if "task" not in table:
        wrong.say(where, "no 'task': a GLUE name or a file")
    settings = wrong.settings(where, {key: x for key, x in table.items() if key in (*OF_TASK, *FREE)}, base)
    settings["task"] = _place(settings.get("task", ""), base)
    return Row(str(label or _stem(settings["task"])), settings)


def _place(task: str, base: Path) -> str:
    """A file is relative to the study's own."""
    return str(base / task) if Path(task).suffix.lower() in tables.READERS else task


def _stem(task: str) -> str:
    return Path(task).stem if Path(task).suffix.lower() in tables.READERS else task


def _methods(value: Any, base: Path, wrong: Problems) -> tuple[Row, ...]:
    if not isinstance(value, list) or not value:
        wrong.say("methods", "expected one or more, as [[methods]] or as names: methods = ['full', 'lora']")
        return ()
    rows: list[Row] = []
    for place, entry in enumerate(value, 1):
        table = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(table, dict):
            wrong.say(f"methods {place}", f"{entry!r}: expected a table or a name")
            continue
        rows += _each(f"methods {place}", dict(table), base, wrong)
    _unique("methods", tuple(row.label for row in rows), wrong)
    return tuple(rows)


def _each(where: str, table: dict[str, Any], base: Path, wrong: Problems) -> list[Row]:
    """The methods of an entry: one, or with `each = {rank = [1, 2]}` one for every point."""
    label, each, grid = table.pop("name", None), table.pop("each", {}), table.pop("tune", None)
    wrong.known(where, table, ("name", "each", "tune", *FREE))
    wrong.known(f"{where} each", each, FREE)
    settings = wrong.settings(where, {key: x for key, x in table.items() if key in FREE}, base)
    axes = _grid(f"{where} each", {key: x for key, x in each.items() if key in FREE}, base, wrong)
    own = None if grid is None else _grid(f"{where} tune", grid, base, wrong)
    rows = []
    for point in trials(axes) or [{}]:
        at = {**settings, **point}
        default = " ".join([str(at.get("method", "lora")), *(f"{key}={x}" for key, x in point.items())])
        try:
            rows.append(Row(str(label).format(**at) if label else default, at, own))
        except (KeyError, IndexError, ValueError) as error:
            wrong.say(where, f"name={label!r}: {error} is not among {', '.join(at)}")
    return rows


def _grid(where: str, table: Any, base: Path, wrong: Problems) -> dict[str, Any]:
    """Setting -> list of values; a range {low, high, log} stays as it is."""
    if not isinstance(table, dict):
        wrong.say(where, f"{table!r}: expected settings with lists of values, as {{lr = [1e-4, 1e-3]}}")
        return {}
    wrong.known(where, table, GRID)
    found: dict[str, Any] = {}
    for key, values in table.items():
        if isinstance(values, dict):
            wrong.known(f"{where} {key}", values, ("low", "high", "log"))
            if not {"low", "high"} <= values.keys():
                wrong.say(where, f"{key}={values}: a range needs low and high")
            found[key] = values
        elif not isinstance(values, list) or not values:
            wrong.say(where, f"{key}={values!r}: expected a list of values")
        elif key in FREE:
            found[key] = [wrong.settings(where, {key: x}, base).get(key) for x in values]
        elif key == RELATIVE:
            found[key] = [float(x) for x in values if isinstance(x, int | float)]
    return found


def _seeds(value: Any, wrong: Problems) -> tuple[int, ...]:
    seeds = tuple(value) if isinstance(value, list | tuple) else ()
    if not seeds or any(type(x) is not int or x < 0 for x in seeds) or len(set(seeds)) < len(seeds):
        wrong.say("seeds", f"{value!r}: expected different whole numbers, as [0, 1, 2]")
        return (0,)
    return seeds


def _bool(where: str, value: Any, wrong: Problems) -> bool:
    if not isinstance(value, bool):
        wrong.say(where, f"{value!r}: expected true or false")
    return bool(value)


def _protocol(table: dict[str, Any], base: Path, wrong: Problems) -> dict[str, Any]:
    wrong.known("protocol", table, FREE)
    return wrong.settings("protocol", {key: x for key, x in table.items() if key in FREE}, base)


def _tune(table: dict[str, Any], base: Path, wrong: Problems) -> Tune:
    wrong.known("tune", table, ("search", "trials", "seed", *GRID))
    own = {key: x for key, x in table.items() if key in ("search", "trials", "seed")}
    tune = Tune(grid=_grid("tune", {key: x for key, x in table.items() if key in GRID}, base, wrong), **own)
    if tune.search not in ("grid", "optuna"):
        wrong.say("tune", f"search={tune.search!r}: expected 'grid' or 'optuna'")
    if type(tune.trials) is not int or tune.trials < 1:
        wrong.say("tune", f"trials={tune.trials!r}: expected 1 or more")
    if type(tune.seed) is not int or tune.seed < 0:
        wrong.say("tune", f"seed={tune.seed!r}: expected a whole number, 0 or more")
    return tune


def _compare(table: dict[str, Any], wrong: Problems) -> Compare:
    wrong.known("compare", table, ("alpha", "margin", "against"))
    alpha, margin = table.get("alpha", Compare.alpha), table.get("margin", {})
    margins = margin if isinstance(margin, dict) else {"default": margin}
    wrong.known("compare margin", margins, (*METRICS, "default"))
    if not isinstance(alpha, float) or not 0 < alpha < 1:
        wrong.say("compare", f"alpha={alpha!r}: expected a number between 0 and 1")
    for key, x in margins.items():
        if type(x) not in (int, float) or not x > 0:
            wrong.say("compare margin", f"{key}={x!r}: expected a number above 0, in units of the metric")
    return Compare(alpha, {"default": MARGIN, **margins}, table.get("against"))


def _unique(where: str, labels: tuple[str, ...], wrong: Problems) -> tuple[str, ...]:
    if twice := sorted({x for x in labels if labels.count(x) > 1}):
        wrong.say(where, f"{', '.join(twice)} named twice: give each its own name")
    return labels


def _check(d: Definition, wrong: Problems) -> None:
    """What only shows when the parts are put together: every run of the study is made once, and thrown away."""
    labels = [method.label for method in d.methods]
    if d.compare.against is not None and d.compare.against not in labels:
        wrong.known("compare against", {str(d.compare.against): None}, labels)
    for method in d.methods:
        _check_tuning(d, method, wrong)
        ranged = any(isinstance(values, dict) for values in d.grid(method).values())
        for task in d.tasks:
            for tried in [{}] if ranged else trials(d.grid(method)) or [{}]:
                try:
                    d.settings(task, d.models[0] if d.models else "", method, d.seeds[0], tried)
                except UserError as error:
                    wrong.say(f"method {method.label}", str(error))


def _check_tuning(d: Definition, method: Row, wrong: Problems) -> None:
    grid, where = d.grid(method), f"method {method.label}"
    if fixed := sorted(set(grid) & set(method.settings)):
        wrong.say(where, f"{', '.join(fixed)} is both set and tuned: leave one out, or give it its own tune = {{}}")
    ranged = [key for key, values in grid.items() if isinstance(values, dict)]
    if ranged and d.tune.search != "optuna":
        wrong.say(where, f"{', '.join(ranged)} is a range: only search = 'optuna' knows what to do with it")
