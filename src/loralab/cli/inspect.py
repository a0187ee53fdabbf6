"""`loralab inspect`: what an adapter folder holds."""

from pathlib import Path
from typing import Any

from loralab.cli.show import Json, as_json, folder_size, pairs, size
from loralab.files import read
from loralab.ranks import RankMap
from loralab.recipe import to_json
from loralab.targets import summary


def inspect(folder: Path, /, *, json: Json = False) -> None:
    """What an adapter folder holds: recipe, layers, labels, the base it belongs to, sizes.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    """
    file = read(folder)
    data: dict[str, Any] = {
        "name": file.name,
        "recipe": to_json(file.recipe),
        "layers": file.paths,
        "head": file.heads,
        "labels": file.labels,
        "base": file.base,
        "values": sum(t.numel() for t in file.tensors.values()),
        "bytes": folder_size(folder),
    }
    if json:
        as_json(data)
        return
    shown = {key: ", ".join(value) if isinstance(value, list) else value for key, value in data.items()}
    shown["recipe"] = ", ".join(f"{key} {value}" for key, value in _told(data["recipe"]).items())
    shown["layers"] = summary(file.paths)
    shown["base"] = f"{file.base.get('name')}, sha256 {str(file.base.get('sha256') or 'not stored')[:16]}"
    shown["values"], shown["bytes"] = f"{data['values']:,}", size(data["bytes"])
    pairs(str(folder), {key: value or "none" for key, value in shown.items()})


def _told(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that are on, those of the factors first."""
    flat = {**(recipe["factors"] or {}), **recipe}
    del flat["factors"]
    if recipe["ranks"]:
        flat["ranks"] = str(RankMap.from_json(recipe["ranks"]))
    return {key: value for key, value in flat.items() if value not in (None, False, 0)}
