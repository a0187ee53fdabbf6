"""The dtype that `auto` is on the machine of a study: the same command on another machine must not train anew silently.

The dtype of products is part of a run's address. So where `auto` is bfloat16 on one machine and float32 on another, no
finished run of the first is found on the second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from loralab.errors import UserError
from loralab.run import Settings
from loralab.study.address import address
from loralab.study.definition import Definition
from loralab.study.record import read_study
from loralab.study.schedule import CellSettings, cells

NAMES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


def machine_dtype(definition: Definition) -> str | None:
    """Return what products of the runs that leave it to the machine are computed in; None if no run does."""
    left = replace(definition, dtype=None)
    settings = [_usual(left, cell) for cell in cells(left)]
    auto = [s for s in settings if s.dtype == "auto"]
    found = {definition.dtype or str(s.precision).removeprefix("torch.") for s in auto}
    return " and ".join(sorted(found)) or None  # of several devices there may be two


def check_dtype(definition: Definition, folder: Path) -> None:
    """Raise UserError if runs of the study in `folder` are finished, and `auto` was another dtype there."""
    stored = read_study(folder)
    planned = [entry for entry in stored.get("planned", ()) if entry["address"]]
    done = [entry for entry in planned if (definition.store / entry["address"] / "result.json").is_file()]
    if not done:
        return
    before, now = stored["dtype"] if "dtype" in stored else _of_addresses(definition, done), machine_dtype(definition)
    if before is None or now is None or before == now:
        return
    here = "this command would take" if definition.dtype else "this machine would take"
    raise UserError(
        f"{folder}: its {len(done)} finished runs computed in {before}, {here} {now} and train all anew: "
        f"--dtype {before} goes on with them, another --out begins anew"
    )


def _usual(definition: Definition, cell: CellSettings) -> Settings:
    return definition.settings(cell.task, cell.model, cell.method, definition.seeds[0], {})


def _of_addresses(definition: Definition, done: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what `auto` was in a study.json that does not say so: the dtype with which addresses are as they are."""
    by_key = {cell.key: cell for cell in cells(replace(definition, dtype=None))}
    for entry in done:
        cell = by_key.get((entry["task"], entry["model"], entry["method"]))
        if cell is None:
            continue
        found = cell.settings(entry["role"], entry["seed"], {**entry["tried"]})
        for dtype in NAMES if found.dtype == "auto" else ():
            if address(replace(found, dtype=dtype)) == entry["address"]:
                return dtype
    return None
