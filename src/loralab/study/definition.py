"""A study as values: tasks, models, methods, seeds, protocol, tuning and what is compared. `parse.py` makes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from loralab.run import Settings
from loralab.study.values import FREE

RELATIVE = "lr_times"  # in a grid: the method's own learning rate times this
GRID = (*FREE, RELATIVE)
MARGIN = 0.01  # a difference nobody would change method for, on GLUE's scale of 0 to 1


@dataclass(frozen=True)
class Row:
    """A task or a method: its label and the settings it brings."""

    label: str
    settings: Mapping[str, Any]
    grid: Mapping[str, Any] | None = None  # of a method: what tuning varies; None is that of [tune]


@dataclass(frozen=True)
class Tune:
    grid: Mapping[str, Any] = field(default_factory=dict)  # setting -> values, or a range {low, high, log} for optuna
    search: Literal["grid", "optuna"] = "grid"
    trials: int = 8  # of optuna, for each method
    seed: int = 1000  # of tuning runs: none of the reported ones, so none was chosen by its own luck


@dataclass(frozen=True)
class Compare:
    alpha: float = 0.05
    margin: Mapping[str, float] = field(default_factory=dict)  # by metric
    against: str | None = None  # a label: each method against it; None: every two methods


@dataclass(frozen=True)
class Definition:
    name: str
    tasks: tuple[Row, ...]
    methods: tuple[Row, ...]
    models: tuple[str, ...] = ("minilm",)
    seeds: tuple[int, ...] = (0, 1, 2)  # with fewer an interval says nothing
    about: str = ""
    data: Path | None = None
    store: Path = Path("runs/store")
    adapters: bool = True  # false: the weights of a finished run are not kept, only its numbers
    protocol: Mapping[str, Any] = field(default_factory=dict)
    tune: Tune = Tune()
    compare: Compare = Compare()

    def grid(self, method: Row) -> Mapping[str, Any]:
        return self.tune.grid if method.grid is None else method.grid

    def budget(self, method: Row) -> int:
        """Tuning runs of a method, on each task and model."""
        grid = self.grid(method)
        if not grid:
            return 0
        return self.tune.trials if self.tune.search == "optuna" else len(trials(grid))

    def settings(self, task: Row, model: str, method: Row, seed: int, tried: Mapping[str, Any]) -> Settings:
        """The run of a point; raises UserError for what no run can be."""
        given = {**self.protocol, **task.settings, **method.settings, **tried}
        times = given.pop(RELATIVE, None)
        found = Settings(model=model, seed=seed, data=self.data, **given)
        if times is not None:
            return replace(found, lr=float(f"{found.recipe().lr * times:.6g}"))
        return replace(found, lr=found.recipe().lr)  # written out: what decides a result is in its run.json


def trials(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every point of a grid."""
    return [dict(zip(grid, point, strict=True)) for point in product(*grid.values())] if grid else []
