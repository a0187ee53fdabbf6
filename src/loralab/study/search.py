"""The tuning search by Optuna: its proposals are drawn from a seed, so the runs of the store are all its memory.

A search that goes on asks the same questions again, and answers those whose runs are there from their epochs. The same
epochs prune the same trials. A pruned trial counts as one of the budget.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loralab.errors import UserError
from loralab.run import Settings
from loralab.study.record import failure, history, read_run

if TYPE_CHECKING:
    from loralab.study.plan import Point

WORST = float("-inf")  # the score of a run that failed
RANDOM = 4  # trials before the sampler trusts what it saw; as many before any is pruned
Begin = Callable[[Settings, Any, Mapping[str, Any]], None]  # runs settings under a trial of these values
INSTALL = "search = 'optuna' needs Optuna: pip install 'loralab[search]'"


class Pruned(Exception):
    """A trial that is given up: it is worse than half of those before it at the same epoch."""


@dataclass
class State:
    """What a search has done."""

    tried: list[Mapping[str, Any] | None] = field(default_factory=list)
    chosen: Mapping[str, Any] | None = None
    stuck: bool = False  # every trial failed
    pruned: int = 0


def score(epochs: list[dict[str, Any]], result: Mapping[str, Any]) -> float:
    """Of the selected epoch on the rows that selected it."""
    return of_epoch(epochs[result["selected_epoch"] - 1], result["metric"]["name"])


def of_epoch(record: Mapping[str, Any], metric: str) -> float:
    return float((record["held_out"] or record["validation"])[metric])


def library() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise UserError(INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna  # type: ignore[no-any-return]


def replay(point: "Point", run: Begin | None = None) -> State:
    """The search as far as the store has it; with `run`, which runs settings under a trial, to its end."""
    optuna, d, state = library(), point.definition, State()
    seed = zlib.crc32(" ".join(point.key).encode())
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=RANDOM, n_warmup_steps=1),
    )
    best = WORST
    for _ in range(d.tune.trials):
        trial = study.ask()
        tried = {key: _suggest(trial, key, values) for key, values in point.grid.items()}
        value = _outcome(point, tried, trial, run)
        if value is None:
            return state  # this trial is still to be run
        state.tried.append(tried)
        if isinstance(value, Pruned):
            state.pruned += 1
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif value == WORST:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
            best, state.chosen = (value, tried) if value > best else (best, state.chosen)
    state.stuck = state.chosen is None
    return state


def _outcome(point: "Point", tried: Mapping[str, Any], trial: Any, run: Begin | None) -> float | Pruned | None:
    """The score of a trial, WORST if it failed, Pruned, or None if it has not been run."""
    planned = point.planned("tune", point.definition.tune.seed, tried)
    folder = point.store / str(planned.address)
    try:
        for record in history(folder):
            report(trial, record, point.settings("tune", point.definition.tune.seed, tried).epochs)
        if run is not None and not (folder / "result.json").is_file() and not failure(point.store, planned):
            run(point.settings("tune", point.definition.tune.seed, tried), trial, tried)
    except Pruned as pruned:
        return pruned
    if failure(point.store, planned):
        return WORST
    found = read_run(point.store, planned)
    return None if found is None else score(found.history, found.result)


def report(trial: Any, record: Mapping[str, Any], epochs: int) -> None:
    """Tells the trial of an epoch; Pruned if it is not worth going on."""
    scores = record["held_out"] or record["validation"]
    trial.report(next(iter(scores.values())), record["epoch"])  # the first metric is the one that selects
    if record["epoch"] < epochs and trial.should_prune():
        raise Pruned


def _suggest(trial: Any, key: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    low, high, log = values["low"], values["high"], bool(values.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    return float(f"{trial.suggest_float(key, float(low), float(high), log=log):.4g}")  # an address of few digits
