"""How tuning chooses: the best point of a grid, halving over seeds (halving.py), or a search by Optuna.

Optuna's proposals are drawn from a seed, so the runs of the store are all the memory of a search. A search that goes on
asks the same questions again, and answers those whose runs are there from their epochs. The same epochs prune the same
trials. A pruned trial counts as one of the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from loralab.data.metrics import upward
from loralab.errors import UserError
from loralab.study.record import Run

WORST = float("-inf")  # the score of a run that failed
RANDOM = 4  # trials before the sampler trusts what it saw; as many before any is pruned
INSTALL = "search = 'optuna' needs Optuna: pip install 'loralab[search]'"


class Pruned(Exception):
    """A trial that is given up: it is worse than half of those before it at the same epoch."""


Outcome = Callable[[Any, Mapping[str, Any]], float | Pruned | None]  # of an Optuna trial and its values


@dataclass(frozen=True)
class Trial:
    """A tuning run."""

    seed: int
    tried: Mapping[str, Any] | None  # None: the search has not come to this trial
    rung: str | None = None  # of halving


@dataclass
class TuningState:
    """How far the tuning of a cell is."""

    trials: list[Trial] = field(default_factory=list)
    chosen: Mapping[str, Any] | None = None  # None: not known yet, or nothing worked
    stuck: bool = False  # every trial failed


def best_of_grid(points: Sequence[Mapping[str, Any]], seed: int, scores: Sequence[float | None]) -> TuningState:
    """The point with the best score, of equal ones the first, once all have one (None: not run yet)."""
    trials = [Trial(seed, point) for point in points]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return TuningState(trials)
    best = max(known)
    return TuningState(trials, None if best == WORST else points[known.index(best)], stuck=best == WORST)


def search(grid: Mapping[str, Any], trials: int, seed: int, draws: int, outcome: Outcome) -> TuningState:
    """The search up to the first trial whose outcome is None (not run yet), or to its end; `draws` seeds proposals."""
    optuna, state, best = library(), TuningState(), WORST
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=draws, n_startup_trials=RANDOM),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=RANDOM, n_warmup_steps=1),
    )
    for number in range(trials):
        trial = study.ask()
        tried = {key: _suggest(trial, key, values) for key, values in grid.items()}
        value = outcome(trial, tried)
        if value is None:
            state.trials += [Trial(seed, None)] * (trials - number)
            return TuningState(state.trials)
        state.trials.append(Trial(seed, tried))
        if isinstance(value, Pruned):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif value == WORST:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
            best, state.chosen = (value, tried) if value > best else (best, state.chosen)
    state.stuck = state.chosen is None
    return state


def score(run: Run) -> float:
    """Score of the selected evaluation on the rows that selected it; more is better.

    Raises UserError for a run whose metrics.jsonl does not have it.
    """
    metric, epoch = run.result["metric"]["name"], run.result["selected_epoch"]
    record = next((row for row in run.history if row["epoch"] == epoch), {})
    scores = record.get("held_out") or record.get("validation") or {}
    if metric not in scores:
        raise UserError(
            f"{run.folder}: metrics.jsonl is missing or cut off, it has no {metric} of the selected epoch {epoch:g}: "
            "remove the folder, and the same study runs it again"
        )
    return upward(metric, float(scores[metric]))


def report(trial: Any, record: Mapping[str, Any], epochs: int, metric: str | None = None) -> None:
    """Report an epoch to its trial by the metric that selects, by default the first of its task.

    Raises Pruned if the run is not worth going on.
    """
    scores = record["held_out"] or record["validation"]
    metric = metric or next(iter(scores))
    if record["epoch"] == int(record["epoch"]):
        trial.report(upward(metric, scores[metric]), int(record["epoch"]))
    if record["epoch"] < epochs and trial.should_prune():
        raise Pruned


def library() -> ModuleType:
    """Import Optuna. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna  # type: ignore[no-any-return]


def _suggest(trial: Any, key: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    low, high, log = values["low"], values["high"], bool(values.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    return float(f"{trial.suggest_float(key, float(low), float(high), log=log):.4g}")  # an address of few digits
