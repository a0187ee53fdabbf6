"""loralab: one equation, every LoRA, and comparisons that are evidence."""

from loralab.adapters import Adapters, attach, load
from loralab.errors import UserError
from loralab.rankmap import LayerRank, RankMap
from loralab.recipe import NAMED, Recipe, recipe

__version__ = "0.1.0"
__all__ = ["NAMED", "Adapters", "LayerRank", "RankMap", "Recipe", "UserError", "attach", "load", "recipe"]
