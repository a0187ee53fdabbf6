"""The charts of a report, for each task and model: scores, learning curves, costs, speed and memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.data.metrics import LOWER_IS_BETTER, upward
from loralab.disk import size_text
from loralab.report import multiples
from loralab.report import numbers as n
from loralab.report.findings import Cost, Findings, Result, pareto, swept
from loralab.report.style import INK, MARKERS, MUTED, PAPER, SERIES, cut, figure, line_name, styled
from loralab.study import Run

Style = tuple[str, str]  # colour and marker of a method, the same in every picture
Drawing = tuple[str, str, str, Any] | None  # section, title without the task, caption, figure; None: nothing to draw
Draw = Callable[[Sequence[Result], dict[str, Style]], Drawing]
STEPS = (1, 2, 5, 10)  # of an axis
MANY = 12  # more lines than that cannot be followed in one picture
BEST = 8  # of many
FAR = 3.0  # outliers are at least so many times the spread of the others below them


@dataclass(frozen=True)
class Chart:
    """A figure and what the page writes around it."""

    section: str
    name: str  # of its file
    title: str
    caption: str  # what its numbers mean
    fig: Any


def charts(f: Findings) -> Iterator[Chart]:
    """All charts but those of ranks (rank_charts.py), in the order of the page within each section."""
    styles = styles_of(f.methods)
    for (task, model), results in f.places().items():
        extra = swept(results)
        main = [r for r in results if r not in extra]
        curves = [by_epoch(name) for name in metrics(main)]
        for draw in (intervals, *curves, *(against(key) for key in COSTS)):
            yield from _chart(f"{task}, {model}", draw, results if draw is intervals else main, styles)
    for model, results in f.models().items():
        extra = swept(results)
        for draw in (speed, memory):
            yield from _chart(model, draw, [r for r in results if r not in extra], styles)


def _chart(where: str, draw: Draw, results: Sequence[Result], styles: dict[str, Style]) -> Iterator[Chart]:
    with styled():
        made = draw(results, styles)
    if made is not None:
        section, title, caption, fig = made
        yield Chart(section, f"{section} {title} {where}", f"{where}: {title}", caption, fig)


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """A colour and marker for each method; colours repeat after the last, with another marker."""
    k = len(SERIES)
    return {label: (SERIES[i % k], MARKERS[(i + i // k) % len(MARKERS)]) for i, label in enumerate(methods)}


# ---- scores ----------------------------------------------------------------------------------------------------------


def intervals(results: Sequence[Result], styles: dict[str, Style]) -> Drawing:
    """A row a method: the score of every seed, their mean and its interval."""
    if len(results) < 2:
        return None
    fig = figure(height=1.15 + 0.34 * len(results))
    ax = fig.subplots()
    name = results[0].summary.metric
    near, far = outliers(results, name)
    lower = name in LOWER_IS_BETTER
    arrow, at, beside, side = (">", 0.97, 0.94, "right") if lower else ("<", 0.03, 0.06, "left")  # of what is far off
    for row, r in enumerate(results):
        color, marker = styles[r.label]
        if r in far:
            edge = ax.get_yaxis_transform()
            ax.plot(at, row, arrow, color=color, markersize=6, transform=edge)
            ax.text(beside, row, n.score(r.summary.mean), va="center", ha=side, fontsize=8, transform=edge)
            continue
        ax.plot(r.cell.scores, [row + 0.27] * len(r.seeds), "|", color=color, markersize=5, markeredgewidth=1)
        if len(r.seeds) > 1:
            ax.plot([r.summary.low, r.summary.high], [row, row], color=color, lw=2, solid_capstyle="round")
        face = color if len(r.seeds) > 1 else PAPER
        ax.plot(r.summary.mean, row, marker, color=color, markerfacecolor=face, markersize=7)
    name_rows(ax, [r.label for r in results])
    ax.locator_params(axis="x", nbins=4)
    if far:
        ax.set_xlim(*limits(extent(near), **{side: 0.25}))
    ax.set_xlabel(metric(results))
    bar = "; bar: 95 % interval" if any(np.isfinite(r.summary.low) for r in results) else ""
    meaning = f"Point: mean (hollow: one seed){bar}; ticks: seeds."
    arrow = " Arrow: off the scale, with its value." if far else ""
    return "scores", "score", f"{meaning}{arrow} {counted(results)}", fig


def metrics(results: Sequence[Result]) -> list[str]:
    """The metrics that were taken after each epoch, the one of the scores first."""
    every = [name for r in results for run in r.cell.runs for row in after_epochs(run) for name in row]
    return list(dict.fromkeys([r.summary.metric for r in results] + every))


def by_epoch(name: str) -> Draw:
    """A metric on validation by epoch: mean over seeds, and a band from the lowest seed to the highest."""

    def draw(results: Sequence[Result], styles: dict[str, Style]) -> Drawing:
        histories = {r.label: _history(r, name) for r in results}
        chosen, choice = few(results)
        shown = [r for r in chosen if np.isfinite(histories[r.label][1]).any()]
        if not shown:
            return None
        near, far = outliers(shown, name, lambda r: histories[r.label][1][:, -1].tolist())

        def line(ax: Any, r: Result, grey: str | None) -> None:
            epochs, values = histories[r.label]
            mean, (color, marker) = np.nanmean(values, axis=0), styles[r.label]
            if grey is not None:
                ax.plot(epochs, mean, color=grey, lw=0.8, zorder=1)
                return
            ax.plot(epochs, mean, color=color, marker=marker, markersize=4, label=line_name(r.label))
            if len(values) > 1:
                ax.fill_between(epochs, np.nanmin(values, 0), np.nanmax(values, 0), color=color, alpha=0.16, lw=0)

        fig, axes, apart = multiples.curves(near, line)
        for ax in axes:
            ax.xaxis.get_major_locator().set_params(integer=True)
        name_axes(fig, axes, apart, "epoch", n.axis(name))
        hidden = off_scale(far, lambda r: float(np.nanmean(histories[r.label][1][:, -1])))
        rows = "held-out rows" if any(map(read_once, (run for r in shown for run in r.cell.runs))) else "validation"
        meaning = f"After each epoch, on {rows}. Line: mean; band: lowest to highest seed."
        title = "learning curve" if name == results[0].summary.metric else f"learning curve, {n.metric(name)}"
        grey = " Grey: the other methods." if apart else ""
        return "scores", title, f"{meaning}{grey}{choice}{hidden} {counted(results)}", fig

    return draw


def read_once(run: Run) -> bool:
    """Whether the validation split was read at the selected epoch only."""
    return not all(row["validation"] for row in run.history)


def after_epochs(run: Run) -> list[dict[str, float]]:
    """The metrics after each epoch: on validation, on the held-out rows where that was read once."""
    return [row["held_out" if read_once(run) else "validation"] or {} for row in run.history]


def _history(r: Result, name: str) -> tuple[list[int], NDArray[np.float64]]:
    """Epochs, and values of a metric (seeds, epochs), nan where a run stopped earlier."""
    by_seed = [
        {row["epoch"]: scores.get(name, np.nan) for row, scores in zip(run.history, after_epochs(run), strict=True)}
        for run in r.cell.runs
    ]
    epochs = sorted({epoch for scores in by_seed for epoch in scores})
    return epochs, np.array([[scores.get(epoch, np.nan) for epoch in epochs] for scores in by_seed])


# ---- costs -----------------------------------------------------------------------------------------------------------

COSTS: dict[str, tuple[str, Callable[[Cost], float], Callable[[float], str]]] = {  # title -> axis, value, value as text
    "trainable parameters": ("trainable parameters, adapter and head", lambda c: c.trainable, n.count),
    "memory": ("memory of a step of one run", lambda c: c.step_bytes, size_text),
    "time": ("training time", lambda c: c.train_s, n.duration),
}


def against(key: str) -> Draw:
    """The score against what it costs; the front is what no other beats on both."""
    axis, value, text = COSTS[key]

    def draw(results: Sequence[Result], styles: dict[str, Style]) -> Drawing:
        if len(results) < 2:
            return None
        points = [(value(r.cost), r.summary.mean) for r in results]
        minutes = text is n.duration and max(points)[0] > 120
        scale = 60.0 if minutes else 1.0  # so that ticks are whole minutes
        points = [(x / scale, y) for x, y in points]
        fig = figure(height=3.0)
        ax = fig.subplots()
        _scatter(ax, results, points, styles)
        near, far = outliers(results, results[0].summary.metric)
        if far:
            ax.set_ylim(*limits(extent(near)))
        _cost_axis(ax, [x for x, _ in points], lambda x: f"{x:.3g} min" if minutes else text(x))
        ax.set(xlabel=axis, ylabel=metric(results))
        legend(fig, ax)
        of_time = shared(results) if text is n.duration else ""
        others = " Grey: the others." if len(results) > MANY else ""
        bar = "; bar: 95 % interval of the score" if any(np.isfinite(r.summary.low) for r in results) else ""
        front = f"Filled: on the Pareto front (dashed){bar}.{others}"
        return "costs", f"score against {key}", f"{front}{off_scale(far)}{of_time} {counted(results)}", fig

    return draw


def _scatter(
    ax: Any, results: Sequence[Result], points: Sequence[tuple[float, float]], styles: dict[str, Style]
) -> None:
    """A point a result with its interval, filled if it is on the front, which is a dashed line."""
    on_front = pareto([(x, upward(results[0].summary.metric, y)) for x, y in points])
    steps = sorted(point for point, on in zip(points, on_front, strict=True) if on)
    ax.step(*zip(*steps, strict=True), where="post", color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    for r, (x, y), on in zip(results, points, on_front, strict=True):
        named = on or len(results) <= MANY
        color, marker = styles[r.label] if named else (MUTED, ".")
        if len(r.seeds) > 1 and named:
            ax.plot([x, x], [r.summary.low, r.summary.high], color=color, lw=1.2, alpha=0.7)
        face = color if on else PAPER
        name = line_name(r.label) if named else None
        ax.plot(x, y, marker, color=color, markerfacecolor=face, ls="none", markersize=7.5, label=name)


def _cost_axis(ax: Any, values: Sequence[float], text: Callable[[float], str]) -> None:
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
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))


def speed(results: Sequence[Result], styles: dict[str, Style]) -> Drawing:
    """Training examples per second of each method."""
    values = [(r.cost.examples_per_s, r.cost.examples_per_s_sd) for r in results]
    return _bars(results, styles, values, "speed", "training examples per second", n.count, shared(results))


def memory(results: Sequence[Result], styles: dict[str, Style]) -> Drawing:
    """Memory of a step of each method."""
    values = [(r.cost.step_bytes, r.cost.step_bytes_sd) for r in results]
    parts = " Weights, gradients, optimizer and activations of one run."
    return _bars(results, styles, values, "memory", "memory of a step of one run", size_text, parts)


def _bars(
    results: Sequence[Result], styles: dict[str, Style], values: Sequence[tuple[float, float]], title: str, axis: str,
    text: Callable[[float], str], caption: str,
) -> Drawing:  # fmt: skip
    """A bar a method, under the name of its task."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    tasks = list(dict.fromkeys(r.place[0] for r in results))
    at = [row + tasks.index(r.place[0]) for row, r in enumerate(results)]  # a free row above each task but the first
    fig = figure(height=1.15 + 0.26 * (at[-1] + 1))
    ax = fig.subplots()
    ends = [mean + float(np.nan_to_num(sd)) for mean, sd in values]
    most = max(ends)
    for row, r, (mean, sd), end in zip(at, results, values, ends, strict=True):
        ax.barh(row, mean, color=styles[r.label][0], height=0.7)
        if not np.isnan(sd):
            ax.plot([max(0.0, mean - sd), end], [row, row], color=INK, lw=1)
        ax.text(end + most * 0.02, row, text(mean), va="center", fontsize=8)
    name_rows(ax, [r.label for r in results], at)
    for task in tasks if len(tasks) > 1 else ():
        first = next(row for row, r in zip(at, results, strict=True) if r.place[0] == task)
        ax.text(0, first - 0.5, cut(task, 30), va="bottom", fontsize=8, fontweight="bold")
    ax.set_ylim(at[-1] + 0.5, -1.4 if len(tasks) > 1 else -0.6)
    ax.set_xlim(0, most * 1.22)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x) if x else "0"))
    ax.set_xlabel(axis)
    return "bars", title, f"Bar: mean over seeds; line: ± one standard deviation.{caption} {counted(results)}", fig


