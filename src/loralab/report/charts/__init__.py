"""The pictures of a report, one for each task and model: scores, learning curves, costs, ranks."""

from collections.abc import Iterator, Sequence

from loralab.report.charts import ranks
from loralab.report.charts.costs import COSTS, against, memory, speed
from loralab.report.charts.parts import Chart, Draw, Style
from loralab.report.charts.scores import by_epoch, intervals, measured
from loralab.report.look import MARKERS, SERIES, styled
from loralab.report.rows import Findings, Result, swept


def charts(f: Findings) -> Iterator[Chart]:
    """All of them, in the order of the page within each section."""
    styles = styles_of(f.methods)
    for (task, model), results in f.places().items():
        extra = swept(results)
        main = [r for r in results if r not in extra]
        curves = [by_epoch(name) for name in measured(main)]
        for draw in (intervals, *curves, *(against(key) for key in COSTS)):
            yield from _chart(f"{task}, {model}", draw, results if draw is intervals else main, styles)
    for model, results in f.models().items():
        extra = swept(results)
        for draw in (speed, memory):
            yield from _chart(model, draw, [r for r in results if r not in extra], styles)
    yield from ranks.charts(f)


def _chart(where: str, draw: Draw, results: Sequence[Result], styles: dict[str, Style]) -> Iterator[Chart]:
    with styled():
        made = draw(results, styles)
    if made is not None:
        section, what, caption, fig = made
        yield Chart(section, f"{section} {what} {where}", f"{where}: {what}", caption, fig)


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """Colours repeat after the last, with another marker."""
    k = len(SERIES)
    return {label: (SERIES[i % k], MARKERS[(i + i // k) % len(MARKERS)]) for i, label in enumerate(methods)}
