"""Reports: one page, pictures and tables of the results of a study or a folder of runs.

write(folder)   folder/report/index.html, plots/*.png, results.csv .md .tex, comparisons.*, runs.*
"""

import re
from collections import Counter
from pathlib import Path

from loralab.errors import UserError


def write(folder: Path | str, out: Path | str | None = None, published: Path | str | None = None) -> Path:
    """Write the report of a study, or of any folder with runs, and return the page. Files of that name are replaced.

    `published` is a CSV of published numbers, shown in a section of their own. Raises UserError for a folder without a
    finished run, for a file of published numbers that cannot be used, and where the report cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():  # before the slow imports
        raise UserError(f"{folder} is no folder: expected a study, or a folder with runs of `loralab train`")
    from loralab.disk import write_text
    from loralab.report import page, style, tables
    from loralab.report import published as other_work
    from loralab.report.charts import charts
    from loralab.report.findings import findings, read
    from loralab.report.planned_charts import planned_charts
    from loralab.report.planned_table import contrasts
    from loralab.report.rank_charts import rank_charts

    out = folder / "report" if out is None else Path(out)
    found = findings(read(folder))
    if not found.results:
        raise UserError(f"{folder}: no run of the study is finished, so there is nothing to report yet")
    made = tables.tables(found)
    if found.planned:
        made.insert(0, contrasts(found))
    if published is not None:
        names = list(dict.fromkeys(task for task, _ in found.places()))
        made.insert(-1, other_work.table(Path(published), names))  # before the runs
    pictures = [*planned_charts(found), *charts(found), *rank_charts(found)]
    text = page.render(found, made, pictures)
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        for picture, name in zip(pictures, slugs([p.name for p in pictures]), strict=True):
            style.save(picture.fig, out / "plots" / f"{name}.png")
        for table in made:
            for ending, writer in tables.WRITERS.items():
                write_text(out / f"{table.name}.{ending}", writer(table))
        write_text(out / "index.html", text)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return out / "index.html"


def slugs(names: list[str]) -> list[str]:
    """File names from text that comes from data: letters, digits and dashes, no two the same."""
    plain = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:100] for name in names]
    count = Counter(plain)
    return [f"{slug}-{i}" if count[slug] > 1 else slug for i, slug in enumerate(plain)]