# ---- captions --------------------------------------------------------------------------------------------------------


def metric(results: Sequence[Result]) -> str:
    """The metric of the scores, as the name of an axis."""
    return n.axis(results[0].summary.metric)


def counted(results: Sequence[Result]) -> str:
    """Seeds, rows and selection of what a picture shows."""
    counts = sorted({len(r.seeds) for r in results})
    rows = sorted({r.validation_rows for r in results})
    seeds = f"{counts[0]} seed{'s' * (counts[0] != 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    validation = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
    selection = ", ".join(dict.fromkeys(r.selection + " (optimistic)" * r.optimistic for r in results))
    return f"{seeds}, {validation} validation rows, selection {selection}."


def shared(results: Sequence[Result]) -> str:
    """Which methods have times of passes that several runs shared."""
    labels = list(dict.fromkeys(r.label for r in results if r.cost.together > 1))
    if not labels:
        return ""
    of = len({r.label for r in results})
    whose = ", ".join(labels) if len(labels) <= MANY else f"{len(labels)} of {of} methods"
    runs = "All runs" if len(labels) == of else f"Runs of {whose}"
    return f" {runs} shared passes; each has an equal part of their time."


def off_scale(far: Sequence[Result], value: Callable[[Result], float] = lambda r: r.summary.mean) -> str:
    """The outliers that a picture leaves out, with their values."""
    return "".join(f" Off the scale: {r.label}, {n.score(value(r))}." for r in far)


