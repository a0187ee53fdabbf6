"""`loralab plan`: what a training step needs in memory, without loading weights, and what would make it need less."""

import re
from dataclasses import asdict, replace
from typing import Annotated, Any

from cyclopts import Parameter

from loralab.cli.layers import show_layers
from loralab.cli.show import Json, as_json, pairs, size, table
from loralab.errors import UserError
from loralab.train.planner import Plan, Setup, largest_batch
from loralab.train.planner import plan as planned

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
CHANGES: dict[str, dict[str, Any]] = {  # what a user may change -> how the setup does; the cheapest for quality first
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--store int8": {"store": "int8"},
    "--store nf4-dq": {"store": "nf4-dq"},
    "--method lora-fa": {"method": "lora-fa"},
    "--targets attention-qv": {"targets": "attention-qv"},
    "checkpointing, in a Trainer": {"checkpointing": True},
}


def plan(
    settings: Annotated[Setup, Parameter(name="*")] = Setup(),  # noqa: B008  (frozen)
    *,
    memory: str | None = None,
    json: Json = False,
) -> None:
    """What a training step needs in memory, layer by layer, without loading weights; and what would make it need less.

    Parameters
    ----------
    memory: str
        What there is, as 24GB or 16GiB: tells whether the step fits, and the largest batch that does.
    """
    room = None if memory is None else _bytes(memory)
    found = planned(settings)
    most = None if room is None else largest_batch(settings, room)
    changes = _changes(found)
    if json:
        fits = None if room is None else found.peak <= room
        data = {"setup": asdict(settings), **_numbers(found), "ledger": found.ledger, "layers": found.layers}
        changed = {name: _numbers(other) for name, other in changes.items()}
        as_json({**data, "memory": room, "fits": fits, "largest_batch": most, "changes": changed})
        return
    show_layers(f"{settings.model}, {settings.method}, {settings.batch} rows of {settings.length} tokens", found.layers)
    pairs("\nmost at once, beside what the imports take", _told(found))
    rows = [(name, size(other.peak), f"{other.peak / found.peak - 1:+.0%}") for name, other in changes.items()]
    table("\nwhat would change it", ("change", "peak", ""), rows)
    if room is not None and most is not None:
        print(f"\n{_verdict(found, room, most, changes)}")


def _told(p: Plan) -> dict[str, str]:
    return {
        "while loading": size(p.loading),
        "tensors in a step": f"{size(p.tensors)}, temporaries among them",
        "resident in a step": f"{size(p.training)}, with the holes that malloc leaves on its heap",
    }


def _numbers(p: Plan) -> dict[str, int]:
    return {"loading": p.loading, "tensors": p.tensors, "training": p.training, "peak": p.peak}


def _changes(found: Plan) -> dict[str, Plan]:
    """Setups that need less, where they make sense; half the batch with --accumulate 2 has the same gradient."""
    setup, out = found.setup, {}
    half = {} if setup.batch == 1 else {"--accumulate 2": {"batch": setup.batch // 2}}
    for name, change in {**half, **CHANGES}.items():
        try:
            other = planned(replace(setup, **change))
        except UserError:  # of a method or model that cannot have it
            continue
        if other.peak < 0.99 * found.peak:
            out[name] = other
    return out


def _verdict(found: Plan, room: int, most: int, changes: dict[str, Plan]) -> str:
    if found.peak <= room:
        return f"fits in {size(room)}: yes; the largest batch that does is about {most}"
    able = [name for name, other in changes.items() if other.peak <= room]
    batch = f"--batch {most}" if most else "no batch does, not even 1"
    return f"fits in {size(room)}: no; what fits: {', '.join([batch, *able])}"


def _bytes(text: str) -> int:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)", text.strip().lower())
    if parts is None:
        raise UserError(f"--memory {text}: expected a number and a unit, as 24GB or 16GiB")
    return int(float(parts[1]) * UNITS[parts[2]])
