"""Scores with their seeds and intervals, and by epoch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loralab.report import numbers as n
from loralab.report.charts.parts import (
    Draw,
    Drawn,
    Style,
    apart,
    below,
    counted,
    cut,
    few,
    legend,
    metric,
    name_rows,
    room,
    span,
)
from loralab.report.look import PAPER, figure
from loralab.report.rows import Result


def intervals(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
    """A row a method: every seed, their mean and its interval."""
    if len(results) < 2:
        return None
    fig = figure(height=1.15 + 0.34 * len(results))
    ax = fig.subplots()
    near, far = apart(results)
    for row, r in enumerate(results):
        color, marker = styles[r.label]
        if r in far:
            edge = ax.get_yaxis_transform()
            ax.plot(0.03, row, "<", color=color, markersize=6, transform=edge)
            ax.text(0.06, row, n.score(r.summary.mean), va="center", fontsize=8, transform=edge)
            continue
        ax.plot(r.cell.scores, [row + 0.27] * len(r.seeds), "|", color=color, markersize=5, markeredgewidth=1)
        if len(r.seeds) > 1:
            ax.plot([r.summary.low, r.summary.high], [row, row], color=color, lw=2, solid_capstyle="round")
        face = color if len(r.seeds) > 1 else PAPER
        ax.plot(r.summary.mean, row, marker, color=color, markerfacecolor=face, markersize=7)
    name_rows(ax, [r.label for r in results])
    ax.locator_params(axis="x", nbins=4)
    if far:
        ax.set_xlim(*room(span(near), at_the_left=0.25))
    ax.set_xlabel(metric(results))
    told = "Point: mean (hollow: one seed); bar: 95 % interval; ticks: seeds."
    return "scores", "score", f"{told}{' Arrow: further down.' * bool(far)} {counted(results)}", fig


def measured(results: Sequence[Result]) -> list[str]:
    """The metrics that were taken after each epoch, the one of the scores first."""
    every = [name for r in results for run in r.cell.runs for row in run.history for name in row["validation"]]
    return list(dict.fromkeys([r.summary.metric for r in results] + every))


def by_epoch(name: str) -> Draw:
    """A metric on validation by epoch: mean over seeds, and a band from the lowest seed to the highest."""

    def draw(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
        histories = {r.label: _history(r, name) for r in results}
        chosen, told_of = few(results)
        shown = [r for r in chosen if np.isfinite(histories[r.label][1]).any()]
        if not shown:
            return None
        near, far = apart(shown, lambda r: histories[r.label][1][:, -1].tolist())
        fig = figure(height=3.0)
        ax = fig.subplots()
        for r in near:
            color, marker = styles[r.label]
            epochs, values = histories[r.label]
            mean = np.nanmean(values, axis=0)
            ax.plot(epochs, mean, color=color, marker=marker, markersize=4, label=cut(r.label, 28))
            if len(values) > 1:
                ax.fill_between(epochs, np.nanmin(values, 0), np.nanmax(values, 0), color=color, alpha=0.16, lw=0)
        ax.set(xlabel="epoch", ylabel=n.metric(name))
        ax.xaxis.get_major_locator().set_params(integer=True)
        legend(fig, ax)
        unseen = below(far, lambda r: float(np.nanmean(histories[r.label][1][:, -1])))
        drawn = "After each epoch, on validation. Line: mean; band: lowest to highest seed."
        told = f"{drawn}{told_of}{unseen} {counted(results)}"
        what = "learning curve" if name == results[0].summary.metric else f"learning curve, {n.metric(name)}"
        return "scores", what, told, fig

    return draw


def _history(r: Result, name: str) -> tuple[list[int], NDArray[np.float64]]:
    """Epochs, and values of a metric (seeds, epochs), nan where a run stopped earlier."""
    by_seed = [{row["epoch"]: row["validation"].get(name, np.nan) for row in run.history} for run in r.cell.runs]
    epochs = sorted({epoch for found in by_seed for epoch in found})
    return epochs, np.array([[found.get(epoch, np.nan) for epoch in epochs] for found in by_seed])
