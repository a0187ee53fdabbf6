"""`loralab methods`: the table of named recipes."""

from typing import Annotated

from cyclopts import Parameter

from loralab.cli.show import as_json, table
from loralab.recipe import NAMED, Recipe, to_json

OUT, IN = 768, 768  # the layer that parameter counts are given for: q or v of a base-size encoder


def methods(*, json: Annotated[bool, Parameter(negative="", help="Print the table as JSON.")] = False) -> None:
    """The table of methods: equation, what learns, and how many values of a 768 x 768 layer learn."""
    if json:
        as_json({name: {"equation": equation, **to_json(recipe)} for name, (recipe, equation) in NAMED.items()})
        return
    rows = [
        (name, equation, learns(recipe), f"{recipe.count(OUT, IN):,}" if recipe.factors else "", f"{recipe.lr:g}")
        for name, (recipe, equation) in NAMED.items()
    ]
    table("Methods", ("method", "y =", "learns", "values", "lr"), rows, texts=3)
    print(f"values: of a {OUT} x {IN} layer, at the default rank. lr: by default. The head learns too if there is one.")


def learns(recipe: Recipe) -> str:
    return ", ".join([*recipe.learn, *([recipe.learn_base] if recipe.learn_base else [])]) or "head"
