"""loralab: one equation, every LoRA, and comparisons that are evidence.

Names and modules are imported when they are first used, so that `loralab --help` need not wait for torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loralab.no_kernels import refuse

if TYPE_CHECKING:
    from loralab.adapters import Adapters, attach, load
    from loralab.errors import UserError
    from loralab.make_ranks import rank_map
    from loralab.rankmap import LayerRank, RankMap
    from loralab.recipe import NAMED, Recipe, recipe

__version__ = "0.1.0"
__all__ = [
    "NAMED",
    "Adapters",
    "LayerRank",
    "RankMap",
    "Recipe",
    "UserError",
    "attach",
    "load",
    "pipeline",
    "rank_map",
    "recipe",
]
_MODULES = {  # name -> where it is defined
    "Adapters": "adapters", "attach": "adapters", "load": "adapters", "UserError": "errors", "LayerRank": "rankmap",
    "RankMap": "rankmap", "rank_map": "make_ranks", "NAMED": "recipe", "Recipe": "recipe",
}  # fmt: skip


def pipeline(adapter: Any, model: str | None = None, **options: Any) -> Any:
    """Open an adapter folder as a function from rows to answers: `pipeline("runs/reviews/adapter")(["a text"])`.

    See `loralab.serve.pipeline.pipeline` for the options and what the function takes and returns.
    """
    return import_module("loralab.serve.pipeline").pipeline(adapter, model, **options)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(import_module(f"loralab.{_MODULES[name]}"), name)
        return value
    if not name.startswith("_") and find_spec(f"loralab.{name}"):
        return import_module(f"loralab.{name}")
    raise AttributeError(f"module 'loralab' has no attribute {name!r}")


class _Package(ModuleType):
    """The package; its `recipe` is the function, though importing the module of that name sets the attribute too."""

    @property
    def recipe(self) -> Any:
        return import_module("loralab.recipe").recipe

    @recipe.setter
    def recipe(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
refuse()
