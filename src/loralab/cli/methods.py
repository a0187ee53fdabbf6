"""`loralab methods`: the table of named methods, or all settings of one."""

from typing import Annotated, Any

from cyclopts import Parameter

from loralab import options
from loralab.cli.show import Json, as_json, pairs, table
from loralab.recipe import NAMED, Recipe, recipe, to_json

OUT, IN = 768, 768  # the layer that parameter counts are given for: q or v of a base-size encoder


def methods(
    name: Annotated[str | None, Parameter(help="A method, to list its settings; all methods by default.")] = None,
    *,
    json: Json = False,
) -> None:
    """Print the table of methods, or with a name every setting of that method with its default and meaning."""
    if name is not None:
        _one(name, json)
    elif json:
        as_json({key: {"equation": equation, **to_json(row)} for key, (row, equation) in NAMED.items()})
    else:
        columns = ("method", "y =", "learns", "values", "default lr")
        table("Methods", columns, [_cells(key) for key in NAMED], texts=3)
        print(f"values: that learn in a {OUT} x {IN} layer, at the default rank; the head learns too")
        print("the settings of a method: loralab methods NAME")


def _one(name: str, json: bool) -> None:
    """Print one method and its settings. Raises UserError for an unknown name."""
    row = recipe(name)
    settings = options.options(name).values()
    if json:
        listed: dict[str, Any] = {
            o.name: {"default": o.default, "expects": o.expects, "meaning": o.meaning} for o in settings
        }
        as_json({"method": name, "equation": NAMED[name][1], **to_json(row), "settings": listed})
        return
    _, equation, roles, values, _ = _cells(name)
    counted = {f"values of a {OUT} x {IN} layer": values} if values else {}
    pairs(name, {"y =": equation, "learns": roles, **counted})
    rows = [(o.name, options.text(o.default), o.expects, o.meaning) for o in settings]
    table("Settings", ("name", "default", "expects", "meaning"), rows, texts=4)
    print(
        f"loralab train --method {name} --set NAME=VALUE; loralab.attach(model, {name!r}, NAME=VALUE); a study's TOML"
    )


def _cells(name: str) -> tuple[str, str, str, str, str]:
    """The row of a method in the table."""
    row, equation = NAMED[name]
    values = f"{row.count(OUT, IN):,}" if row.factors else ""
    return name, equation, learns(row), values, f"{row.lr:g}"


def learns(row: Recipe) -> str:
    """The roles of a layer that learn, shortened to two of many, or what learns in place."""
    roles = [*row.learn, *([row.learn_base] if row.learn_base else [])]
    return ", ".join(roles if len(roles) < 4 else [*roles[:2], "..."]) or "head"
