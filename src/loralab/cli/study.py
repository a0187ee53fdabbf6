"""`loralab study`: many runs that answer one question."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from loralab.cli.show import Json, as_json
from loralab.cli.study_tables import show, show_outline
from loralab.disk import write_json
from loralab.errors import UserError
from loralab.study.bar import StudyBar
from loralab.study.failures import message
from loralab.study.machine_dtype import check_dtype
from loralab.study.record import Study
from loralab.study.results import as_data, outline
from loralab.study.run_study import check_question, check_study_folder, run_study
from loralab.study.runners import runner
from loralab.study.schedule import schedule
from loralab.study.toml import read


def study(
    file: Path,
    /,
    *,
    model: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    data: Path | None = None,
    out: Path | None = None,
    store: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
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
    methods: tuple[str, ...]
        Of the file's methods only these, by their labels or the names of their methods.
    seeds: tuple[int, ...]
        Seeds in the place of the file's.
    data: Path | None
        Folder with the GLUE tasks, in the place of the file's.
    out: Path | None
        Study folder; runs/studies/NAME by default.
    store: Path | None
        Folder of the runs, which studies share; the file's, or runs/store.
    dtype: str | None
        Dtype of matrix products of the runs that leave it to the machine, as a study from another machine needs it.
    on: str
        together (runs of like models share passes; together:8 for at most 8), in-turn, processes:8 (that many
        processes on this machine, by default one a core), ray (on this machine) or ray:ADDRESS (a cluster that sees
        the same files).
    """
    flags = {"models": model, "tasks": tasks, "seeds": seeds, "data": data, "store": store, "dtype": dtype}
    chosen, definition = runner(on), read(file, **flags)
    definition = definition.only(methods) if methods else definition
    folder = out or Path("runs/studies") / definition.name
    if dry_run:
        check_question(definition, folder)
        check_dtype(definition, folder)
        content = outline(definition, schedule(definition))
        as_json(content) if json else show_outline(content)
        return
    check_study_folder(folder)
    finished = run_study(definition, folder, chosen, StudyBar(), retry)
    results = as_data(finished)
    write_json(folder / "results.json", results)
    if json:
        as_json(results)
    else:
        show(finished)
        print(f"study folder: {folder}")
    _complain(finished)


def _complain(study: Study) -> None:
    """Raise UserError for runs that failed, after everything else is printed."""
    if text := message(study):
        raise UserError(text)
