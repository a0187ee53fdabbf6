"""The style of every picture: one palette for paper and screen, light and dark.

A picture is drawn once, in the light colours. In its SVG they become variables of the page, so it follows the theme.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab.errors import UserError

INK, MUTED, GRID, PAPER = "#1c2530", "#5d6975", "#d9dee4", "#ffffff"
SERIES = (
    "#2f6fde",
    "#d9601a",
    "#1f9d6b",
    "#a04fc0",
    "#c4366f",
    "#8a7000",
    "#0090a8",
    "#7a5c46",
)  # colours that most can tell apart
MARKERS = "osD^vPX*"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper"} | {
    color: f"--s{i}" for i, color in enumerate(SERIES)
}
STYLE: Any = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "font.size": 9,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "legend.fontsize": 8, "lines.linewidth": 1.6, "lines.markersize": 5, "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",  # text stays text: it is found, read aloud and set in the page's own letters
}  # fmt: skip


@contextmanager
def styled() -> Iterator[None]:
    """Run a block with matplotlib in this style. Raises UserError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'loralab[report]'") from error
    with matplotlib.rc_context(STYLE):
        yield


def figure(width: float = 4.1, height: float = 3.2) -> Any:
    """A figure of that size in inches; by default it fills a card of the page, and the width of a telephone."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def cut(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def line_name(text: str) -> str:
    """The name of a line in a legend; a blank goes before _, as matplotlib leaves names that begin with one out."""
    return cut(" " * text.startswith("_") + text, 28)


def plain_log(axis: Any) -> None:
    """Numbers at the ticks of a logarithmic axis as they are: matplotlib's own are formulas."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(fig: Any, path: Path) -> None:
    """Write a picture on white, for papers and slides. Raises UserError if the file cannot be written."""
    with styled():
        try:
            fig.savefig(path, dpi=160, facecolor=PAPER)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def svg(fig: Any, salt: str) -> str:
    """The picture as an SVG element; `salt` keeps its ids apart from those of other pictures of the page."""
    import matplotlib

    text = io.StringIO()
    with styled(), matplotlib.rc_context({"svg.hashsalt": salt}):
        fig.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' id="[a-z0-9A-Z.]+_\d+"', "", drawn)  # figure_1, axes_1: the same in every picture
    drawn = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', drawn, count=1
    )
    for color, name in VARIABLES.items():
        drawn = drawn.replace(color, f"var({name})")
    return drawn.replace("'DejaVu Sans'", "inherit").replace("font: 9px inherit", "font-size: 9px")
