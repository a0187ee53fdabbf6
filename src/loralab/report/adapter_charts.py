"""Pictures of what adapters learned: spectra and shares of their layers, heat maps of how two adapters overlap."""

from collections.abc import Sequence
from typing import Any

from loralab import analysis
from loralab.analysis import Overlap, Spectrum, short
from loralab.coverage import kind
from loralab.report.style import INK, SERIES, figure, line_name, plain_log, save, styled

__all__ = ["overlaps", "save", "spectra"]


def spectra(found: Sequence[Spectrum]) -> Any:
    """Singular values of every layer (left) and its share of the whole update (right), coloured by kind of layer."""
    kinds = list(dict.fromkeys(kind(s.path) for s in found))
    names = [s.path for s in found]
    with styled():
        fig = figure(10, max(4.0, 1.2 + 0.16 * len(found)))
        values, shares = fig.subplots(1, 2, width_ratios=(1.1, 1))
        for i, which in enumerate(kinds):
            color = SERIES[i % len(SERIES)]
            for s in (s for s in found if kind(s.path) == which and s.values):
                values.plot(range(1, len(s.values) + 1), s.values, color=color, alpha=0.75, lw=1.1)
            values.plot([], [], color=color, label=line_name(which))
            rows = [row for row, s in enumerate(found) if kind(s.path) == which]
            shares.barh(rows, [found[row].share * 100 for row in rows], color=color, height=0.75)
        values.set(title="spectrum of every layer's update", xlabel="direction", ylabel="singular value")
        if max(len(s.values) for s in found) > 32:
            values.set_xscale("log")
            plain_log(values.xaxis)
        values.set_ylim(bottom=0)
        values.legend(title="layers", loc="upper right")
        shares.set(title="share of the squared norm", xlabel="%")
        shares.set_yticks(range(len(names)), [short(name) for name in names], fontsize=7)
        shares.invert_yaxis()
        shares.margins(y=0.01)
        shares.grid(axis="y", visible=False)
    return fig


def overlaps(found: Sequence[Overlap]) -> Any:
    """phi(i, j) of what updates read and of what they write: a mean over depth for every kind of layer."""
    kinds: dict[str, list[Overlap]] = {}
    for o in found:
        kinds.setdefault(kind(o.path), []).append(o)
    groups = {"all layers": list(found)} if len(kinds) > 1 else {}
    groups |= kinds
    across = 2 if len(groups) > 1 else 1  # kinds side by side
    with styled():
        fig = figure(4.9 * across + 0.6, 0.4 + 2.6 * -(-len(groups) // across))
        axes = fig.subplots(-(-len(groups) // across), 2 * across, squeeze=False).flatten().tolist()
        for name, group in groups.items():
            for side, far in (("reads", 0), ("writes", 1)):
                phi = analysis.mean([getattr(o, side) for o in group]).numpy()
                chance = max(phi.shape) * sum(o.chance[far] for o in group) / len(group)
                ax = axes.pop(0)
                drawn = heat(ax, phi)
                ax.set(xlabel="j", ylabel="i")
                ax.set_title(f"{name} ({len(group)})\n{side}, chance up to {chance:.2f}", fontsize=8)
        for ax in axes:
            ax.set_axis_off()
        fig.colorbar(drawn, ax=fig.axes, aspect=50, label="phi(i, j)")
    return fig


def heat(ax: Any, matrix: Any) -> Any:
    """A heat map of values from 0 to 1, with the values written in where there is room."""
    drawn = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=1, origin="upper")
    ax.grid(visible=False)
    rows, columns = matrix.shape
    ax.set_xticks(range(columns), range(1, columns + 1))
    ax.set_yticks(range(rows), range(1, rows + 1))
    for i in range(rows if matrix.size <= 100 else 0):
        for j in range(columns):
            color = INK if matrix[i, j] > 0.6 else "white"
            ax.text(j, i, f"{matrix[i, j]:.2f}".lstrip("0"), ha="center", va="center", fontsize=5.5, color=color)
    return drawn
