"""What is left of a study in time and memory: from finished runs of the same model and task, else by the planner."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from loralab.run import Settings
from loralab.study.forecast import forecast
from loralab.study.record import Key, Run


@dataclass(frozen=True)
class Estimate:
    seconds: float  # of training, of all runs but the unknown ones
    peak_bytes: int  # of the largest run
    guessed: int  # runs, by finished ones like them
    planned: int  # runs, by the planner
    unknown: int  # runs whose model or rows are not on this machine


def estimate(left: Sequence[tuple[Key, Settings]], finished: Iterable[Run]) -> Estimate:
    """Of runs: seconds an epoch of the same method, else of any, on the same task and model, else the planner's."""
    pace: dict[tuple[str, ...], list[float]] = {}
    peak: dict[tuple[str, ...], int] = {}
    for run in finished:
        for key in _like(run.planned.key):
            pace.setdefault(key, []).append(run.result["time"]["train_s"] / max(len(run.history), 1))
            peak[key] = max(peak.get(key, 0), run.result["memory"]["peak_bytes"])
    nearest = {k: next((x for x in _like(k) if x in pace), None) for k, _ in left}
    alike = [(near, s.epochs) for k, s in left if (near := nearest[k])]
    forecasts = {k: forecast(s) for k, s in dict(left).items() if not nearest[k]}  # one for all seeds of a cell
    planned = [made for k, _ in left if (made := forecasts.get(k))]
    return Estimate(
        seconds=sum(median(pace[key]) * epochs for key, epochs in alike) + sum(f.seconds for f in planned),
        peak_bytes=max([*(peak[key] for key, _ in alike), *(f.peak_bytes for f in planned)], default=0),
        guessed=len(alike),
        planned=len(planned),
        unknown=len(left) - len(alike) - len(planned),
    )


def _like(key: Key) -> tuple[tuple[str, ...], ...]:
    """What a run of this cell is like, the nearest first."""
    return key, key[:2]


def clock(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
