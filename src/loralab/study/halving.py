"""Successive halving over seeds: many rates on one seed, the best of them on a second, the winner by the mean of both.

Each run has its whole schedule, because a rate that wins a short one is too large for a long one. So a rung adds a
seed and nothing else, and the runs of the rung before it count. A rate that fails or collapses on any seed is out. If
the winner lies at an edge of the grid, the grid goes on there by two rates, once, on every seed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loralab.study.definition import KEPT
from loralab.study.search import WORST, Trial, TuningState

MORE = 2  # rates beyond an edge
EXTENSION = "extension"  # the rung of those

Point = Mapping[str, Any]
Score = Callable[[Point, int], float | None]  # of a point on a seed: held out; WORST if it is out, None if not run yet


def halving(
    points: Sequence[Point], seeds: Sequence[int], score: Score, allowed: Callable[[Point], bool] = lambda point: True
) -> TuningState:
    """How far the tuning over a grid of one setting is, by the runs there are.

    `allowed` says which points beyond the grid a run can have.
    """
    state, left = TuningState(), list(points)
    for rung, seed in enumerate(seeds):
        state.trials += [Trial(seed, point, str(rung + 1)) for point in left]
        scores = [_mean(point, seeds[: rung + 1], score) for point in left]
        if None in scores:
            state.trials += [Trial(later, None, str(seeds.index(later) + 1)) for later in seeds[rung + 1 :]] * KEPT
            return state
        left = _best(left, scores)
    if not left:
        state.stuck = True
        return state
    more = [point for point in beyond(points, left[0]) if allowed(point)]
    state.trials += [Trial(seed, point, EXTENSION) for point in more for seed in seeds]
    left += more
    scores = [_mean(point, seeds, score) for point in left]
    if None not in scores:
        state.chosen = _best(left, scores)[0]
    return state


def _mean(point: Point, seeds: Sequence[int], score: Score) -> float | None:
    """The mean score over seeds, None as long as one is not run."""
    scores = [x for seed in seeds if (x := score(point, seed)) is not None]
    return None if len(scores) < len(seeds) else sum(scores) / len(scores)


def _best(points: Sequence[Point], scores: Sequence[float | None]) -> list[Point]:
    """At most KEPT points that are not out, the best first, of equal ones the first."""
    known = [(score, place) for place, score in enumerate(scores) if score is not None and score > WORST]
    return [points[place] for _, place in sorted(known, key=lambda pair: (-pair[0], pair[1]))[:KEPT]]


def beyond(points: Sequence[Point], winner: Point) -> list[Point]:
    """At most MORE points beyond the edge at which the winner lies, in the grid's mean ratio; none if it is inside.

    A grid of whole numbers goes on by whole numbers above 0, each once.
    """
    ((key, value),) = winner.items()
    values = [float(point[key]) for point in points]
    low, high = min(values), max(values)
    ratio = (high / low) ** (1 / (len(values) - 1))
    if low < value < high:
        return []
    step = ratio if value == high else 1 / ratio
    more = [float(f"{value * step**i:.2g}") for i in range(1, MORE + 1)]
    if all(type(point[key]) is int for point in points):
        more = [x for x in dict.fromkeys(map(round, more)) if x > 0 and x not in values]
    return [{key: x} for x in more]
