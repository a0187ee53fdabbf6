"""`loralab plan`: the memory of a training step, estimated without loading weights, and how to need less."""

from dataclasses import asdict, replace
from typing import Annotated, Any

from cyclopts import Parameter

from loralab.cli.show import Json, as_bytes, as_json, pairs, table
from loralab.disk import size_text
from loralab.errors import UserError
from loralab.run.estimate import Estimate, EstimateSettings, estimate, largest_batch
from loralab.run.fit import Rung, ladder
from loralab.run.memory import PURPOSES, Layers

CHANGES: dict[str, dict[str, Any]] = {  # what a user may change -> settings; what costs least quality comes first
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--store int8": {"store": "int8"},
    "--store nf4-dq": {"store": "nf4-dq"},
    "--method lora": {"method": "lora"},
    "--method lora-fa": {"method": "lora-fa"},
    "--targets attention-qv": {"targets": "attention-qv"},
    "--checkpointing": {"checkpointing": True},
}
WORTH = 0.99  # a change is listed if its peak is below this share


def plan(
    settings: Annotated[EstimateSettings, Parameter(name="*")] = EstimateSettings(),  # noqa: B008  (frozen)
    *,
    memory: str | None = None,
    json: Json = False,
) -> None:
    """Estimate the memory of a training step, layer by layer, without loading weights; list what would reduce it.

    docs/memory.md compares estimates with measurements.

    Parameters
    ----------
    memory: str
        Memory of the machine, as 24GB or 512MiB: says whether the step fits, the largest batch that does, and what
        `train --memory` would do.
    """
    room = as_bytes(memory)
    found = estimate(settings)
    most = None if room is None else largest_batch(found, room)
    changes = _changes(found)
    tried = [] if room is None else list(ladder(settings, room))
    if json:
        as_json(_data(found, room, most, changes, tried))
        return
    show_layers(
        f"{settings.model}, {settings.method}, {settings.batch_size} rows of {settings.max_length} tokens", found.layers
    )
    pairs("\npeak memory, imports excluded", _summary(found))
    rows = [(name, size_text(other.peak), f"{other.peak / found.peak - 1:+.0%}") for name, other in changes.items()]
    table("\nwhat would reduce it", ("change", "peak", ""), rows)
    if room is not None and len(tried) > 1:
        title = f"what `loralab train --memory {memory}` tries, the rows of an optimizer step staying the same"
        table(f"\n{title}", ("step", "peak", ""), [_rung(rung) for rung in tried])
    if room is not None and most is not None:
        print(f"\n{_verdict(found, room, most, changes)}")


def _rung(rung: Rung) -> tuple[str, str, str]:
    changes = [f"--{key}" if value is True else f"--{key} {value}" for key, value in rung.changes.items()]
    text = " ".join([f"--accumulate {rung.parts}", *changes])
    return f"{text}, {rung.rows} rows at a time", size_text(rung.estimate.peak), "fits" * rung.fits


def _summary(e: Estimate) -> dict[str, str]:
    return {
        "while loading": size_text(e.loading),
        "in a step": f"{size_text(e.training)} resident, {size_text(e.tensors)} of it tensors, temporaries included",
        "peak": size_text(e.peak),
        "products of a step": f"{e.products / 1e9:,.3g} billion operations",
    }


def _data(
    found: Estimate, room: int | None, most: int | None, changes: dict[str, Estimate], tried: list[Rung]
) -> dict[str, Any]:
    fits = None if room is None else found.peak <= room
    parts = {"ledger": found.ledger, "layers": found.layers, "memory": room, "fits": fits, "largest_batch": most}
    changed = {name: _numbers(other) for name, other in changes.items()}
    rungs = [{**rung.settings, "rows": rung.rows, "peak": rung.estimate.peak, "fits": rung.fits} for rung in tried]
    return {"settings": asdict(found.settings), **_numbers(found), **parts, "changes": changed, "ladder": rungs}


def _numbers(e: Estimate) -> dict[str, int]:
    return {"loading": e.loading, "tensors": e.tensors, "training": e.training, "peak": e.peak, "products": e.products}


def _changes(found: Estimate) -> dict[str, Estimate]:
    """Return the estimates of changes that need less. Half the batch with --accumulate 2 has the same gradient."""
    s, out = found.settings, {}
    smaller = {} if s.batch_size == 1 else {"--accumulate 2": {"batch_size": -(-s.batch_size // 2)}}
    shorter = {} if s.max_length < 2 else {f"--max-length {s.max_length // 2}": {"max_length": s.max_length // 2}}
    for name, change in {**smaller, **CHANGES, **shorter}.items():
        try:
            other = estimate(replace(s, **change))
        except UserError:  # method or model do not allow this change
            continue
        if other.peak < WORTH * found.peak:
            out[name] = other
    return out


def _verdict(found: Estimate, room: int, most: int, changes: dict[str, Estimate]) -> str:
    if found.peak <= room:
        return f"It fits: {size_text(found.peak)} of {size_text(room)}. The largest batch that does is about {most}."
    able = [name for name, other in changes.items() if other.peak <= room]
    able += (
        [f"--batch-size {most}, which in a run is --accumulate {-(-found.settings.batch_size // most)}"] if most else []
    )
    short = f"It does not fit: {size_text(found.peak)}, and there is {size_text(room)}."
    if able:
        return f"{short} Each of these alone does: {', or '.join(able)}."
    least = min((other.peak for other in changes.values()), default=found.peak)
    best = f"No single change does, nor a batch of 1; the best needs {size_text(least)}"
    return f"{short} {best}. Try several at once, or a smaller model."


# ---- the table of memory by layer, which `loralab inspect` prints too ------------------------------------------------


def show_layers(title: str, layers: Layers) -> None:
    """Print bytes by layer and purpose; neighbours with equal sizes share a row."""
    rows: list[tuple[list[str], dict[str, int]]] = []
    for name, sizes in layers.items():
        if rows and rows[-1][1] == sizes and name.rpartition(".")[2].isdecimal():
            rows[-1][0].append(name)
        else:
            rows.append(([name], sizes))
    shown = [(_joined(names), *(size_text(sizes[purpose]) for purpose in PURPOSES)) for names, sizes in rows]
    total = ("all layers", *(size_text(sum(layer[purpose] for layer in layers.values())) for purpose in PURPOSES))
    table(title, ("layer", "weights", *PURPOSES[1:]), [*shown, total])


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}, each"
