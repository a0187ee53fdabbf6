"""`loralab methods`: the table of named recipes."""

from loralab.cli.show import Json, as_json, table
from loralab.recipe import NAMED, Recipe, to_json

OUT, IN = 768, 768  # the layer that parameter counts are given for: q or v of a base-size encoder


def methods(*, json: Json = False) -> None:
    """The table of methods: equation, what learns, and how many values of a 768 x 768 layer learn."""
    if json:
        as_json({name: {"equation": equation, **to_json(recipe)} for name, (recipe, equation) in NAMED.items()})
        return
    rows = [
        (name, equation, learns(recipe), f"{recipe.count(OUT, IN):,}" if recipe.factors else "", f"{recipe.lr:g}")
        for name, (recipe, equation) in NAMED.items()
    ]
    table("Methods", ("method", "y =", "learns", "values", "default lr"), rows, texts=3)
    print(f"values: that learn in a {OUT} x {IN} layer, at the default rank; the head learns too")


def learns(recipe: Recipe) -> str:
    """Roles of a layer that learn, the first two of many, or what learns in place."""
    roles = [*recipe.learn, *([recipe.learn_base] if recipe.learn_base else [])]
    return ", ".join(roles if len(roles) < 4 else [*roles[:2], "..."]) or "head"
