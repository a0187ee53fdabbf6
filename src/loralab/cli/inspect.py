"""`loralab inspect`: what an adapter folder holds, and what it learned."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab import analysis
from loralab.adapters import read
from loralab.analysis import TOP, Layer, Overlap, Spectrum, short
from loralab.cli import base
from loralab.cli.plan import show_layers
from loralab.cli.show import Json, as_json, folder_size, note, number, pairs, table
from loralab.coverage import summary
from loralab.disk import read_json, size_text
from loralab.errors import UserError
from loralab.files import AdapterFile
from loralab.objectives import saved
from loralab.rankmap import RankMap
from loralab.recipe import to_json
from loralab.serve.loading import plain

BLOCKS = "▁▂▃▄▅▆▇█"
PICTURES = (".png", ".svg", ".pdf")


def inspect(
    folder: Path,
    /,
    *,
    against: Path | None = None,
    model: str | None = None,
    top: int = TOP,
    plot: Path | None = None,
    memory: bool = False,
    name: str | None = None,
    json: Json = False,
) -> None:
    """What an adapter folder holds: recipe, layers, labels, the base it belongs to, sizes; and what it learned.

    For every layer the norm of its update, the share of all layers' squared norm, effective rank (exp of the entropy
    of the singular values, normalised) and spectrum; with a base also how much it amplifies what it adds to W.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    against: Path
        Another adapter of the same base: how alike the directions are that the two learned, as in section 7.2 of LoRA.
    model: str
        The base: a local folder, a hub name, or an alias. Some methods need it; for others it adds amplification.
    top: int
        Directions to compare, from the largest singular value on.
    plot: Path
        Picture to write: .png, .svg or .pdf.
    memory: bool
        Instead, of the folder of a finished run: what its memory was made of, layer by layer, and its peak.
    name: str
        Another name for the adapter than its own.
    """
    if memory:
        given = {"against": against, "model": model, "plot": plot, "name": name}
        base.check_idle({key: x is not None for key, x in given.items()} | {"top": top != TOP}, "with --memory")
        _show_memory(folder, json)
        return
    _check(top, plot)
    file = base.read(folder, name)
    data = facts(file, folder)
    other = None if against is None else _updates(against, model)
    found = _updates(folder, model) if other or plot else _updates_or_note(folder, model)
    spectra = analysis.spectra(found, top)
    overlaps = analysis.overlaps(found, other, top) if other else []
    if plot is not None:
        _draw(spectra, overlaps, plot)
    if json:
        data["update"] = {"top": top, "layers": {s.path: _without_path(asdict(s)) for s in spectra}}
        if other:
            data["overlap"] = {"against": str(against), "top": top, "layers": {o.path: _json(o) for o in overlaps}}
        as_json(data)
        return
    _show_facts(folder, file, data)
    if overlaps:
        show_overlaps(overlaps, f"{folder} against {against}")
    elif spectra:
        show_spectra(spectra, top)
    if plot is not None:
        print(f"picture: {plot}")


def facts(file: AdapterFile, folder: Path) -> dict[str, Any]:
    """What a folder holds, for --json; the base is called as others can get it, where a run wrote the folder."""
    known = saved.read(folder, file.base.get("task_type"))
    return {
        "name": file.name,
        "recipe": to_json(file.recipe),
        "layers": file.paths,
        "head": file.heads,
        "labels": file.labels,
        "objective": known.objective,
        "base": {**file.base, **({"name": known.base} if known.base else {})},
        "values": sum(t.numel() for t in file.tensors.values()),
        "unreached": file.counts.get("unreached", 0),  # values of the base that no target reaches
        "bytes": folder_size(folder),
    }


def _check(top: int, plot: Path | None) -> None:
    if top < 1:
        raise UserError(f"--top {top}: expected 1 or more")
    if plot is not None and plot.suffix not in PICTURES:
        raise UserError(f"--plot {plot}: expected a name that ends in {', '.join(PICTURES)}")


def _updates(folder: Path, model: str | None) -> dict[str, Layer]:
    return analysis.updates(folder, None if model is None else plain(model, read(folder), folder).model)


def _updates_or_note(folder: Path, model: str | None) -> dict[str, Layer]:
    """The updates, or none and a note where they need a base: the rest is still worth showing."""
    try:
        return _updates(folder, model)
    except UserError as error:
        if model is not None:
            raise
        note(error)
        return {}


def _draw(spectra: list[Spectrum], overlaps: list[Overlap], plot: Path) -> None:
    if not spectra:
        raise UserError(f"--plot {plot}: the adapter changes no weight of a linear layer, so there is nothing to draw")
    from loralab.report import adapter_charts

    adapter_charts.save(adapter_charts.overlaps(overlaps) if overlaps else adapter_charts.spectra(spectra), plot)


def _show_memory(folder: Path, json: bool) -> None:
    """Print the memory of a finished run; `loralab plan` estimates it without one."""
    place = next((at for at in (folder, folder.parent) if (at / "result.json").exists()), None)
    found = {} if place is None else read_json(place / "result.json").get("memory")
    if not isinstance(found, dict) or "layers" not in found:
        raise UserError(f"--memory: {folder} is no folder of a finished run with memory by layer; try loralab plan")
    if json:
        as_json(found)
        return
    show_layers(f"{place}: activations are those of the first batch", found["layers"])
    print(f"\npeak of the whole run {size_text(found['peak_bytes'])} above what was there when it began")


# ---- what is printed -------------------------------------------------------------------------------------------------


def show_spectra(spectra: list[Spectrum], top: int) -> None:
    columns = {
        "layer": [short(s.path) for s in spectra],
        "norm": [number(s.norm) for s in spectra],
        "share": [f"{s.share:.1%}" for s in spectra],
        "eff.": [f"{s.effective_rank:.2f}" for s in spectra],
        "spectrum": [spark(s.values[:top]) for s in spectra],
        "amplified": [_times(s.amplification) for s in spectra],
        "along": [_times(s.along) for s in spectra],
        "gain": [number(s.gain) for s in spectra],
    }
    known = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    table("\nthe update of every layer", tuple(known), list(zip(*known.values(), strict=True)))
    print("share: of the squared norm of all; spectrum: the largest singular values")
    print("eff.: effective rank, exp of the entropy of the singular values over their sum")
    if "amplified" in known:
        print(f"amplified: norm of the update's first {top} directions over that of W along them")
        print("along: that norm of W over the one along random directions")
    if "gain" in known:
        print("gain: how far the gain of any row is off 1; the other columns are without it")


def show_overlaps(overlaps: list[Overlap], title: str) -> None:
    rows = []
    for o in overlaps:
        k = min(o.reads.shape)
        ends = [m[i, i] for m in (o.reads, o.writes) for i in (0, k - 1)]
        rows.append((short(o.path), str(k), *(f"{float(value):.3f}" for value in ends), f"{k * max(o.chance):.3f}"))
    columns = ("layer", "k", "reads 1", "reads k", "writes 1", "writes k", "chance k")
    table(f"\n{title}: phi(i, i) of what the updates read and write", columns, rows)
    for side in ("reads", "writes"):
        phi = analysis.mean([getattr(o, side) for o in overlaps])
        cells = [(str(i), *(f"{float(value):.2f}" for value in row)) for i, row in enumerate(phi, 1)]
        head = ("i / j", *map(str, range(1, phi.shape[1] + 1)))
        table(f"\n{side}: phi(i, j), mean of {len(overlaps)} layers", head, cells)
    print("phi(i, j): how much of the first i directions lies within the first j of the other, 0 to 1")
    print("chance: the same of random directions. Adapters of one seed start with one A, so they read alike")


def spark(values: list[float]) -> str:
    """One character for each value; the largest is a full block."""
    most = max(values, default=0.0) or 1.0
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * value / most)] for value in values)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{number(value)}x"


def _without_path(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "path"}


def _json(o: Overlap) -> dict[str, Any]:
    return {"reads": o.reads.tolist(), "writes": o.writes.tolist(), "chance": list(o.chance)}


def _show_facts(folder: Path, file: AdapterFile, data: dict[str, Any]) -> None:
    shown = {key: ", ".join(value) if isinstance(value, list) else value for key, value in data.items()}
    shown["recipe"] = ", ".join(f"{key} {value}" for key, value in _changed_settings(data["recipe"]).items())
    shown["layers"] = summary(file.paths)
    shown["base"] = f"{data['base'].get('name')}, sha256 {str(file.base.get('sha256') or 'not stored')[:16]}"
    shown["unreached"] = _unreached(file)
    shown["values"], shown["bytes"] = f"{data['values']:,}", size_text(data["bytes"])
    pairs(str(folder), {key: str(value or "none") for key, value in shown.items()})


def _unreached(file: AdapterFile) -> str:
    """How much of the base is in weights of no linear layer: experts of three dimensions, say."""
    count, base = file.counts.get("unreached", 0), file.counts.get("base", 0)
    share = f", {count / base:.1%} of the base" if base > 0 else ""
    return f"{count:,} values of no linear layer, which no target reaches{share}" if count else ""


def _changed_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not off or none, those of the method first."""
    flat = {**(recipe["factors"] or {}), **recipe}
    del flat["factors"]
    if recipe["ranks"]:
        flat["ranks"] = str(RankMap.from_json(recipe["ranks"]))
    return {key: value for key, value in flat.items() if value not in (None, False, 0)}
