"""What a study would take, guessed from finished runs of the same model and task; a planner can take its place."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from loralab.study.record import Key, Run


@dataclass(frozen=True)
class Estimate:
    seconds: float  # of training, of the runs that can be guessed
    peak_bytes: int  # of the largest run
    guessed: int  # runs
    unknown: int  # runs of which nothing like them is finished


def estimate(left: Sequence[tuple[Key, int]], finished: Iterable[Run]) -> Estimate:
    """Of runs with their epochs: seconds an epoch of the same method, else of any, on the same task and model."""
    pace: dict[tuple[str, ...], list[float]] = {}
    peak: dict[tuple[str, ...], int] = {}
    for run in finished:
        for key in _like(run.planned.key):
            pace.setdefault(key, []).append(run.result["time"]["train_s"] / max(len(run.history), 1))
            peak[key] = max(peak.get(key, 0), run.result["memory"]["peak_bytes"])
    found = [(key, epochs) for k, epochs in left for key in [next((x for x in _like(k) if x in pace), None)] if key]
    return Estimate(
        seconds=sum(median(pace[key]) * epochs for key, epochs in found),
        peak_bytes=max((peak[key] for key, _ in found), default=0),
        guessed=len(found),
        unknown=len(left) - len(found),
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
