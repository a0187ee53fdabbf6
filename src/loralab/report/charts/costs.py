"""What a method costs: the score against it, and bars of speed and memory."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loralab.report import numbers as n
from loralab.report.charts.parts import (
    MANY,
    STEPS,
    Draw,
    Drawn,
    Style,
    apart,
    below,
    counted,
    cut,
    legend,
    metric,
    name_rows,
    room,
    shared,
    span,
)
from loralab.report.look import INK, MUTED, PAPER, figure
from loralab.report.rows import Cost, Result, pareto

COSTS: dict[str, tuple[str, Callable[[Cost], float], Callable[[float], str]]] = {  # what -> axis, value, how it reads
    "values that learn": ("values that learn, adapter and head", lambda c: c.trainable, n.count),
    "memory": ("memory of one run's step", lambda c: c.step_bytes, n.size),
    "time": ("training time", lambda c: c.train_s, n.duration),
}


def against(key: str) -> Draw:
    axis, value, reads = COSTS[key]

    def draw(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
        """The score against what it costs; the front is what nothing else beats on both."""
        if len(results) < 2:
            return None
        points = [(value(r.cost), r.summary.mean) for r in results]
        unit = 60.0 if reads is n.duration and max(points)[0] > 120 else 1.0  # so that ticks are whole minutes
        points = [(x / unit, y) for x, y in points]
        on_front = pareto(points)
        fig = figure(height=3.0)
        ax = fig.subplots()
        steps = sorted(point for point, on in zip(points, on_front, strict=True) if on)
        ax.step(*zip(*steps, strict=True), where="post", color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for r, (x, y), on in zip(results, points, on_front, strict=True):
            named = on or len(results) <= MANY
            color, marker = styles[r.label] if named else (MUTED, ".")
            if len(r.seeds) > 1 and named:
                ax.plot([x, x], [r.summary.low, r.summary.high], color=color, lw=1.2, alpha=0.7)
            face = color if on else PAPER
            name = cut(r.label, 28) if named else None
            ax.plot(x, y, marker, color=color, markerfacecolor=face, ls="none", markersize=7.5, label=name)
        near, far = apart(results)
        if far:
            ax.set_ylim(*room(span(near)))
        _scale(ax, [x for x, _ in points], lambda x: reads(x * unit))
        ax.set(xlabel=axis, ylabel=metric(results))
        legend(fig, ax)
        of_time = shared(results) if reads is n.duration else ""
        others = " Grey: the others." if len(results) > MANY else ""
        front = f"Filled: on the Pareto front (dashed); bar: 95 % interval of the score.{others}"
        told = f"{front}{below(far)}{of_time} {counted(results)}"
        return "costs", f"score against {key}", told, fig

    return draw


def _scale(ax: Any, values: Sequence[float], reads: Callable[[float], str]) -> None:
    """Logarithmic where values are of different orders."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=6, subs=(1, 2, 5) if high / low < 100 else (1,)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(low / 2, high * 2)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        ax.margins(x=0.12)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: reads(x)))


def speed(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
    values = [(r.cost.examples_per_s, r.cost.examples_per_s_sd) for r in results]
    return _bars(results, styles, values, "speed", "training examples per second", n.count, shared(results))


def memory(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
    values = [(r.cost.step_bytes, r.cost.step_bytes_sd) for r in results]
    told = " Weights, gradients, optimizer and activations of one run."
    return _bars(results, styles, values, "memory", "memory of one run's step", n.size, told)


def _bars(
    results: Sequence[Result], styles: dict[str, Style], values: Sequence[tuple[float, float]], what: str, axis: str,
    reads: Callable[[float], str], caption: str,
) -> Drawn:  # fmt: skip
    """A bar a method, under the name of its task."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    tasks = list(dict.fromkeys(r.place[0] for r in results))
    at = [row + tasks.index(r.place[0]) for row, r in enumerate(results)]  # a free row above each task but the first
    fig = figure(height=1.15 + 0.26 * (at[-1] + 1))
    ax = fig.subplots()
    most = max(mean for mean, _ in values)
    for row, r, (mean, sd) in zip(at, results, values, strict=True):
        ax.barh(row, mean, color=styles[r.label][0], height=0.7)
        if not np.isnan(sd):
            ax.plot([mean - sd, mean + sd], [row, row], color=INK, lw=1)
        ax.text(mean + np.nan_to_num(sd) + most * 0.02, row, reads(mean), va="center", fontsize=8)
    name_rows(ax, [r.label for r in results], at)
    for task in tasks if len(tasks) > 1 else ():
        first = next(row for row, r in zip(at, results, strict=True) if r.place[0] == task)
        ax.text(0, first - 0.5, cut(task, 30), va="bottom", fontsize=8, fontweight="bold")
    ax.set_ylim(at[-1] + 0.5, -1.4 if len(tasks) > 1 else -0.6)
    ax.set_xlim(0, most * 1.22)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: reads(x)))
    ax.set_xlabel(axis)
    return "bars", what, f"Bar: mean over seeds; line: ± one standard deviation.{caption} {counted(results)}", fig
