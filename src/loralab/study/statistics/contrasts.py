"""Planned contrasts: each method against one reference, with variances moderated over the family and Holm's correction.

With few seeds the spread of one difference is itself uncertain. Moderated variances (Smyth, 2004, limma) shrink each
spread s^2 with d degrees of freedom to a prior s0^2 with d0, both estimated from all contrasts of the family:

    s~^2 = (d0 s0^2 + d s^2) / (d0 + d),     t = difference / (s~ / sqrt(seeds)) with d0 + d degrees of freedom.

limma has thousands of genes to learn d0 from, a family has a handful of methods. So the prior never counts more than a
method's own seeds, d0 <= d: without that, methods of unequal spread were called different in 12 of 100 families without
any difference (3 seeds), with it in at most 5 (tests/test_contrasts.py).

Next to each verdict stands the smallest true difference that the test finds with 80 % power, at Holm's first step.

Where seeds are many enough a second test checks the first: signs of whole seeds flipped, which needs no distribution.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from loralab.study.statistics.estimates import holm, variance, within

Array = NDArray[Any]
ENOUGH = 5.0  # right and wrong answers, from which on a share is near enough to normal
LEAST = 3  # variances that make a prior: of two it is a guess, and families of two erred in 9 of 100 with 3 seeds
OUTLYING = 0.3  # simulated from 0.01 to 0.3: the interval of a method that varies most then holds in 0.94 with 5 seeds
UNBOUNDED = (-math.inf, math.inf)
HUGE = 3e4  # t, up to which scipy's noncentral t is right; it is off by 0.05 and more from 1e5 on
AT_ONCE = 2**22  # signs held at a time: 32 MB
FLIPPED = 14  # seeds up to which all patterns of signs are counted; of more as many patterns are drawn
MIRRORED = {"better": "worse", "worse": "better"}  # verdicts that turn with a difference; others stay
Verdict = Literal["better", "worse", "equal within the margin", "no difference found", "not tested"]


@dataclass(frozen=True)
class Contrast:
    """One method against the reference, in units of the score."""

    method: str
    difference: float  # method - reference
    error: float  # standard error of the difference
    df: float  # degrees of freedom, inf for a normal
    low: float
    high: float
    p: float
    p_holm: float  # corrected over the family
    p_equivalent: float  # TOST: of a difference outside the margin
    p_equivalent_holm: float
    smallest: float  # true difference found with the wanted power at Holm's first step
    verdict: Verdict
    p_signs: float = math.nan  # by flips of the signs of seeds, corrected over the family; nan where seeds are too few

    @property
    def differs(self) -> bool:
        """Whether a difference is found."""
        return self.verdict in ("better", "worse")


def contrast(method: str, difference: float, error: float, df: float, margin: float, level: float = 0.95) -> Contrast:
    """One uncorrected contrast; an error that is not known (nan) gives no test."""
    if not error > 0:
        nan = math.nan
        return Contrast(method, difference, error, df, nan, nan, nan, nan, nan, nan, nan, "not tested")
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    p = float(2 * stats.t.sf(abs(difference) / error, df))
    same = float(stats.t.sf((margin - abs(difference)) / error, df))  # the larger of the two one-sided p
    return Contrast(
        method, difference, error, df, difference - half, difference + half, p, p, same, same, math.nan, "not tested"
    )


def family(contrasts: Sequence[Contrast], alpha: float = 0.05, power: float = 0.8) -> list[Contrast]:
    """Holm's correction over the contrasts, the verdicts that remain, and what each could have found."""
    p, same = holm([c.p for c in contrasts]), holm([c.p_equivalent for c in contrasts])
    tested = sum(not math.isnan(c.p) for c in contrasts)
    return [
        c
        if math.isnan(c.p)
        else replace(
            c,
            p_holm=p[i],
            p_equivalent_holm=same[i],
            smallest=smallest_difference(c.error, c.df, alpha / tested, power),
            verdict=_verdict(c.difference, p[i], same[i], alpha),
        )
        for i, c in enumerate(contrasts)
    ]


def _verdict(difference: float, p: float, p_equivalent: float, alpha: float) -> Verdict:
    if p < alpha:
        return "better" if difference > 0 else "worse"
    return "equal within the margin" if p_equivalent < alpha else "no difference found"


