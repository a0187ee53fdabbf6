"""`loralab inspect`: what an adapter folder holds."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from loralab.cli.show import as_json, folder_size, pairs, size
from loralab.files import read
from loralab.recipe import to_json
from loralab.targets import summary


def inspect(folder: Path, /, *, json: Annotated[bool, Parameter(negative="", help="Print as JSON.")] = False) -> None:
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
    shown = {**data, "layers": summary(file.paths), "head": ", ".join(file.heads), "labels": ", ".join(file.labels)}
    shown["recipe"] = ", ".join(f"{key} {value}" for key, value in _flat(data["recipe"]).items() if value is not None)
    shown["base"] = f"{file.base.get('name')}, sha256 {str(file.base.get('sha256') or 'not stored')[:16]}"
    shown["values"], shown["bytes"] = f"{data['values']:,}", size(data["bytes"])
    pairs(str(folder), shown)


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**(recipe["factors"] or {}), **{key: value for key, value in recipe.items() if key != "factors"}}
