"""Charts of planned contrasts: a forest of differences to the reference, and the scores of rates that were tried."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from loralab.data.metrics import best, upward
from loralab.report import multiples
from loralab.report import numbers as n
from loralab.report.charts import FAR, MANY, Chart, Style, extent, limits, name_axes, outliers, styles_of
from loralab.report.findings import Findings, Result
from loralab.report.style import GRID, INK, MUTED, PAPER, cut, figure, line_name, plain_log, styled
from loralab.study import Run
from loralab.study.record import collapses
from loralab.study.search import score
from loralab.study.statistics import PlannedFamily
from loralab.study.statistics.contrasts import Contrast
from loralab.study.statistics.estimates import within

LEVEL = 0.95
Line = tuple[Contrast, float, float, str]  # contrast, its error without the rows, its margin, the name of its row


def planned_charts(f: Findings) -> Iterator[Chart]:
    """A forest for each model and endpoint, and a picture of rates for each task and model that was tuned."""
    by_place: dict[tuple[str, str], list[PlannedFamily]] = {}
    for family in f.planned:
        by_place.setdefault((family.model, family.endpoint), []).append(family)
    for (model, endpoint), families in by_place.items():
        where = f"{Path(model).name}, {n.metric(endpoint)}"
        title = f"{where}: difference to {f.study.compare['reference']}"
        with styled():
            fig = forest(families)
        yield Chart("contrasts", f"contrasts {where}", title, CAPTION, fig)
    styles = styles_of(f.methods)
    for (task, model), results in f.places().items():
        with styled():
            drawn = rates(results, styles)
        if drawn is not None:
            where = f"{task}, {Path(model).name}"
            yield Chart("rates", f"rates {where}", f"{where}: score by rate", *drawn)


# ---- differences -----------------------------------------------------------------------------------------------------

CAPTION = (
    "Point: difference, above 0 the method is better. Thick bar: 95 % over seeds; thin: over seeds and rows. Shaded: "
    "differences within the margin. Filled: shown to differ, corrected. Intervals are not corrected. Arrow: goes on "
    "off the scale."
)


def forest(families: Sequence[PlannedFamily]) -> Any:
    """A block a method: its mean over tasks first, where that is planned, then each task."""
    blocks: dict[str, list[Line]] = {}
    for family in families:
        parts = zip(family.contrasts, family.errors_of_seeds, family.margins, family.places, strict=True)
        for c, error, margin, (method, task) in parts:
            blocks.setdefault(method, []).append((c, error, margin, "mean of tasks" if task is None else task))
    lines = sum(map(len, blocks.values()))
    widest = reach([line for own in blocks.values() for line in own])
    fig = figure(height=0.75 + 0.19 * (lines + 1.3 * len(blocks)))
    ax = fig.subplots()
    at, places, names = 0.0, [], []
    for method, own in blocks.items():
        ax.text(
            0.0, at, cut(method, 40), fontweight="bold", va="center", fontsize=9, transform=ax.get_yaxis_transform()
        )
        for line in own:
            at += 1
            _line(ax, at, line, widest, bold=line[3] == "mean of tasks")
            places.append(at)
            names.append(cut(line[3], 20))
        at += 1.3
    ax.axvline(0, color=MUTED, lw=0.8, zorder=0)
    ax.set_xlim(-widest, widest)
    ax.set_yticks(places, names, fontsize=8)
    ax.set_ylim(at - 0.3, -0.7)
    ax.grid(axis="y", visible=False)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("difference")
    return fig


def reach(lines: Sequence[Line]) -> float:
    """How far the axis goes to each side: a few methods that are far off are arrows, so that the others stay apart."""
    ends = sorted(max(abs(c.low), abs(c.high), 1.5 * margin) for c, _, margin, _ in lines if np.isfinite(c.low))
    if not ends:
        known = [1.5 * max(abs(c.difference), margin) for c, _, margin, _ in lines if np.isfinite(c.difference)]
        return max(known, default=1.0)
    usual = ends[len(ends) // 2]
    return 1.08 * max(end for end in ends if end <= FAR * usual)


def _line(ax: Any, at: float, line: Line, widest: float, bold: bool) -> None:
    c, of_seeds, margin, _ = line
    ax.fill_between([-margin, margin], at - 0.5, at + 0.5, color=GRID, alpha=0.6, lw=0, zorder=0)
    if abs(c.difference) > widest:
        side = np.sign(c.difference)
        ax.plot(0.96 * side * widest, at, ">" if side > 0 else "<", color=INK, markersize=5)
        where = "right" if side > 0 else "left"
        ax.text(0.9 * side * widest, at, n.signed(c.difference), va="center", ha=where, fontsize=8)
        return
    if np.isfinite(c.low):
        half = float(stats.t.ppf((1 + LEVEL) / 2, c.df)) * of_seeds
        ax.plot([c.low, c.high], [at, at], color=INK, lw=0.8, solid_capstyle="butt")
        thick = within((c.difference - half, c.difference + half), c.low, c.high)  # as far as a difference can be
        ax.plot(thick, [at, at], color=INK, lw=2.4, solid_capstyle="butt")
        for end, marker in ((c.low, "<"), (c.high, ">")):
            if abs(end) > widest:
                ax.plot(np.sign(end) * 0.98 * widest, at, marker, color=INK, markersize=4)
    face = INK if c.differs else PAPER
    ax.plot(c.difference, at, "D" if bold else "o", color=INK, markerfacecolor=face, markersize=6 if bold else 4.5)


# ---- rates -----------------------------------------------------------------------------------------------------------


def rates(results: Sequence[Result], styles: dict[str, Style]) -> tuple[str, Any] | None:
    """(caption, figure): a line a method over the rates that tuning tried; None where fewer than two were."""
    tuned = [r for r in results if len(tried(r)) > 1]
    if not tuned or len(tuned) > MANY:
        return None
    from matplotlib.ticker import LogLocator, NullLocator

    dead = [r for r in tuned if not _alive(r)]
    if len(dead) == len(tuned):
        return None
    metric = results[0].summary.metric
    near, far = outliers([r for r in tuned if r not in dead], metric, _alive)

    def line(ax: Any, r: Result, grey: str | None) -> None:
        _rates_of(ax, r, styles[r.label], grey)

    fig, axes, apart = multiples.curves(near, line)
    every = [rate for r in tuned for rate in tried(r)]
    steps = (1.0, 3.0) if max(every) < 30 * min(every) else (1.0,)  # of more decades the locator shows no 3 and no 1
    for ax in axes:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=4, subs=steps))
        ax.xaxis.set_minor_locator(NullLocator())  # its labels would lie on each other
        plain_log(ax.xaxis)
        ax.set_ylim(*limits(extent(near, _alive), left=0.14))
    name_axes(fig, axes, apart, "learning rate", f"{n.axis(metric)}, held out")
    return _caption(tuned, far, dead), fig


def _rates_of(ax: Any, r: Result, style: Style, grey: str | None) -> None:
    """Draw the runs of every rate and the line of their means; in grey the line alone."""
    color, marker = style
    means = {}
    for rate, runs in sorted(tried(r).items()):
        values = [_held_out(run) for run in runs if not collapses(run)]
        if grey is None:
            ax.plot([rate] * len(values), values, marker, color=color, markersize=3.5)
        if len(values) < len(runs):
            if grey is None:
                ax.plot(rate, 0.03, "x", color=color, markersize=5, transform=ax.get_xaxis_transform())
        elif values:
            means[rate] = float(np.mean(values))
    if grey is not None:
        ax.plot(list(means), list(means.values()), color=grey, lw=0.8, zorder=1)
        return
    ax.plot(list(means), list(means.values()), color=color, lw=1.2, label=line_name(r.label))
    if (chosen := _chosen(r)) in means:
        ring = {"markerfacecolor": "none", "markersize": 10, "markeredgewidth": 1.4}
        ax.plot(chosen, means[chosen], "o", color=color, **ring)


def _alive(r: Result) -> list[float]:
    """The held-out scores of the tuning runs that learned something."""
    return [_held_out(run) for runs in tried(r).values() for run in runs if not collapses(run)]


def _held_out(run: Run) -> float:
    """The held-out score of a tuning run, in units of its metric."""
    return upward(str(run.result["metric"]["name"]), score(run))


def tried(r: Result) -> dict[float, list[Run]]:
    """Learning rate -> the tuning runs at it; empty where tuning varied something else."""
    found: dict[float, list[Run]] = {}
    for run in r.cell.tuning:
        if not run.scheduled.tried.keys() <= {"lr", "lr_times"}:
            return {}
        found.setdefault(float(run.facts["recipe"]["lr"]), []).append(run)
    return found


def _chosen(r: Result) -> float | None:
    return float(r.cell.runs[0].facts["recipe"]["lr"]) if r.cell.runs else None


def best_rate(r: Result) -> float | None:
    """The rate that tuning chose, None where nothing was tuned."""
    return _chosen(r) if tried(r) else None


def _caption(tuned: Sequence[Result], far: Sequence[Result], dead: Sequence[Result]) -> str:
    seeds = sorted({run.seed for r in tuned for run in r.cell.tuning})
    hidden = "".join(f" Off the scale: {r.label}, {n.score(best(r.summary.metric, _alive(r)))}." for r in far)
    hidden += "".join(f" Not drawn, as every run collapsed: {r.label}." for r in dead)
    return (
        "Held-out score of every rate that tuning tried. Line: mean over its seeds; ring: the rate that was chosen; "
        f"cross at the foot: the same prediction for every row on a seed, so the rate is out.{hidden} "
        f"Seeds {n.spans(tuple(seeds))}."
    )
