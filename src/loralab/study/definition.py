"""A study as values: tasks, models, methods, seeds, protocol, tuning and what is compared. `toml.py` reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from loralab import options
from loralab.errors import UserError, hint
from loralab.run import Settings

KEPT = 3  # rates that halving takes to its second seed
RELATIVE = "lr_times"  # in a grid: the method's own learning rate times this
MARGIN = 0.01  # a difference nobody would change method for, on GLUE's scale of 0 to 1
OF_RUN = frozenset(f.name for f in fields(Settings))  # every other setting belongs to a method


@dataclass(frozen=True)
class StudyTask:
    """A task of the study, with the settings that it brings."""

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StudyMethod:
    """A method of the study, with the settings that it brings."""

    label: str
    settings: Mapping[str, Any]
    grid: Mapping[str, Any] | None = None  # what tuning varies; None is that of [tune]


@dataclass(frozen=True)
class Tune:
    grid: Mapping[str, Any] = field(default_factory=dict)  # setting -> values, or a range {low, high, log} for optuna
    search: Literal["grid", "optuna", "halving"] = "grid"
    trials: int = 8  # of optuna, for each method
    seed: int = 1000  # of tuning runs: no reported run has it, so none was chosen by its own luck

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of tuning runs, one a rung of halving."""
        return (self.seed, self.seed + 1) if self.search == "halving" else (self.seed,)


@dataclass(frozen=True)
class Compare:
    alpha: float = 0.05
    margin: Mapping[str, float] = field(default_factory=dict)  # by metric
    against: str | None = None  # a label: each method against it; None: every two methods
    reference: str | None = None  # a label: the planned contrasts are those of each method with it; None plans none
    family: Literal["mean of tasks", "by task"] = "mean of tasks"  # the first family of planned contrasts
    endpoints: tuple[str, ...] = ("selected",)  # of planned contrasts: the task's own metric, or others by name
    sd: float | None = None  # of a paired difference over seeds, as expected before the first run: for a dry run


@dataclass(frozen=True)
class Definition:
    name: str
    tasks: tuple[StudyTask, ...]
    methods: tuple[StudyMethod, ...]
    models: tuple[str, ...] = ("minilm",)
    seeds: tuple[int, ...] = (0, 1, 2)  # with fewer an interval is too wide to use
    about: str = ""
    data: Path | None = None
    store: Path = Path("runs/store")
    packed: bool = False  # true: predictions of reported runs in one file of the study, of tuning runs none
    adapters: bool = True  # false: the weights of a finished run are removed, its numbers stay
    registered: bool = False  # true: the study folder refuses another question
    dtype: Literal["float32", "bfloat16"] | None = None  # of products, in runs that leave it to the machine
    protocol: Mapping[str, Any] = field(default_factory=dict)
    tune: Tune = Tune()
    compare: Compare = Compare()

    def only(self, names: Sequence[str]) -> "Definition":
        """The study with those of its methods that are named, by label or by method. Raises UserError.

        What methods are compared with has to be among them.
        """
        able = {m.label: {m.label, str(m.settings.get("method", m.label))} for m in self.methods}
        if unknown := [name for name in names if not any(name in words for words in able.values())]:
            there = ", ".join(able)
            raise UserError(
                f"--methods {' '.join(unknown)}: the study has no such method{hint(unknown[0], able)}: {there}"
            )
        kept = tuple(m for m in self.methods if able[m.label] & {*names})
        for key in ("reference", "against"):
            wanted = getattr(self.compare, key)
            if wanted is not None and wanted not in [m.label for m in kept]:
                raise UserError(f"--methods leaves out {wanted}, which {key} of [compare] names: name it too")
        return replace(self, methods=kept)

    def grid(self, method: StudyMethod) -> Mapping[str, Any]:
        """What tuning varies for a method."""
        return self.tune.grid if method.grid is None else method.grid

    def budget(self, method: StudyMethod) -> int:
        """Tuning runs of a method, on each task and model."""
        grid = self.grid(method)
        if not grid:
            return 0
        if self.tune.search == "optuna":
            return self.tune.trials
        points = len(grid_points(grid))
        return points + min(KEPT, points) if self.tune.search == "halving" else points

    def settings(
        self, task: StudyTask, model: str, method: StudyMethod, seed: int, tried: Mapping[str, Any]
    ) -> Settings:
        """The settings of one run, `tried` those that tuning varies. Raises UserError for what no run can be."""
        chosen = {**self.protocol, **task.settings, **method.settings, **tried}
        times = chosen.pop(RELATIVE, None)
        own = {name: chosen.pop(name) for name in sorted(chosen.keys() - OF_RUN)}  # of the method, by its own names
        run = Settings(model=model, seed=seed, data=self.data, set=options.texts(own), **chosen)
        if self.dtype is not None and run.dtype == "auto":
            run = replace(run, dtype=self.dtype)
        lr = run.recipe().lr  # written out: what decides a result is in its run.json
        return replace(run, lr=lr if times is None else float(f"{lr * times:.6g}"))


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every point of a grid; none for an empty one."""
    return [dict(zip(grid, point, strict=True)) for point in product(*grid.values())] if grid else []


def halving_problem(grid: Mapping[str, Any]) -> str | None:
    """Why halving cannot search a grid, or None: it needs an order to say which value is at the edge."""
    values = next(iter(grid.values()))
    numbers = isinstance(values, list) and all(type(x) in (int, float) and x > 0 for x in values)
    if len(grid) == 1 and numbers and len(values) >= KEPT:
        return None
    return f"takes one setting with {KEPT} or more numbers above 0, as lr_times = [0.1, 0.3, 1, 3, 10, 30]"
