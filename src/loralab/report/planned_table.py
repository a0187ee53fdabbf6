"""The table of planned contrasts: what each found, and what the method costs there."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab.disk import size_text
from loralab.report import numbers as n
from loralab.report.findings import Findings, Result
from loralab.report.planned_charts import best_rate
from loralab.report.tables import Column, Table
from loralab.study.statistics import PlannedFamily, remarks
from loralab.study.statistics.contrasts import Contrast

MARKS = {
    "better": "good", "worse": "bad", "equal within the margin": "same", "no difference found": "unsure",
    "not tested": "unsure",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A contrast with the results of its method there: of one task, or of all whose mean it is."""

    family: PlannedFamily
    place: int
    results: Sequence[Result]

    @property
    def contrast(self) -> Contrast:
        return self.family.contrasts[self.place]

    @property
    def method(self) -> str:
        return self.family.places[self.place][0]

    @property
    def task(self) -> str:
        return self.family.places[self.place][1] or "mean of tasks"

    def mean(self, cost: str) -> float:
        """The mean of a cost over the tasks."""
        values = [getattr(r.cost, cost) for r in self.results]
        return float(np.mean(values)) if values else float("nan")

    @property
    def rates(self) -> str:
        """The rates that tuning chose, the lowest and the highest of several tasks."""
        found = sorted({rate for r in self.results if (rate := best_rate(r)) is not None})
        return n.NONE if not found else f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"

    @property
    def tuning_collapsed(self) -> int:
        return sum(r.cell.tuning_collapsed for r in self.results)


def contrasts(f: Findings) -> Table:
    """A row for each planned contrast."""
    rows = [
        Row(family, place, [r for r in f.results if r.label == method and r.place[1] == family.model
                            and task in (None, r.place[0])])
        for family in f.planned for place, (method, task) in enumerate(family.places)
    ]  # fmt: skip
    columns = [
        Column("method", lambda r: r.method),
        Column("on", lambda r: r.task),
        Column("model", lambda r: Path(r.family.model).name, short=len({r.family.model for r in rows}) > 1),
        Column("endpoint", lambda r: n.metric(r.family.endpoint)),
        Column("difference", lambda r: n.signed(r.contrast.difference), lambda r: r.contrast.difference,
               "mean over seeds, paired; above 0 the method is better"),
        Column("95 % interval", lambda r: n.interval(r.contrast.low, r.contrast.high), lambda r: r.contrast.low,
               "over seeds and, where predictions were kept, rows; not corrected"),
        Column("p corrected", lambda r: n.chance(r.contrast.p_holm), lambda r: r.contrast.p_holm,
               "of no difference, by Holm's method over the family"),
        Column("p equivalent", lambda r: n.chance(r.contrast.p_equivalent_holm), lambda r: r.contrast.p_equivalent_holm,
               "of a difference beyond the margin (TOST), corrected"),
        Column("margin", lambda r: f"{r.family.margins[r.place]:g}", lambda r: r.family.margins[r.place],
               "smaller differences do not matter"),
        Column("verdict", lambda r: r.contrast.verdict, mark=lambda r: MARKS[r.contrast.verdict]),
        Column("could find", lambda r: n.score(r.contrast.smallest), lambda r: r.contrast.smallest,
               "the smallest true difference that this contrast finds with 80 % power"),
        Column("best rate", lambda r: r.rates, help="that tuning chose, over the tasks"),
        Column("seeds", lambda r: str(r.family.seeds[r.place]), lambda r: r.family.seeds[r.place], short=False),
        Column("collapsed", lambda r: str(r.family.collapsed[r.place]), lambda r: r.family.collapsed[r.place],
               "runs of the method and the reference that predict the same for every row: counted, not averaged in"),
        Column("collapsed in tuning", lambda r: str(r.tuning_collapsed), lambda r: r.tuning_collapsed, short=False),
        Column("memory", lambda r: _size(r.mean("step_bytes")), lambda r: r.mean("step_bytes"),
               "of a step of one run, mean over the tasks"),
        Column("rows/s", lambda r: n.count(r.mean("examples_per_s")), lambda r: r.mean("examples_per_s"),
               "training examples per second, mean over the tasks"),
    ]  # fmt: skip
    compare = f.study.compare
    lines = [
        f"Each method against {compare['reference']} on the same seeds; Holm's correction over each family, at "
        f"{compare['alpha']:g}",
        "Equal within the margin: by two one-sided tests; no difference found: neither is shown",
        *remarks(f.planned, compare["alpha"]),
    ]
    return Table("planned", "Planned contrasts", columns, rows, _raw, lines)


def _size(value: float) -> str:
    return n.NONE if np.isnan(value) else size_text(value)


def _raw(r: Row) -> dict[str, Any]:
    where = {"method": r.method, "task": r.task, "model": r.family.model, "endpoint": r.family.endpoint}
    more = {
        "margin": r.family.margins[r.place], "error_of_seeds": r.family.errors_of_seeds[r.place],
        "seeds": r.family.seeds[r.place], "collapsed": r.family.collapsed[r.place],
        "collapsed_in_tuning": r.tuning_collapsed, "rates": r.rates, "step_bytes": r.mean("step_bytes"),
        "examples_per_s": r.mean("examples_per_s"),
    }  # fmt: skip
    return asdict(r.contrast) | where | more
