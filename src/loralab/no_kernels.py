"""Where the package `kernels` is installed, bitsandbytes fetches compiled code from a hub with it. Here it does not.

A module of bitsandbytes that is imported after loralab cannot import `kernels`, at its import or later, and says
nothing about that; all other code can. Nothing in loralab uses what it would fetch.
"""

import builtins
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

WHO, WHAT = "bitsandbytes", "kernels"


def refuse() -> None:
    """Watch the imports of this process. Python asks the finders in order, so ours stands first."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds the modules of bitsandbytes where Python would, and has them run without `kernels`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of bitsandbytes; None for all others, which are left to the finders after this one."""
        if fullname.partition(".")[0] != WHO or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        if spec.loader is not None and hasattr(spec.loader, "exec_module"):
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: _quietly(run, module)  # type: ignore[method-assign]
        return spec


def _quietly(run: Any, module: ModuleType) -> None:
    """Run a module, whose functions keep the `__import__` that it begins with, and mute its warnings meanwhile."""
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
    logger = logging.getLogger(module.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        run(module)
    finally:
        logger.setLevel(level)


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    if name.partition(".")[0] == WHAT:
        raise ImportError(f"loralab lets {WHO} fetch no compiled code: {WHAT} is not imported here")
    return builtins.__import__(name, *args, **kwargs)
