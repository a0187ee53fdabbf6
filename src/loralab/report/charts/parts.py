"""What pictures are made of: labels, legends, the room of an axis, and the words of a caption."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.report import numbers as n
from loralab.report.rows import Result

Style = tuple[str, str]  # colour and marker of a method, the same in every picture
Drawn = tuple[str, str, str, Any] | None  # section, what, caption, figure
Draw = Callable[[Sequence[Result], dict[str, Style]], Drawn]
STEPS = (1, 2, 5, 10)  # of an axis
MANY = 12  # more lines than that in one picture nobody can follow
BEST = 8  # of many


@dataclass(frozen=True)
class Chart:
    section: str
    name: str  # of its file
    title: str
    caption: str  # what its numbers are
    fig: Any


# ---- words ----------------------------------------------------------------------------------------------------------


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def metric(results: Sequence[Result]) -> str:
    return n.metric(results[0].summary.metric)


def counted(results: Sequence[Result]) -> str:
    """Seeds and rows of what a picture shows."""
    counts = sorted({len(r.seeds) for r in results})
    rows = sorted({r.validation_rows for r in results})
    seeds = f"{counts[0]} seed{'s' * (counts[0] != 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    selection = ", ".join(dict.fromkeys(r.selection + " (optimistic)" * r.optimistic for r in results))
    return f"{seeds}, {' or '.join(f'{k:,}' for k in rows)} validation rows, selection {selection}."


def shared(results: Sequence[Result]) -> str:
    """Whose time is no speed of their own."""
    labels = list(dict.fromkeys(r.label for r in results if r.cost.together > 1))
    if not labels:
        return ""
    of = len({r.label for r in results})
    whose = "all" if len(labels) == of else ", ".join(labels) if len(labels) <= MANY else f"{len(labels)} of {of}"
    return f" In passes with other runs, an equal part of their time: {whose}."


def below(far: Sequence[Result], value: Callable[[Result], float] = lambda r: r.summary.mean) -> str:
    return "".join(f" Below the picture: {r.label}, {n.score(value(r))}." for r in far)


# ---- axes ------------------------------------------------------------------------------------------------------------


def name_rows(ax: Any, labels: Sequence[str], at: Sequence[int] | None = None) -> None:
    ax.set_yticks(at or range(len(labels)), [cut(label, 28) for label in labels])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def legend(fig: Any, ax: Any) -> None:
    """Below the picture, which grows by as much."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = max(1, min(4, 52 // (max(map(len, labels)) + 6), len(labels)))
        fig.legend(handles, labels, loc="outside lower center", ncols=columns)
        fig.set_figheight(fig.get_figheight() + 0.19 * -(-len(labels) // columns))


def few(results: Sequence[Result]) -> tuple[list[Result], str]:
    """Those that a picture with a line each has room for, and how they were chosen if they were."""
    if len(results) <= MANY:
        return list(results), ""
    best = sorted(results, key=lambda r: r.summary.mean, reverse=True)[:BEST]
    references = {r.against for r in results}
    chosen = [r for r in results if r in best or r.label in references]
    return chosen, f" The {BEST} best of {len(results)}, and what they are compared with."


FAR = 3.0  # spans of the others: nearer, and all are in the picture


def selected(r: Result) -> list[float]:
    """What a picture of scores has of a result: its seeds and its interval."""
    return [*r.cell.scores, r.summary.low, r.summary.high]


def apart(
    results: Sequence[Result], values: Callable[[Result], Sequence[float]] = selected
) -> tuple[list[Result], list[Result]]:
    """The results that a picture shows, and the few so far below that the others would be a single line beside them."""
    by_score = sorted(results, key=lambda r: float(np.nanmax(values(r))))
    for k in range(1, (len(results) + 1) // 2):  # fewer than half
        far, near = by_score[:k], by_score[k:]
        low, high = span(near, values)
        if low - max(np.nanmax(values(r)) for r in far) > FAR * (high - low):
            return [r for r in results if r in near], far
    return list(results), []


def span(results: Sequence[Result], values: Callable[[Result], Sequence[float]] = selected) -> tuple[float, float]:
    """From the lowest to the highest value."""
    every = [v for r in results for v in values(r)]
    return float(np.nanmin(every)), float(np.nanmax(every))


def room(span: tuple[float, float], at_the_left: float = 0.08) -> tuple[float, float]:
    width = span[1] - span[0] or 0.01
    return span[0] - at_the_left * width, span[1] + 0.08 * width
