"""`loralab rerun`: repeat one run that is on record, and compare the two."""

from dataclasses import asdict
from pathlib import Path

from loralab.cli.show import Json, as_json, table
from loralab.errors import UserError
from loralab.run.bar import Bar
from loralab.study.rerun import Repeat
from loralab.study.rerun import rerun as repeat


def rerun(
    run: str,
    /,
    *,
    store: Path = Path("runs/store"),
    out: Path | None = None,
    data: Path | None = None,
    json: Json = False,
) -> None:
    """Train a run of a store, or of a folder, again with its settings and compare the two.

    Parameters
    ----------
    run: str
        The address of a run, as a study and its report name it, or a run folder.
    store: Path
        Folder of the runs in which the address is looked up.
    out: Path
        Run folder to write; runs/rerun/ADDRESS by default.
    data: Path
        Folder with the GLUE tasks, where it is not where it was.
    """
    folder = next((place for place in (store / run, Path(run)) if (place / "run.json").is_file()), None)
    if folder is None:
        raise UserError(f"{run} is no run: expected an address in --store {store}, or a run folder")
    out = out or Path("runs/rerun") / folder.name
    found = repeat(folder, out, data, Bar())
    if json:
        as_json({"run": str(folder), "out": str(out), "same": found.same, **asdict(found)})
        return
    rows = [
        (name, f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}" if a != b else "0") for name, (a, b) in found.numbers.items()
    ]
    table(f"{folder} and {out}", ("what", "then", "now", "difference"), rows)
    print(verdict(found))
    print(f"run folder: {out}")


def verdict(found: Repeat) -> str:
    """What the comparison says, and which difference is to be expected."""
    if found.same:
        return "the same to the bit" if found.logits is not None else "the same in every number that is on record"
    parts = [f"the largest difference is {found.largest:.1e}"]
    if found.logits is not None:
        parts.append(f"of an output {found.logits:.1e}")
    if found.other_answers is not None:
        parts.append(f"{found.other_answers} of {found.rows} rows are answered otherwise")
    around = "; ".join(found.around)
    if found.around:
        return f"{', '.join(parts)}: what differs around the runs ({around}) rounds otherwise, and training enlarges it"
    return (
        f"{', '.join(parts)}: machine and versions read the same, so another CPU of that name may be the cause; on one "
        "machine runs repeat to the bit"
    )
