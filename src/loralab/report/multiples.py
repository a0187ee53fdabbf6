"""Small multiples: a small picture for each method, the others grey behind it, where one picture would be a tangle."""

from collections.abc import Callable, Sequence
from typing import Any

from loralab.report.findings import Result
from loralab.report.style import GRID, figure

CURVES = 5  # more than that in one picture cannot be told apart
ACROSS = 3  # small pictures in a row
Draw = Callable[[Any, Result, str | None], None]  # axes, result, one colour for all or None for the method's own


def curves(results: Sequence[Result], draw: Draw, height: float = 3.0) -> tuple[Any, list[Any], bool]:
    """Return (figure, its axes, whether there is one for each result), with the curve of each result drawn."""
    if len(results) <= CURVES:
        fig = figure(height=height)
        axes = [fig.subplots()]
        for r in results:
            draw(axes[0], r, None)
        return fig, axes, False
    down = -(-len(results) // ACROSS)
    fig = figure(height=0.5 + 1.15 * down)
    grid = fig.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for ax, r in zip(axes, results, strict=False):
        for other in results:
            if other is not r:
                draw(ax, other, GRID)
        draw(ax, r, None)
        ax.set_title(folded(r.label), fontsize=7, fontweight="normal")
        ax.tick_params(labelsize=7)
    for ax in axes[len(results) :]:
        ax.set_visible(False)
    for column in range(ACROSS):  # the lowest picture of each column has the numbers of the axis
        last = max((i for i in range(len(results)) if i % ACROSS == column), default=None)
        if last is not None:
            axes[last].tick_params(labelbottom=True)
    return fig, axes[: len(results)], True


def folded(label: str, most: int = 18, lines: int = 2) -> str:
    """A label in at most two lines, divided at spaces where that can be."""
    words, out = label.split(" "), [""]
    for word in words:
        if out[-1] and len(out[-1]) + 1 + len(word) > most:
            out.append(word)
        else:
            out[-1] = f"{out[-1]} {word}".strip()
    kept = [line if len(line) <= most else line[: most - 1] + "…" for line in out]
    return "\n".join([*kept[: lines - 1], " ".join(kept[lines - 1 :])[: most + 4]] if len(kept) > lines else kept)
