"""Reports: one page, pictures and tables of what a study or a folder of runs found.

write(folder)   folder/report/index.html, plots/*.png, results.csv .md .tex, comparisons.*, runs.*
"""

import re
from collections import Counter
from pathlib import Path

from loralab.errors import UserError


def write(folder: Path | str, out: Path | str | None = None, published: Path | str | None = None) -> Path:
    """Writes the report of a study, or of any folder with runs, and returns the page. Files of that name are replaced.

    `published` is a CSV of published numbers, shown apart from these.
    """
    from loralab.report import content, look, page, source
    from loralab.report import published as others
    from loralab.report.charts import charts
    from loralab.report.rows import findings
    from loralab.report.tables import WRITERS

    folder = Path(folder)
    out = folder / "report" if out is None else Path(out)
    found = findings(source.read(folder))
    if not found.results:
        raise UserError(f"{folder}: no run of the study is finished, so there is nothing to report yet")
    tables = content.tables(found)
    if published is not None:
        theirs = others.table(Path(published), list(dict.fromkeys(task for task, _ in found.places())))
        tables.insert(-1, theirs)  # before the runs
    pictures = list(charts(found))
    text = page.render(found, tables, pictures)
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        for picture, name in zip(pictures, slugs([p.name for p in pictures]), strict=True):
            look.save(picture.fig, out / "plots" / f"{name}.png")
        for table in tables:
            for ending, writer in WRITERS.items():
                (out / f"{table.name}.{ending}").write_text(writer(table), encoding="utf-8")
        (out / "index.html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return out / "index.html"


def slugs(names: list[str]) -> list[str]:
    """File names from words that come from data: letters, digits and dashes, each its own."""
    plain = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:100] for name in names]
    count = Counter(plain)
    return [f"{slug}-{i}" if count[slug] > 1 else slug for i, slug in enumerate(plain)]
