"""`loralab report`: the page, pictures and tables of a study or a folder of runs."""

from pathlib import Path

from loralab.cli.show import Json, as_json


def report(folder: Path, /, *, out: Path | None = None, published: Path | None = None, json: Json = False) -> None:
    """Write a self-contained page, its pictures as PNG, and its tables as CSV, Markdown and LaTeX.

    Parameters
    ----------
    folder: Path
        A study, or any folder with runs of `loralab train` in it.
    out: Path
        Folder to write; FOLDER/report by default. Files of an earlier report there are replaced.
    published: Path
        CSV of published numbers, shown in a section of their own (docs/report.md lists its columns).
    """
    from loralab.report import write

    page = write(folder, out, published)
    if json:
        files = sorted(str(file.relative_to(page.parent)) for file in page.parent.rglob("*.*"))
        as_json({"page": str(page), "files": files})
        return
    print(f"report: {page}")
