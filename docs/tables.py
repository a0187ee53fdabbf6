"""Write the table of methods in docs/methods.md from the code: `python docs/tables.py`. A test compares the two."""

from pathlib import Path

from loralab.cli.methods import IN, OUT, learns
from loralab.recipe import NAMED

PAGE = Path(__file__).parent / "methods.md"
BEGIN = "<!-- written by python docs/tables.py -->\n"
END = "<!-- end -->\n"


def methods() -> str:
    """A row for each method: name, equation, what learns, values of a layer that learn, default learning rate."""
    lines = [f"| method | y = | learns | values of a {OUT} x {IN} layer | rate |", "| --- | --- | --- | ---: | ---: |"]
    for name, (row, equation) in NAMED.items():
        escaped = equation.replace("|", "\\|")
        values = f"{row.count(OUT, IN):,}" if row.factors else ""
        lines.append(f"| `{name}` | `{escaped}` | {learns(row)} | {values} | {row.lr:g} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table as the code has it now. Raises ValueError if the page lacks the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has no lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{methods()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
