"""`loralab report`: the page, pictures and tables of a study or a folder of runs."""

from pathlib import Path

from loralab.cli.show import Json, as_json


def report(folder: Path, /, *, out: Path | None = None, published: Path | None = None, json: Json = False) -> None:
    """Write one self-contained page, PNG pictures, and CSV, Markdown and LaTeX tables.

    Parameters
    ----------
    folder: Path
        A study, or any folder in which runs of `loralab train` lie.
    out: Path
        Folder to write; FOLDER/report by default. Files of an earlier report there are replaced.
    published: Path
        CSV of published numbers, shown apart with their protocols (docs/report.md has its columns).
    """
    from loralab.report import write

    page = write(folder, out, published)
    if json:
        as_json(
            {
                "page": str(page),
                "files": sorted(str(file.relative_to(page.parent)) for file in page.parent.rglob("*.*")),
            }
        )
        return
    print(f"report: {page}")
