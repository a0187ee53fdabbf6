"""A table once, written four ways: CSV with every number, Markdown and LaTeX for papers, and the page's own."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$", "×": r"$\times$",
    "<": "$<$", ">": "$>$",
})  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take for a formula


@dataclass(frozen=True)
class Column:
    """One column: what a row shows in it, what it sorts by, and whether that is a number."""

    title: str
    show: Callable[[Any], str]
    sort: Callable[[Any], Any] | None = None  # None: by what is shown
    help: str = ""
    short: bool = True  # in the tables for papers too
    mark: Callable[[Any], str] | None = None  # a class of the page's style

    @property
    def number(self) -> bool:
        return self.sort is not None


@dataclass(frozen=True)
class Table:
    name: str  # of its files
    title: str
    columns: Sequence[Column]
    rows: Sequence[Any]
    raw: Callable[[Any], dict[str, Any]]  # a row as plain numbers, for the CSV
    notes: Sequence[str] = ()  # what its numbers are
    about: str = ""  # what must be read before them
    foreign: bool = False  # numbers of others

    def shown(self, columns: Sequence[Column]) -> list[list[str]]:
        return [[column.show(row) for column in columns] for row in self.rows]


def to_csv(table: Table) -> str:
    rows = [table.raw(row) for row in table.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def to_markdown(table: Table) -> str:
    columns = [column for column in table.columns if column.short]
    cells = [
        [column.title for column in columns],
        ["--:" if c.number else "---" for c in columns],
        *table.shown(columns),
    ]
    lines = ["| " + " | ".join(_bar(cell) for cell in row) + " |" for row in cells]
    return "\n".join([f"## {table.title}", "", *lines, "", *(f"* {note}" for note in table.notes), ""])


def _bar(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def to_latex(table: Table) -> str:
    """A table of booktabs."""
    columns = [column for column in table.columns if column.short]
    body = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in table.shown(columns)]
    head = " & ".join(column.title.translate(LATEX) for column in columns) + r" \\"
    caption = " ".join([f"{table.title}.", *(f"{note}." for note in table.notes)]).translate(LATEX)
    align = "".join("r" if column.number else "l" for column in columns)
    return "\n".join([
        r"% \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        r"\end{table}", "",
    ])  # fmt: skip


WRITERS: dict[str, Callable[[Table], str]] = {"csv": to_csv, "md": to_markdown, "tex": to_latex}
