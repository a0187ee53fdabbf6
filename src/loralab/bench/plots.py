"""The pictures of a bench: a row a case with time and memory of both backends, and what a step costs as it grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.bench.tables import label
from loralab.report.style import INK, MUTED, SERIES, figure, save, styled

BACKENDS = {"peft": ("PEFT", MUTED, "s"), "loralab": ("loralab", SERIES[0], "o")}  # name, colour, marker
AXES = {"rank": "rank", "layers": "layers", "max_length": "tokens of a row"}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a picture of each kind of case that the result has, and return their paths."""
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


def _bars(records: Sequence[Mapping[str, Any]], key: str, scale: float, unit: str) -> Any:
    """Two bars a case: the measured quantity, with quartiles and the ratio, and the peak of memory."""
    fig = figure(8.2, 1.3 + 0.52 * len(records))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, (backend, (name, color, _)) in enumerate(BACKENDS.items()):
        at = [row + (place - 0.5) * 0.36 for row in range(len(records))]
        quartiles = [r[key][backend] for r in records]
        left.barh(at, [q["median"] * scale for q in quartiles], 0.34, color=color, label=name)
        for y, q in zip(at, quartiles, strict=True):
            left.plot([q["low"] * scale, q["high"] * scale], [y, y], color=INK, lw=1)
        right.barh(at, [r["memory"][backend]["peak"] / 1e6 for r in records], 0.34, color=color)
    beside: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    for row, r in enumerate(records):
        ends = [r[key][backend]["high"] * scale for backend in BACKENDS]
        left.annotate(f"{r['faster']['median']:.2f}x", (max(ends), row), **beside)
        most = max(r["memory"][backend]["peak"] for backend in BACKENDS) / 1e6
        right.annotate(f"{r['memory_ratio']['peak']:.2f}x", (most, row), **beside)
    left.set_yticks(range(len(records)), [label(r, records) for r in records])
    left.invert_yaxis()
    for ax, title in ((left, unit), (right, "peak memory in MB, imports excluded")):
        ax.set_xlabel(title)
        ax.grid(False, axis="y")
        ax.set_xlim(0, 1.24 * ax.dataLim.x1)  # room for the ratio
        ax.tick_params(axis="y", length=0)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return fig


def _growth(growth: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """A panel an axis: milliseconds of a step of both backends, with a band between the quartiles."""
    fig = figure(8.2, 2.9)
    axes = fig.subplots(1, len(growth), squeeze=False)[0]
    for ax, (axis, records) in zip(axes, growth.items(), strict=True):
        at = [r["case"][axis] for r in records]
        for backend, (name, color, marker) in BACKENDS.items():
            quartiles = [r["seconds"][backend] for r in records]
            ax.plot(at, [q["median"] * 1e3 for q in quartiles], marker=marker, color=color, label=name)
            low, high = ([q[end] * 1e3 for q in quartiles] for end in ("low", "high"))
            ax.fill_between(at, low, high, color=color, alpha=0.2, lw=0)
        if axis != "layers":
            ax.set_xscale("log", base=2)
        ax.set_xticks(at, [str(n) for n in at])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel(AXES[axis])
    axes[0].set_ylabel("ms a step")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return fig
