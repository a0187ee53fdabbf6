"""loralab: one equation, every LoRA, and comparisons that are evidence."""

from loralab.attach import Adapters, attach
from loralab.errors import UserError
from loralab.files import load
from loralab.ranks import Part, RankMap
from loralab.recipe import NAMED, Recipe, recipe

__version__ = "0.1.0"
__all__ = ["NAMED", "Adapters", "Part", "RankMap", "Recipe", "UserError", "attach", "load", "recipe"]
