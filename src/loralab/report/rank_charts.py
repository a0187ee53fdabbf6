"""Charts of rank: the score by rank, and by rank and targets, where a study varied them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from loralab.report.charts import Chart, counted, legend, metric
from loralab.report.findings import Findings, Point, Result, points
from loralab.report.style import MARKERS, SERIES, cut, figure, line_name, styled
from loralab.study.statistics import mean_estimate

ON_LIGHT, ON_DARK = "#0e1116", "#fdfdfd"  # text on the map, whatever the theme
Line = dict[int, tuple[float, float, float]]  # rank -> mean, low, high


def rank_charts(f: Findings) -> Iterator[Chart]:
    """A curve for each task and model, and a map for each method with several ranks on several targets."""
    for (task, model), results in f.places().items():
        placed = points(results)
        for name, made in (("rank curve", curve(placed, results)), *maps(placed)):
            if made is not None:
                caption, fig = made
                yield Chart("ranks", f"ranks {name} {task}, {model}", f"{task}, {model}: {name}", caption, fig)


def curve(placed: dict[Point, Result], results: Sequence[Result]) -> tuple[str, Any] | None:
    """(caption, figure): a line for each method and targets with several ranks, and for each training of many ranks.

    Results of one rank that differ in other settings are on lines of their own.
    """
    trained: dict[Point, dict[int, Result]] = {}  # point without its rank -> rank -> result
    for point, r in placed.items():
        trained.setdefault(point._replace(rank=0), {})[point.rank] = r
    trained = {key: by_rank for key, by_rank in trained.items() if len(by_rank) > 1}
    several = len({point.targets for point in trained}) > 1
    lines: dict[str, Line] = {}
    for point, by_rank in trained.items():
        label = " ".join(filter(None, [point.method, point.targets if several else "", point.variant]))
        lines[label] = {rank: (r.summary.mean, r.summary.low, r.summary.high) for rank, r in by_rank.items()}
    at_once = {f"{r.label}, one training": line for r in results if (line := _by_rank(r))}
    lines |= at_once
    if not lines:
        return None
    drawn = [r for by_rank in trained.values() for r in by_rank.values()] or list(results)
    alone = " One training, evaluated at every rank: over seeds alone." if at_once else ""
    apart = " Results of one rank that differ in other settings have lines of their own." if _split(trained) else ""
    return f"Line: mean over seeds; band: 95 % interval.{alone}{apart} {counted(drawn)}", _curves(lines, metric(drawn))


def _split(trained: dict[Point, dict[int, Result]]) -> bool:
    return any(point.variant for point in trained)


def _curves(lines: dict[str, Line], ylabel: str) -> Any:
    with styled():
        fig = figure(height=3.0)
        ax = fig.subplots()
        for i, (label, line) in enumerate(lines.items()):
            ranks = sorted(line)
            mean, low, high = zip(*(line[rank] for rank in ranks), strict=True)
            color = SERIES[i % len(SERIES)]
            ax.plot(ranks, mean, marker=MARKERS[i % len(MARKERS)], color=color, label=line_name(label))
            ax.fill_between(ranks, low, high, color=color, alpha=0.14, lw=0)
        every = {rank for line in lines.values() for rank in line}
        ax.set_xscale("log", base=2)
        shown = sorted(rank for rank in every if len(every) < 8 or rank.bit_count() == 1)
        ax.set_xticks(shown, map(str, shown))
        ax.minorticks_off()
        ax.set(xlabel="rank", ylabel=ylabel)
        legend(fig, ax)
    return fig


def _by_rank(r: Result) -> Line:
    """The line of a cell whose runs were evaluated at every rank; empty for any other."""
    of_runs = [run.result.get("by_rank", {}) for run in r.cell.runs]
    line: Line = {}
    for rank in of_runs[0]:
        found = mean_estimate([scores[rank][r.summary.metric] for scores in of_runs])
        line[int(rank)] = (found.mean, *found.interval())
    return line


def maps(placed: dict[Point, Result]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(title, (caption, figure)) of every method that has several ranks on several targets."""
    for method, variant in dict.fromkeys((point.method, point.variant) for point in placed):
        own = {(p.rank, p.targets): r for p, r in placed.items() if (p.method, p.variant) == (method, variant)}
        ranks, targets = sorted({rank for rank, _ in own}), list(dict.fromkeys(t for _, t in own))
        if len(ranks) > 1 and len(targets) > 1:
            yield f"rank and targets of {' '.join(filter(None, [method, variant]))}", _map(own, ranks, targets)


def _map(own: dict[tuple[int, str], Result], ranks: Sequence[int], targets: Sequence[str]) -> tuple[str, Any]:
    means = np.array([[own[r, t].summary.mean if (r, t) in own else np.nan for r in ranks] for t in targets])
    low, high = np.nanmin(means), np.nanmax(means)  # means is (targets, ranks)
    with styled():
        fig = figure(height=1.4 + 0.36 * len(targets))
        ax = fig.subplots()
        image = ax.imshow(means, cmap="viridis", aspect="auto")
        ax.grid(visible=False)
        ax.set_xticks(range(len(ranks)), map(str, ranks))
        ax.set_yticks(range(len(targets)), [cut(t, 22) for t in targets])
        ax.set_xlabel("rank")
        for (i, j), mean in np.ndenumerate(means):
            if not np.isnan(mean):
                light = high == low or (mean - low) / (high - low) > 0.6
                color = ON_LIGHT if light else ON_DARK
                ax.text(j, i, f"{mean:.3f}", ha="center", va="center", fontsize=7, color=color)
        fig.colorbar(image, ax=ax, label=metric(list(own.values())))
    return f"Mean over seeds; blank: not run. {counted(list(own.values()))}", fig
