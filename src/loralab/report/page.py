"""The page: one HTML file that contains its style, script and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import loralab
from loralab.errors import UserError
from loralab.report import numbers as n
from loralab.report.charts import Chart
from loralab.report.findings import Findings
from loralab.report.style import svg
from loralab.report.tables import Table, hardware
from loralab.study.record import collapses

LEADING = "contrasts"  # the section of charts that comes before any table
SECTIONS = {  # section of a chart -> its title, and a hint to readers
    LEADING: ("Differences to the reference", ""),
    "rates": ("Learning rates that tuning tried", ""),
    "scores": ("Scores and learning curves", ""),
    "costs": (
        "Score against cost",
        "Up is better unless the axis says that lower is, left is cheaper. A method is on the Pareto front if no other "
        "beats it on one of the two and is as good on the other.",
    ),
    "bars": ("Speed and memory", "Compare only runs of one machine; the table of runs names it."),
    "ranks": ("Rank", ""),
}


@dataclass(frozen=True)
class Picture:
    """A chart as the template takes it."""

    title: str
    caption: str
    svg: Any  # Markup: made here, from escaped text


@dataclass(frozen=True)
class Section:
    """A section of the page: a table or charts."""

    id: str
    title: str
    about: str = ""
    table: Table | None = None
    charts: Sequence[Picture] = ()
    foreign: bool = False  # numbers of other people's work


def render(f: Findings, tables: Sequence[Table], charts: Sequence[Chart]) -> str:
    """The page as HTML. Raises UserError if Jinja2 is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UserError("the page needs Jinja2: pip install 'loralab[report]'") from error
    pictures: dict[str, list[Picture]] = {}
    for chart in charts:
        drawn = Markup(svg(chart.fig, chart.name))
        pictures.setdefault(chart.section, []).append(Picture(chart.title, chart.caption, drawn))
    with_charts = [Section(key, *SECTIONS[key], charts=pictures[key]) for key in SECTIONS if key in pictures]
    first, *rest = [Section(t.name, t.title, t.about, t, foreign=t.foreign) for t in tables]
    leading = [section for section in with_charts if section.id == LEADING]  # the answer before its numbers
    sections = [*leading, first, *(section for section in with_charts if section not in leading), *rest]
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_own("page.html"))
    css, js = Markup(_own("page.css")), Markup(_own("page.js"))
    return template.render(
        title=f.study.name, about=f.study.about, tiles=tiles(f), warnings=warnings(f), sections=sections,
        css=css, js=js, version=loralab.__version__,
    )  # fmt: skip


def _own(name: str) -> str:
    return (files("loralab.report") / name).read_text(encoding="utf-8")


def tiles(f: Findings) -> list[tuple[str, str]]:
    """(name, value) of the boxes at the top."""
    runs = [run for r in f.results for run in r.cell.runs]
    places = list(f.places())
    pending = sum(r.summary.pending for r in f.results) + sum(cell.pending for cell in f.waiting)
    failed = sum(r.summary.failed for r in f.results) + sum(len(cell.failed) for cell in f.waiting)
    seeds = tuple(sorted({run.seed for run in runs}))
    boxes = [
        ("tasks", ", ".join(dict.fromkeys(task for task, _ in places))),
        ("models", ", ".join(dict.fromkeys(model for _, model in places))),
        ("methods", str(len(f.methods))),
        ("seeds", n.seeds(seeds)),
        ("finished runs", str(len(runs))),
        ("hardware", "; ".join(dict.fromkeys(hardware(run.facts) for run in runs))),
    ]
    if pending or failed:
        counts = {"pending": pending, "failed": failed}
        boxes.insert(5, ("not finished", ", ".join(f"{count} {what}" for what, count in counts.items() if count)))
    return boxes


def unlearnt(f: Findings) -> list[str]:
    """Runs that give every row the same answer: their scores say nothing of their method."""
    lines = []
    for r in f.results:
        if constant := [run.seed for run in r.cell.runs if collapses(run)]:
            where = ", ".join(r.cell.key)
            count = f"{len(constant)} of {len(r.seeds)} runs" if len(r.seeds) > 1 else "the run"
            lines.append(f"{where}: {count} did not learn, one answer for every row ({n.seeds(constant)})")
    return lines


def lost(f: Findings) -> list[str]:
    """Classes, types or labels that runs found in no row of the reported split, where they told others apart."""
    lines = []
    for r in f.results:
        names: dict[str, list[int]] = {}
        for run in r.cell.runs:
            for name in [] if run.result.get("collapsed") else run.result.get("learned", {}).get("lost", []):
                names.setdefault(name, []).append(run.seed)
        lines += [f"{', '.join(r.cell.key)}: {name!r} is lost, it is found in no row ({n.seeds(seeds)})"
                  for name, seeds in names.items()]  # fmt: skip
    return lines


def warnings(f: Findings) -> list[str]:
    """What must be read before any number."""
    lines = [*unlearnt(f), *lost(f), *f.study.notes]
    if optimistic := [r for r in f.results if r.optimistic]:
        which = f"{len(optimistic)} of {len(f.results)} results are optimistic"
        lines.append(f"{which}: their epoch was chosen on the reported split")
    if single := [r for r in f.results if len(r.seeds) == 1]:
        which = f"{len(single)} of {len(f.results)} results have" if len(f.results) > 1 else "the only result has"
        lines.append(f"{which} one seed, too few to compare methods")
    if len({hardware(run.facts) for r in f.results for run in r.cell.runs}) > 1:
        lines.append("Runs come from different machines or numbers of threads, so their times cannot be compared")
    lines += [f"{', '.join(cell.key)}: {why}" for r in f.results for cell in [r.cell] for why in cell.failed]
    lines += [f"{', '.join(cell.key)}: no finished run" for cell in f.waiting]
    return lines