# ---- axes ------------------------------------------------------------------------------------------------------------


def name_rows(ax: Any, labels: Sequence[str], at: Sequence[int] | None = None) -> None:
    """Write labels at the rows of a horizontal chart, the first on top."""
    ax.set_yticks(at or range(len(labels)), [cut(label, 28) for label in labels])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def name_axes(fig: Any, axes: Sequence[Any], apart: bool, x: str, y: str) -> None:
    """Name the axes of a picture with its legend, or of its small multiples, which have their names above them."""
    if apart:
        fig.supxlabel(x, fontsize=9)
        fig.supylabel(y, fontsize=9)
    else:
        axes[0].set(xlabel=x, ylabel=y)
        legend(fig, axes[0])


def legend(fig: Any, ax: Any) -> None:
    """A legend below the picture, whose height grows by as much; what has no point in the picture is not in it."""
    named = zip(*ax.get_legend_handles_labels(), strict=True)
    seen = [(handle, label) for handle, label in named if np.isfinite(handle.get_ydata()).any()]
    handles, labels = [handle for handle, _ in seen], [label for _, label in seen]
    if handles:
        columns = max(1, min(4, 52 // (max(map(len, labels)) + 6), len(labels)))
        fig.legend(handles, labels, loc="outside lower center", ncols=columns)
        fig.set_figheight(fig.get_figheight() + 0.19 * -(-len(labels) // columns))


def few(results: Sequence[Result]) -> tuple[list[Result], str]:
    """The results that one picture has lines for, and how they were chosen if there are too many for that."""
    if len(results) <= MANY:
        return list(results), ""
    best = sorted(results, key=lambda r: upward(r.summary.metric, r.summary.mean), reverse=True)[:BEST]
    references = {r.against for r in results}
    chosen = [r for r in results if r in best or r.label in references]
    return chosen, f" The {BEST} best of {len(results)}, and what they are compared with."


def scores(r: Result) -> list[float]:
    """What a picture of scores shows of a result: its seeds and its interval."""
    return [*r.cell.scores, r.summary.low, r.summary.high]


def outliers(
    results: Sequence[Result], name: str, values: Callable[[Result], Sequence[float]] = scores
) -> tuple[list[Result], list[Result]]:
    """(the results to show, the few far worse ones that are cut off so that the others stay readable).

    `values` are of the metric `name`.
    """

    def up(r: Result) -> list[float]:
        return [upward(name, value) for value in values(r)]

    by_score = sorted(results, key=lambda r: float(np.nanmax(up(r))))
    for k in range(1, (len(results) + 1) // 2):  # fewer than half
        far, near = by_score[:k], by_score[k:]
        low, high = extent(near, up)
        if low - max(np.nanmax(up(r)) for r in far) > FAR * (high - low):
            return [r for r in results if r in near], far
    return list(results), []


def extent(results: Sequence[Result], values: Callable[[Result], Sequence[float]] = scores) -> tuple[float, float]:
    """The lowest and the highest value."""
    every = [v for r in results for v in values(r)]
    return float(np.nanmin(every)), float(np.nanmax(every))


def limits(extent: tuple[float, float], left: float = 0.08, right: float = 0.08) -> tuple[float, float]:
    """Limits of an axis: the extent and a margin on each side, as shares of its width."""
    width = extent[1] - extent[0] or 0.01
    return extent[0] - left * width, extent[1] + right * width
