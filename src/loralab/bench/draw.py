"""The pictures: a row a case with both sides' time and memory, and what a step costs as one thing grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.bench.told import label
from loralab.report.look import INK, MUTED, SERIES, figure, save, styled

LOOK = {"peft": ("PEFT", MUTED, "s"), "loralab": ("loralab", SERIES[0], "o")}  # side -> name, colour, marker
GROWS = {"rank": "rank", "layers": "layers", "length": "tokens of a row"}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes a picture of each part that the result has."""
    made = []
    with styled():
        if steps := result.get("steps"):
            made.append(("steps", _bars(steps, "seconds", 1e3, "ms a step")))
        if epochs := result.get("epochs"):
            made.append(("epochs", _bars(epochs, "rows_per_s", 1, "rows a second")))
        if growth := result.get("growth"):
            made.append(("growth", _growth(growth)))
    paths = []
    for name, fig in made:
        paths.append(folder / f"{name}.png")
        save(fig, paths[-1])
    return paths


def _bars(rows: Sequence[Mapping[str, Any]], key: str, scale: float, unit: str) -> Any:
    """Two bars a case: the measured quantity, with quartiles and the ratio, and the peak of memory."""
    fig = figure(8.2, 1.3 + 0.52 * len(rows))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, (side, (_, color, _)) in enumerate(LOOK.items()):
        at = [row + (place - 0.5) * 0.36 for row in range(len(rows))]
        told = [r[key][side] for r in rows]
        left.barh(at, [s["median"] * scale for s in told], 0.34, color=color, label=LOOK[side][0])
        for y, s in zip(at, told, strict=True):
            left.plot([s["low"] * scale, s["high"] * scale], [y, y], color=INK, lw=1)
        right.barh(at, [r["memory"][side]["peak"] / 1e6 for r in rows], 0.34, color=color)
    beside: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    for row, r in enumerate(rows):
        ends = [r[key][side]["high"] * scale for side in LOOK]
        left.annotate(f"{r['faster']['median']:.2f}x", (max(ends), row), **beside)
        most = max(r["memory"][side]["peak"] for side in LOOK) / 1e6
        right.annotate(f"{r['memory_ratio']['peak']:.2f}x", (most, row), **beside)
    left.set_yticks(range(len(rows)), [label(r, rows) for r in rows])
    left.invert_yaxis()
    for ax, what in ((left, unit), (right, "MB at the peak, above imports")):
        ax.set_xlabel(what)
        ax.grid(False, axis="y")
        ax.set_xlim(0, 1.24 * ax.dataLim.x1)  # room for the ratio
        ax.tick_params(axis="y", length=0)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return fig


def _growth(growth: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    fig = figure(8.2, 2.9)
    axes = fig.subplots(1, len(growth), squeeze=False)[0]
    for ax, (axis, rows) in zip(axes, growth.items(), strict=True):
        at = [r["case"][axis] for r in rows]
        for side, (name, color, marker) in LOOK.items():
            told = [r["seconds"][side] for r in rows]
            ax.plot(at, [s["median"] * 1e3 for s in told], marker=marker, color=color, label=name)
            low, high = ([s[end] * 1e3 for s in told] for end in ("low", "high"))
            ax.fill_between(at, low, high, color=color, alpha=0.2, lw=0)
        if axis != "layers":
            ax.set_xscale("log", base=2)
        ax.set_xticks(at, [str(n) for n in at])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel(GROWS[axis])
    axes[0].set_ylabel("ms a step")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return fig
