"""Pictures of rank: the score by rank, and by rank and target, where a study varied them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from loralab.report.charts.parts import Chart, counted, cut, legend, metric
from loralab.report.look import MARKERS, SERIES, figure, styled
from loralab.report.rows import Findings, Point, Result, points
from loralab.study.statistics import estimate

DARK, LIGHT = "#0e1116", "#fdfdfd"  # on the map, whatever the theme


def charts(f: Findings) -> Iterator[Chart]:
    for (task, model), results in f.places().items():
        found = points(results)
        for name, made in (("rank curve", curve(found, results)), *maps(found)):
            if made is not None:
                caption, fig = made
                yield Chart("ranks", f"ranks {name} {task}, {model}", f"{task}, {model}: {name}", caption, fig)


Line = dict[int, tuple[float, float, float]]  # rank -> mean, low, high


def curve(found: dict[Point, Result], results: Sequence[Result]) -> tuple[str, Any] | None:
    """A line for every method and target that has several ranks, and for every cell whose one training gives many."""
    trained: dict[tuple[str, str], dict[int, Result]] = {}
    for (rank, targets, method), r in found.items():
        trained.setdefault((method, targets), {})[rank] = r
    trained = {key: line for key, line in trained.items() if len(line) > 1}
    several = len({targets for _, targets in trained}) > 1
    lines: dict[str, Line] = {
        f"{method} {targets}" if several else method: {rank: _mean(r) for rank, r in line.items()}
        for (method, targets), line in trained.items()
    }
    at_once = {f"{r.label}, one training": line for r in results if (line := _by_rank(r))}
    lines |= at_once
    if not lines:
        return None
    with styled():
        fig = figure(height=3.0)
        ax = fig.subplots()
        for i, (label, line) in enumerate(lines.items()):
            ranks = sorted(line)
            mean, low, high = zip(*(line[rank] for rank in ranks), strict=True)
            color = SERIES[i % len(SERIES)]
            ax.plot(ranks, mean, marker=MARKERS[i % len(MARKERS)], color=color, label=cut(label, 28))
            ax.fill_between(ranks, low, high, color=color, alpha=0.14, lw=0)
        every = {rank for line in lines.values() for rank in line}
        ax.set_xscale("log", base=2)
        shown = sorted(rank for rank in every if len(every) < 8 or rank.bit_count() == 1)
        ax.set_xticks(shown, map(str, shown))
        ax.minorticks_off()
        drawn = [r for line in trained.values() for r in line.values()] or list(results)
        ax.set(xlabel="rank", ylabel=metric(drawn))
        legend(fig, ax)
    alone = " One training, evaluated at every rank: over seeds alone." if at_once else ""
    return f"Line: mean over seeds; band: 95 % interval.{alone} {counted(drawn)}", fig


def _mean(r: Result) -> tuple[float, float, float]:
    return r.summary.mean, r.summary.low, r.summary.high


def _by_rank(r: Result) -> Line:
    """Of a cell whose runs were evaluated at every rank; empty for any other."""
    of_runs = [run.result.get("by_rank", {}) for run in r.cell.runs]
    line: Line = {}
    for rank in of_runs[0]:
        found = estimate([scores[rank][r.summary.metric] for scores in of_runs])
        line[int(rank)] = (found.mean, *found.interval())
    return line


def maps(found: dict[Point, Result]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """For every method that has several ranks on several targets."""
    for method in dict.fromkeys(method for _, _, method in found):
        own = {(rank, targets): r for (rank, targets, of), r in found.items() if of == method}
        ranks, targets = sorted({rank for rank, _ in own}), list(dict.fromkeys(t for _, t in own))
        if len(ranks) > 1 and len(targets) > 1:
            yield f"rank and targets of {method}", _map(own, ranks, targets)


def _map(own: dict[tuple[int, str], Result], ranks: Sequence[int], targets: Sequence[str]) -> tuple[str, Any]:
    means = np.array([[own[r, t].summary.mean if (r, t) in own else np.nan for r in ranks] for t in targets])
    low, high = np.nanmin(means), np.nanmax(means)
    with styled():
        fig = figure(height=1.4 + 0.36 * len(targets))
        ax = fig.subplots()
        drawn = ax.imshow(means, cmap="viridis", aspect="auto")
        ax.grid(visible=False)
        ax.set_xticks(range(len(ranks)), map(str, ranks))
        ax.set_yticks(range(len(targets)), [cut(t, 22) for t in targets])
        ax.set_xlabel("rank")
        for (i, j), mean in np.ndenumerate(means):
            if not np.isnan(mean):
                dark = high == low or (mean - low) / (high - low) > 0.6
                ax.text(
                    j, i, f"{mean:.3f}", ha="center", va="center", fontsize=7, color="#0e1116" if dark else "#fdfdfd"
                )
        fig.colorbar(drawn, ax=ax, label=metric(list(own.values())))
    return f"Mean over seeds; blank: not run. {counted(list(own.values()))}", fig
