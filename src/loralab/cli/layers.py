"""The table of memory by layer, of a run or of a plan."""

from loralab.cli.show import table
from loralab.disk import size_text
from loralab.run.memory import PURPOSES, Layers


def show_layers(title: str, layers: Layers) -> None:
    """Bytes by layer and purpose; a run of layers that are alike is one row."""
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
