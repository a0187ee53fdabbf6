"""The pictures of a report, one for each task and model: scores, learning curves, what they cost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.report import numbers as n
from loralab.report.look import INK, MARKERS, MUTED, PAPER, SERIES, figure, styled
from loralab.report.rows import Cost, Findings, Result, pareto, swept

Array = NDArray[Any]
Style = tuple[str, str]  # colour and marker of a method, the same in every picture


STEPS = (1, 2, 5, 10)  # of an axis


@dataclass(frozen=True)
class Chart:
    section: str
    name: str  # of its file
    title: str
    caption: str  # what its numbers are
    fig: Any


Drawn = tuple[str, str, str, Any] | None  # section, what, caption, figure
Draw = Callable[[Sequence[Result], dict[str, Style]], Drawn]


def charts(f: Findings) -> Iterator[Chart]:
    styles = styles_of(f.methods)
    for (task, model), results in f.places().items():
        extra = swept(results)
        main = [r for r in results if r not in extra]
        for draw in (scores, curves, *(_cost(key) for key in COSTS)):
            yield from _chart(f"{task}, {model}", draw, results if draw is scores else main, styles)
    for model, results in f.models().items():
        extra = swept(results)
        for draw in (speed, memory):
            yield from _chart(model, draw, [r for r in results if r not in extra], styles)


def _chart(where: str, draw: Draw, results: Sequence[Result], styles: dict[str, Style]) -> Iterator[Chart]:
    with styled():
        made = draw(results, styles)
    if made is not None:
        section, what, caption, fig = made
        yield Chart(section, f"{section} {what} {where}", f"{where}: {what}", caption, fig)


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """Colours repeat after the last, with another marker."""
    k = len(SERIES)
    return {label: (SERIES[i % k], MARKERS[(i + i // k) % len(MARKERS)]) for i, label in enumerate(methods)}


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
    """A row a method: every seed, their mean and its interval."""
    if len(results) < 2:
        return None
    fig = figure(height=1.15 + 0.34 * len(results))
    ax = fig.subplots()
    for row, r in enumerate(results):
        color, marker = styles[r.label]
        ax.plot(r.cell.scores, [row + 0.27] * len(r.seeds), "|", color=color, markersize=5, markeredgewidth=1)
        if len(r.seeds) > 1:
            ax.plot([r.summary.low, r.summary.high], [row, row], color=color, lw=2, solid_capstyle="round")
        face = color if len(r.seeds) > 1 else PAPER
        ax.plot(r.summary.mean, row, marker, color=color, markerfacecolor=face, markersize=7)
    _rows(ax, [r.label for r in results])
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel(_metric(results))
    return "scores", "score", f"Point: mean (hollow: one seed); bar: 95 % interval; ticks: seeds. {_n(results)}", fig


def _rows(ax: Any, labels: Sequence[str], at: Sequence[int] | None = None) -> None:
    ax.set_yticks(at or range(len(labels)), [_cut(label, 28) for label in labels])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _metric(results: Sequence[Result]) -> str:
    return n.metric(results[0].summary.metric)


def _n(results: Sequence[Result]) -> str:
    """Seeds and rows of what a picture shows."""
    counts = sorted({len(r.seeds) for r in results})
    rows = sorted({r.validation_rows for r in results})
    seeds = f"{counts[0]} seed{'s' * (counts[0] != 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    selection = ", ".join(dict.fromkeys(r.selection + " (optimistic)" * r.optimistic for r in results))
    return f"{seeds}, {' or '.join(f'{k:,}' for k in rows)} validation rows, selection {selection}."


# ---- learning curves -------------------------------------------------------------------------------------------------


def curves(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
    """The metric on validation by epoch: mean over seeds, and a band from the lowest seed to the highest."""
    fig = figure(height=3.0)
    ax = fig.subplots()
    for r in results:
        color, marker = styles[r.label]
        epochs, values = _history(r)
        if not len(epochs):
            continue
        mean = np.nanmean(values, axis=0)
        ax.plot(epochs, mean, color=color, marker=marker, markersize=4, label=_cut(r.label, 28))
        if len(values) > 1:
            ax.fill_between(epochs, np.nanmin(values, 0), np.nanmax(values, 0), color=color, alpha=0.16, lw=0)
    ax.set(xlabel="epoch", ylabel=_metric(results))
    ax.xaxis.get_major_locator().set_params(integer=True)
    _legend(fig, ax)
    told = f"After each epoch, on validation. Line: mean; band: lowest to highest seed. {_n(results)}"
    return "scores", "learning curve", told, fig


def _history(r: Result) -> tuple[list[int], Array]:
    """Epochs, and scores (seeds, epochs), nan where a run stopped earlier."""
    by_seed = [{row["epoch"]: row["validation"][r.summary.metric] for row in run.history} for run in r.cell.runs]
    epochs = sorted({epoch for found in by_seed for epoch in found})
    return epochs, np.array([[found.get(epoch, np.nan) for epoch in epochs] for found in by_seed])


def _legend(fig: Any, ax: Any) -> None:
    """Below the picture, which grows by as much."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = max(1, min(4, 52 // (max(map(len, labels)) + 6), len(labels)))
        fig.legend(handles, labels, loc="outside lower center", ncols=columns)
        fig.set_figheight(fig.get_figheight() + 0.19 * -(-len(labels) // columns))


# ---- costs -----------------------------------------------------------------------------------------------------------

COSTS: dict[str, tuple[str, Callable[[Cost], float], Callable[[float], str]]] = {  # what -> axis, value, how it reads
    "values that learn": ("values that learn, adapter and head", lambda c: c.trainable, n.count),
    "memory": ("peak memory", lambda c: c.peak_bytes, n.size),
    "time": ("training time", lambda c: c.train_s, n.duration),
}


def _cost(key: str) -> Draw:
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
        front = sorted(point for point, on in zip(points, on_front, strict=True) if on)
        ax.step(*zip(*front, strict=True), where="post", color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for r, (x, y), on in zip(results, points, on_front, strict=True):
            color, marker = styles[r.label]
            if len(r.seeds) > 1:
                ax.plot([x, x], [r.summary.low, r.summary.high], color=color, lw=1.2, alpha=0.7)
            face = color if on else PAPER
            ax.plot(x, y, marker, color=color, markerfacecolor=face, ls="none", markersize=7.5, label=_cut(r.label, 28))
        _scale(ax, [x for x, _ in points], lambda x: reads(x * unit))
        ax.set(xlabel=axis, ylabel=_metric(results))
        _legend(fig, ax)
        told = f"Filled: on the Pareto front (dashed); bar: 95 % interval of the score. {_n(results)}"
        return "costs", f"score against {key}", told, fig

    return draw


def _scale(ax: Any, values: Sequence[float], reads: Callable[[float], str]) -> None:
    """Logarithmic where values are of different orders."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(low / 2, high * 2)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        ax.margins(x=0.12)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: reads(x)))


# ---- bars ------------------------------------------------------------------------------------------------------------


def speed(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
    values = [(r.cost.examples_per_s, r.cost.examples_per_s_sd) for r in results]
    return _bars(results, styles, values, "speed", "training examples per second", n.count)


def memory(results: Sequence[Result], styles: dict[str, Style]) -> Drawn:
    values = [(r.cost.peak_bytes, r.cost.peak_bytes_sd) for r in results]
    return _bars(results, styles, values, "memory", "peak memory", n.size)


def _bars(
    results: Sequence[Result], styles: dict[str, Style], values: Sequence[tuple[float, float]], what: str, axis: str,
    reads: Callable[[float], str],
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
    _rows(ax, [r.label for r in results], at)
    for task in tasks if len(tasks) > 1 else ():
        first = next(row for row, r in zip(at, results, strict=True) if r.place[0] == task)
        ax.text(0, first - 0.5, _cut(task, 30), va="bottom", fontsize=8, fontweight="bold")
    ax.set_ylim(at[-1] + 0.5, -1.4 if len(tasks) > 1 else -0.6)
    ax.set_xlim(0, most * 1.22)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: reads(x)))
    ax.set_xlabel(axis)
    return "bars", what, f"Bar: mean over seeds; line: ± one standard deviation. {_n(results)}", fig
