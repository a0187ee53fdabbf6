"""Try a few learning rates on the user's own data in shared passes, and take the run that held-out rows choose.

OUT/lr-RATE/    a run folder for each rate; the best one is the result, trained on the rows that the others had too
OUT/tune.json   rate, held-out score and folder of each, and which won
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.data.metrics import upward
from loralab.disk import check_output_folder, write_json
from loralab.errors import UserError
from loralab.run.bar import Reporter
from loralab.run.loop import train_together
from loralab.run.records import collapsed
from loralab.run.settings import Settings
from loralab.run.sharing import grouped

TIMES = (0.3, 1.0, 3.0, 10.0)  # the method's own rate times these, where no rates are given
TABLE = "tune.json"


@dataclass(frozen=True)
class Tried:
    """A rate and what its run came to."""

    lr: float
    folder: Path
    result: dict[str, Any] | None  # None: the run failed
    held_out: float | None  # score of the selected epoch on the held-out rows
    why: str | None = None  # it failed, or is out


def tune(settings: Settings, rates: Sequence[float], reporter: Reporter | None = None) -> tuple[list[Tried], Tried]:
    """Run every rate; return all that were tried and the best, of equal ones the first.

    A rate that fails, or predicts the same for every row, is out. Raises UserError for settings without held-out rows,
    for rates that are no rates, and where every rate is out.
    """
    if settings.selection != "held-out":
        raise UserError(f"--tune with --selection {settings.selection}: held-out rows choose, leave it out")
    own = settings.recipe().lr
    chosen = list(rates) or [float(f"{own * times:.6g}") for times in TIMES]
    names = [f"lr-{lr:g}" for lr in chosen]  # rates that differ in the seventh digit are no different ones
    if len(set(names)) < len(names) or len(names) < 2 or not all(0 < x < math.inf for x in chosen):
        raise UserError(f"--tune {' '.join(f'{x:g}' for x in chosen)}: expected two or more different rates above 0")
    if rates and settings.lr is not None:
        raise UserError(f"--lr {settings.lr:g} with the rates of --tune: leave one out, or give --tune alone")
    runs = [replace(settings, lr=lr, out=settings.folder / name) for lr, name in zip(chosen, names, strict=True)]
    belongs = {TABLE, *(run.folder.name for run in runs)}
    check_output_folder(settings.folder, lambda f: settings.resume and {x.name for x in f.iterdir()} <= belongs)
    outcomes: dict[Path, dict[str, Any] | UserError] = {}
    for group in grouped(runs):
        outcomes |= zip((s.folder for s in group.runs), train_together(group.runs, reporter), strict=True)
    tried = [_tried(run, outcomes[run.folder]) for run in runs]
    left = [x for x in tried if x.why is None and x.held_out is not None]
    if not left:
        reasons = "; ".join(f"{x.lr:g} {x.why}" for x in tried)
        raise UserError(f"--tune: no rate trained the task ({reasons}): try others, more --epochs or other --targets")
    best = max(left, key=lambda x: upward(metric_of(x), float(x.held_out or 0)))  # of equal ones the first
    rows = [{"lr": x.lr, "folder": x.folder.name, "held_out": x.held_out, "out": x.why} for x in tried]
    write_json(settings.folder / TABLE, {"metric": metric_of(best), "best": best.folder.name, "rates": rows})
    return tried, best


def metric_of(tried: Tried) -> str:
    """The metric that chose."""
    assert tried.result is not None
    return str(tried.result["metric"]["name"])


def _tried(run: Settings, outcome: dict[str, Any] | UserError) -> Tried:
    if isinstance(outcome, UserError):
        return Tried(float(run.lr or 0), run.folder, None, None, str(outcome))
    why = "predicts the same for every row" if collapsed(outcome, held_out=True) else None
    return Tried(float(run.lr or 0), run.folder, outcome, outcome["metric"]["held_out"], why)