def mirrored(c: Contrast) -> Contrast:
    """The contrast as a score says it of which less is better: with the other verdict."""
    verdict: Any = MIRRORED.get(c.verdict, c.verdict)
    return replace(c, verdict=verdict)


def smallest_difference(error: float, df: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided test at `alpha` finds with that power (noncentral t).

    nan where the noncentral t is not known well enough: for so few seeds and so small an alpha that t must be huge.
    """
    limit = float(stats.t.isf(alpha / 2, df))
    if not limit <= HUGE:
        return math.nan
    if math.isinf(df):
        return error * (limit + float(stats.norm.ppf(power)))

    def short(effect: float) -> float:
        return float(stats.nct.sf(limit, df, effect)) - power

    # with chance sqrt(power) the spread is below this quantile, and then t above the limit with at least that chance
    share = math.sqrt(power)
    high = limit * math.sqrt(float(stats.chi2.ppf(share, df)) / df) + float(stats.norm.ppf(share))
    high = max(1.01 * high, 0.1)
    known = short(0.0) < 0 <= short(high)
    return error * float(optimize.brentq(short, 0.0, high)) if known else math.nan


def moderated(variances: Sequence[float] | Array, df: Sequence[float] | Array) -> tuple[Array, Array]:
    """(variances shrunk to their common prior, degrees of freedom of each), from variances with `df` above 0 each.

    Zero variances carry no log, and those of two seeds vary too much (families of three methods, one of them ten times
    as varied, erred in 10 of 100): they say nothing of the prior but take it. With fewer than LEAST others there is
    none. A variance that the prior explains in fewer than OUTLYING of cases is left as it is.
    """
    s2, d = np.asarray(variances, dtype=float), np.asarray(df, dtype=float)
    some = (s2 > 0) & (d > 1)
    if some.sum() < LEAST:
        return s2, d
    e = np.log(s2[some]) - special.digamma(d[some] / 2) + np.log(d[some] / 2)  # mean: that of log s0^2
    excess = float(e.var(ddof=1)) - float(special.polygamma(1, d[some] / 2).mean())
    prior = math.inf if excess <= 0 else 2 * _trigamma_inverse(excess)  # inf: no more spread than equal variances have
    more = 0.0 if math.isinf(prior) else float(special.digamma(prior / 2)) - math.log(prior / 2)
    d0, s0 = np.minimum(prior, d), math.exp(float(e.mean()) + more)
    above = stats.f.sf(s2 / s0, d, d0) < OUTLYING
    return np.where(above, s2, (d0 * s0 + d * s2) / (d0 + d)), np.where(above, d, d0 + d)


def _trigamma_inverse(y: float) -> float:
    """x with trigamma(x) = y, by Newton's steps on 1 / trigamma, which is convex (Smyth, 2004, appendix)."""
    if y > 1e7:
        return 1 / math.sqrt(y)
    if y < 1e-6:
        return 1 / y
    x = 0.5 + 1 / y
    for _ in range(50):
        value = float(special.polygamma(1, x))
        step = value * (1 - value / y) / float(special.polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x


def paired(
    methods: Sequence[str],
    differences: Sequence[Array],
    margin: float | Sequence[float],
    alpha: float = 0.05,
    power: float = 0.8,
    rows: Sequence[float] | None = None,
    ranges: Sequence[tuple[float, float]] | None = None,
) -> list[Contrast]:
    """The family of paired contrasts: of each method (seeds,) differences to the reference on the same seeds.

    `rows` are the variances that the rows add to each mean; the degrees of freedom stay those of the seeds, so that no
    contrast is surer than its seeds alone make it. `ranges` are the values that each difference can have. A method with
    one seed is not tested, and one with two has no interval.
    """
    counts = [len(d) for d in differences]
    tested = [i for i, count in enumerate(counts) if count > 1]
    variances, freedom = moderated([variance(differences[i]) for i in tested], [counts[i] - 1 for i in tested])
    places = {i: place for place, i in enumerate(tested)}
    margins = np.broadcast_to(np.asarray(margin, dtype=float), len(methods))
    made = []
    for i, method in enumerate(methods):
        mean, error, df = math.nan, math.nan, math.nan
        if counts[i]:
            mean = float(differences[i].mean())
        if i in places:
            of_rows, of_seeds = 0.0 if rows is None else rows[i], variances[places[i]] / counts[i]
            error = math.sqrt(of_seeds + of_rows) if of_seeds else math.nan  # the rows alone are surer than seeds allow
            df = float(freedom[places[i]])
        made.append(contrast(method, mean, error, df, float(margins[i])))
    limits = [UNBOUNDED] * len(counts) if ranges is None else ranges
    return [_stated(c, n, own) for c, n, own in zip(family(made, alpha, power), counts, limits, strict=True)]


def with_signs(contrasts: Sequence[Contrast], differences: Sequence[Array], alpha: float) -> list[Contrast]:
    """The contrasts with a check of their p by sign flips, corrected by Holm, of their (seeds,) differences.

    A method that is like the reference is above it on a seed as easily as below it. So p is the share of the 2^seeds
    patterns of signs with a mean as far from 0 (Fisher, 1935). It is over seeds alone. Where even all seeds on one side
    would not be below `alpha` after the correction, there is no check.
    """
    tested = sum(len(d) > 1 for d in differences)
    enough = [len(d) > 1 and 2 ** (1 - len(d)) * tested < alpha for d in differences]
    p = holm([_flipped(d) if of else math.nan for d, of in zip(differences, enough, strict=True)])
    return [replace(c, p_signs=own) for c, own in zip(contrasts, p, strict=True)]


def _flipped(d: Array) -> float:
    sums = np.concatenate([np.abs((1 - 2 * patterns) @ d) for patterns in _patterns(len(d))])
    return float(np.mean(sums >= sums[0] - 1e-12 * np.abs(d).sum()))


def _patterns(n: int) -> Iterator[Array]:
    """Patterns of signs (some, n) at a time, 1 is flipped: all 2^n of few seeds or 2^FLIPPED drawn ones, none first."""
    if n <= FLIPPED:
        yield np.arange(2**n)[:, None] >> np.arange(n) & 1
        return
    random, block = np.random.default_rng(0), max(1, AT_ONCE // n)
    for start in range(0, 2**FLIPPED, block):
        drawn = random.integers(0, 2, (min(block, 2**FLIPPED - start), n))
        drawn[0] *= start > 0
        yield drawn


def signs_agree(named: Sequence[tuple[str, Contrast]], alpha: float) -> str | None:
    """In a line, what the sign flips say of the verdicts of contrasts; None where there is no check."""
    checked = [(name, c) for name, c in named if not math.isnan(c.p_signs)]
    if not checked:
        return None
    found = [name for name, c in checked if c.differs]
    missed = [name for name, c in checked if c.differs and not c.p_signs < alpha]
    alone = [name for name, c in checked if not c.differs and c.p_signs < alpha]
    text = f"check by sign flips over seeds, of {len(checked)} contrasts: "
    text += f"{len(found) - len(missed)} of the {len(found)} differences are found again"
    text += f", not {', '.join(missed)}" * bool(missed)
    return text + f"; alone it finds {', '.join(alone)}" * bool(alone)


def _stated(c: Contrast, seeds: int, limits: tuple[float, float]) -> Contrast:
    """The contrast with the part of its interval in which a difference can lie; with none of one or two seeds."""
    if seeds < 3:
        return replace(c, low=math.nan, high=math.nan, smallest=math.nan)
    low, high = within((c.low, c.high), *limits)
    return replace(c, low=low, high=high)


def proportions(
    methods: Sequence[str],
    scores: Sequence[float],
    references: Sequence[float],
    rows: int,
    margin: float,
    alpha: float = 0.05,
) -> list[Contrast]:
    """The family of contrasts of one score each, a share of `rows` test rows, against the reference's on those rows.

    Only the luck of the rows is tested: with one run of a method nothing is known of the luck of its seed. Of fewer
    than ENOUGH right or wrong answers no test is made, as the normal distribution is then too narrow (Cochran, 1954).
    """
    made = []
    for method, score, reference in zip(methods, scores, references, strict=True):
        pooled = (score + reference) / 2
        few = min(pooled, 1 - pooled) * rows < ENOUGH
        error = math.nan if few else math.sqrt(2 * pooled * (1 - pooled) / rows)
        made.append(contrast(method, score - reference, error, math.inf, margin))
    return [
        replace(c, low=low, high=high) for c in family(made, alpha) for low, high in [within((c.low, c.high), -1, 1)]
    ]
