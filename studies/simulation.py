"""How often planned contrasts err, by simulation: `python studies/simulation.py`, the table of docs/studies.md.

Seven methods, or three or four, against a reference whose runs they share; the luck of the seeds differs among methods
by up to 7.5 times where spreads are unequal; the rows bring luck of their own to all seeds alike, whose variance is
known as predictions give it; some runs collapse, and their seeds leave the contrast.
"""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from loralab.study.statistics.contrasts import Contrast, paired, smallest_difference

SPREADS = {
    "equal": [0.01] * 7,
    "unequal": [0.004, 0.006, 0.008, 0.01, 0.013, 0.018, 0.03],
    "one wild": [*[0.01] * 6, 0.5],
    "three, one wide": [0.01, 0.01, 0.03],
    "four, one wide": [0.01, 0.01, 0.01, 0.03],
}
ALPHA, MARGIN, ROWS = 0.05, 0.01, 0.004  # ROWS: standard deviation that the rows bring to a difference
TIMES = 400


@dataclass(frozen=True)
class Rates:
    """Shares of simulated studies, or of their contrasts."""

    covered: float  # intervals that hold the truth
    of_widest: float  # those of the method that varies most
    false: float  # studies without any difference that find one
    false_equal: float  # studies of differences at the margin that call one equal
    power: float  # studies that find the one difference there is, of the size that a dry run states


def rates(
    spread: str, seeds: int, collapse: float, times: int = TIMES, skewed: bool = False, of_rows: float = ROWS
) -> Rates:
    """The rates of studies whose luck of seeds is normal, or exponential: many a little lower, few much higher."""
    random = np.random.default_rng(7)
    spreads = SPREADS[spread]
    methods = [f"method {i}" for i in range(len(spreads))]
    sd = math.sqrt(float(np.mean(np.square(spreads))))  # what a dry run knows: one spread, pooled over the methods
    stated = smallest_difference(sd / math.sqrt(seeds), seeds - 1, ALPHA / len(methods))
    middle = int(np.argmin(np.abs(np.array(spreads) - sd)))  # the method whose spread is nearest to it

    def drawn_of(sd):
        return sd * (random.exponential(1, seeds) - 1) if skewed else random.normal(0, sd, seeds)

    def study(means, rows=of_rows):
        reference = drawn_of(min(spreads) / 2)
        luck = random.normal(0, rows, len(methods)) if rows else np.zeros(len(methods))
        own = [math.sqrt(s**2 - (min(spreads) / 2) ** 2) for s in spreads]  # with the reference's it makes the spread
        drawn = [m + b + drawn_of(s) - reference for m, b, s in zip(means, luck, own, strict=True)]
        kept = [d[random.random(seeds) >= collapse] for d in drawn]
        return paired(methods, kept, MARGIN, ALPHA, rows=[rows**2] * len(methods))

    none, at_margin, one = np.zeros(len(methods)), np.full(len(methods), MARGIN), np.zeros(len(methods))
    one[middle] = stated
    without = [study(none) for _ in range(times)]
    return Rates(
        covered=held([c for found in without for c in found]),
        of_widest=held([found[int(np.argmax(spreads))] for found in without]),
        false=float(np.mean([any(c.p_holm < ALPHA for c in found) for found in without])),
        false_equal=float(np.mean([any(c.p_equivalent_holm < ALPHA for c in study(at_margin)) for _ in range(times)])),
        power=float(np.mean([study(one, rows=0.0)[middle].p_holm < ALPHA for _ in range(times)])),
    )


def held(found: list[Contrast]) -> float:
    """The share of intervals that hold a difference of zero, of those that there are."""
    return float(np.mean([c.low <= 0 <= c.high for c in found if not math.isnan(c.low)]))


def main() -> None:
    columns = "intervals hold | of the widest | a false difference | a false equality | power"
    print(f"| seeds | spreads | collapses | {columns} |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    cases: list[tuple[int, str, dict[str, float]]] = []
    cases += [(n, s, {"collapse": c}) for n, s, c in product((5, 12), ("equal", "unequal"), (0.0, 0.05))]
    cases += [(n, "unequal", {"skewed": True}) for n in (5, 12)]
    cases += [(n, "one wild", {}) for n in (3, 5, 12)]
    cases += [(n, s, {"of_rows": 0.0}) for s, n in product(("three, one wide", "four, one wide"), (3, 5))]
    for seeds, spread, given in cases:
        r = rates(spread, seeds, **{"collapse": 0.0, **given})
        told = spread + ", skewed" * ("skewed" in given) + ", no rows" * ("of_rows" in given)
        numbers = " | ".join(f"{x:.3f}" for x in (r.covered, r.of_widest, r.false, r.false_equal, r.power))
        print(f"| {seeds} | {told} | {100 * given.get('collapse', 0):.0f} % | {numbers} |")


if __name__ == "__main__":
    main()
