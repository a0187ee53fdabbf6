"""`loralab study`: many runs that answer one question."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loralab.cli.show import Json, as_json
from loralab.cli.study_tables import show, show_outline
from loralab.errors import UserError
from loralab.run.folder import write_json
from loralab.study.bar import StudyBar
from loralab.study.conduct import check_folder, conduct
from loralab.study.parse import read
from loralab.study.plan import plan
from loralab.study.record import Study
from loralab.study.results import as_data, outline
from loralab.study.runners import runner


def study(
    file: Path,
    /,
    *,
    model: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    data: Path | None = None,
    out: Path | None = None,
    store: Path | None = None,
    on: str = "together",
    dry_run: Annotated[
        bool, Parameter(help="Print the planned runs, how many are done, and a guess of what is left.")
    ] = False,
    retry: Annotated[bool, Parameter(help="Run again what failed before.")] = False,
    json: Json = False,
) -> None:
    """A grid of runs from a TOML file: tuned alike, run on the same seeds, compared with corrected tests.

    Stop it at any moment: the same command goes on where it was.

    Parameters
    ----------
    file: Path
        The study; docs/studies.md tells its keys, studies/ has examples.
    model: tuple[str, ...]
        Models in the place of the file's.
    tasks: tuple[str, ...]
        Tasks in the place of the file's; one that the file has keeps its settings.
    seeds: tuple[int, ...]
        Seeds in the place of the file's.
    data: Path | None
        Folder with the GLUE tasks, in the place of the file's.
    out: Path | None
        Study folder; runs/studies/NAME by default.
    store: Path | None
        Folder of the runs, which studies share; the file's, or runs/store.
    on: str
        together (runs of like models share passes; together:8 for at most 8), in-turn, ray (on this machine) or
        ray:ADDRESS (a cluster that sees the same files).
    """
    given = {"models": model, "tasks": tasks, "seeds": seeds, "data": data, "store": store}
    chosen, definition = runner(on), read(file, **given)
    if dry_run:
        told = outline(definition, plan(definition))
        as_json(told) if json else show_outline(told)
        return
    folder = out or Path("runs/studies") / definition.name
    check_folder(folder)
    done = conduct(definition, folder, chosen, StudyBar(), retry)
    results = as_data(done)
    write_json(folder / "results.json", results)
    as_json(results) if json else _shown(done, folder)
    _complain(done)


def _shown(done: Study, folder: Path) -> None:
    show(done)
    print(f"study folder: {folder}")


def _complain(done: Study) -> None:
    """A run that failed is an error, after all others are told."""
    told = [f"{' '.join(key)}: {why}" for key, cell in done.cells().items() for why in cell.failed]
    stuck = [" ".join(key) for key, cell in done.cells().items() if cell.pending]
    if told or stuck:
        never = [f"no tuning run worked for {', '.join(stuck)}"] if stuck else []
        raise UserError("; ".join([*told, *never]) + "; --retry runs again what failed")
