"""`loralab combine`: a weighted sum of adapters, or one of them scaled or at another rank."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from loralab import algebra, files
from loralab.cli import base
from loralab.cli.show import Json, as_json
from loralab.disk import check_output_folder


def combine(
    *folders: Path,
    out: Path,
    weights: tuple[float, ...] = (),
    how: Literal["exact", "magnitude", "dare", "ties"] = "exact",
    rank: int | None = None,
    density: float = 1.0,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Combine adapters of one base into one, and print what was lost; one adapter alone is scaled or resized.

    Parameters
    ----------
    folders: Path
        Adapter folders of loralab or PEFT.
    out: Path
        Folder to write, new or empty.
    weights: float
        A number for each adapter, negative to subtract it; by default equal ones that add up to 1.
    how: str
        exact: the sum, at the sum of the ranks. magnitude, ties: of the largest values; dare: of values drawn.
    rank: int
        Cut the result to its best one of this rank.
    density: float
        The share of values that magnitude, ties and dare keep.
    seed: int
        Of what dare draws.
    """
    check_output_folder(out)
    read = [replace(base.read(folder), name=str(folder)) for folder in folders]
    given = weights or (1 / max(len(read), 1),) * len(read)
    made = algebra.combine(read, given, how, rank, density, seed, name=files.adapter_name(out.name))
    files.write(made.file, out)
    linear = {path: cut.linear for path, cut in made.layers.items() if cut.linear is not None}
    if json:
        layers = {path: cut._asdict() for path, cut in made.layers.items()}
        as_json({"out": str(out), "weights": given, "how": how, "error": made.error, "layers": layers})
        return
    ranks = [cut.rank for cut in made.layers.values()]
    span = str(min(ranks)) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    print(f"combined into {out}: {len(ranks)} layers of rank {span}")
    worst = max(made.layers, key=lambda path: made.layers[path].error)
    lost = f"{made.error:.2g} of the update, at most {made.layers[worst].error:.2g} ({worst})"
    print("nothing is lost" if rank is None else f"lost by the cut: {lost}")
    if linear:
        print(f"PEFT's linear, which adds A and B by themselves, would be off by up to {max(linear.values()):.2g}")
