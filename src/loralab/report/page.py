"""The page: one HTML file with its style, its script and its pictures in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import loralab
from loralab.errors import UserError
from loralab.report import numbers as n
from loralab.report.charts.parts import Chart
from loralab.report.content import hardware
from loralab.report.look import svg
from loralab.report.rows import Findings
from loralab.report.tables import Table

SECTIONS = {  # section of a chart -> its title, and what a reader should know
    "scores": ("Scores and learning curves", ""),
    "costs": (
        "Score against cost",
        "Up is better, left is cheaper. Nothing beats what is on the front on both.",
    ),
    "bars": ("Speed and memory", "Compare only what ran on one machine: the table of runs says which."),
    "ranks": ("Rank", ""),
}


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    svg: Any  # Markup: made here, from escaped text


@dataclass(frozen=True)
class Part:
    id: str
    title: str
    about: str = ""
    table: Table | None = None
    charts: Sequence[Picture] = ()
    foreign: bool = False  # numbers of others


def render(f: Findings, tables: Sequence[Table], charts: Sequence[Chart]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UserError("the page needs Jinja2: pip install 'loralab[report]'") from error
    pictures: dict[str, list[Picture]] = {}
    for chart in charts:
        drawn = Markup(svg(chart.fig, chart.name))
        pictures.setdefault(chart.section, []).append(Picture(chart.title, chart.caption, drawn))
    drawn_parts = [Part(key, *SECTIONS[key], charts=pictures[key]) for key in SECTIONS if key in pictures]
    first, *rest = [Part(t.name, t.title, t.about, t, foreign=t.foreign) for t in tables]
    parts = [first, *drawn_parts, *rest]
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_own("page.html"))
    css, js = Markup(_own("page.css")), Markup(_own("page.js"))
    return template.render(
        title=f.study.name, about=f.study.about, tiles=tiles(f), warnings=warnings(f), parts=parts, css=css, js=js,
        version=loralab.__version__,
    )  # fmt: skip


def _own(name: str) -> str:
    return (files("loralab.report") / name).read_text(encoding="utf-8")


def tiles(f: Findings) -> list[tuple[str, str]]:
    runs = [run for r in f.results for run in r.cell.runs]
    places = list(f.places())
    pending = sum(r.summary.pending for r in f.results) + sum(cell.pending for cell in f.waiting)
    failed = sum(r.summary.failed for r in f.results) + sum(len(cell.failed) for cell in f.waiting)
    seeds = tuple(sorted({run.seed for run in runs}))
    told = [
        ("tasks", ", ".join(dict.fromkeys(task for task, _ in places))),
        ("models", ", ".join(dict.fromkeys(model for _, model in places))),
        ("methods", str(len(f.methods))),
        ("seeds", n.spans(seeds)),
        ("finished runs", str(len(runs))),
        ("hardware", "; ".join(dict.fromkeys(hardware(run.facts) for run in runs))),
    ]
    if pending or failed:
        counts = {"pending": pending, "failed": failed}
        told.insert(5, ("not finished", ", ".join(f"{count} {what}" for what, count in counts.items() if count)))
    return told


def warnings(f: Findings) -> list[str]:
    """What must be read before any number."""
    told = list(f.study.notes)
    if optimistic := [r for r in f.results if r.optimistic]:
        told.append(f"{len(optimistic)} of {len(f.results)} results are optimistic: the reported split chose the epoch")
    if single := [r for r in f.results if len(r.seeds) == 1]:
        told.append(f"{len(single)} of {len(f.results)} results have one seed, which says nothing of differences")
    if len({hardware(run.facts) for r in f.results for run in r.cell.runs}) > 1:
        told.append("Runs come from different machines or numbers of threads: their times do not compare")
    told += [f"{', '.join(cell.key)}: {why}" for r in f.results for cell in [r.cell] for why in cell.failed]
    told += [f"{', '.join(cell.key)}: no finished run" for cell in f.waiting]
    return told
