"""The tables of docs/results.md: `python studies/tables.py STUDY`, a folder that `loralab study` wrote, as Markdown.

Scores, mean (standard deviation over seeds), by task; then for each task the means after each epoch, memory of a step,
scores at every rank of a training that has many, and what tuning tried, scored on the held-out rows that chose.
"""

import sys
from collections.abc import Iterable, Iterator

import numpy as np

from loralab.study import Cell, load
from loralab.study.search import score

Row = tuple[str, list[str]]  # label of the method, what it has


def main(folder: str) -> None:
    cells = {key: cell for key, cell in load(folder).cells().items() if cell.runs}
    places = list(dict.fromkeys(key[:2] for key in cells))
    methods = list(dict.fromkeys(key[2] for key in cells))
    rows = [(m, [spread(cells[(*p, m)].scores) if (*p, m) in cells else "" for p in places]) for m in methods]
    table("score", [", ".join(place) for place in places], rows)
    for place in places:
        own = [cell for key, cell in cells.items() if key[:2] == place]
        for what, columns, found in (epochs(own), memory(own), ranks(own), tuning(own)):
            if rows := list(found):
                table(f"{', '.join(place)}: {what}", columns, rows)


def epochs(own: list[Cell]) -> tuple[str, list[str], Iterator[Row]]:
    name = own[0].metric
    most = max(len(run.history) for cell in own for run in cell.runs)

    def after(cell: Cell, epoch: int) -> str:
        scores = [run.history[epoch]["validation"][name] for run in cell.runs if len(run.history) > epoch]
        return spread(scores).partition(" ")[0]

    each = all(row["validation"] for row in own[0].runs[0].history)  # else it was read once
    found = ((cell.key[2], [after(cell, e) for e in range(most)]) for cell in own if each)
    return "mean after epoch", [str(e + 1) for e in range(most)], found


def memory(own: list[Cell]) -> tuple[str, list[str], Iterator[Row]]:
    """By the ledger of the runs, means over seeds."""
    kinds = list(own[0].runs[0].result["memory"]["ledger"])

    def row(cell: Cell) -> list[str]:
        ledger = [[run.result["memory"]["ledger"][kind] / 1e6 for kind in kinds] for run in cell.runs]
        mean = np.mean(ledger, axis=0)
        return [f"{value:.1f}" for value in (*mean, mean.sum())]

    return "MB of a step", [*kinds, "all"], ((cell.key[2], row(cell)) for cell in own)


def ranks(own: list[Cell]) -> tuple[str, list[str], Iterator[Row]]:
    many = [cell for cell in own if cell.runs[0].result.get("by_rank")]
    columns = sorted({rank for cell in many for rank in cell.runs[0].result["by_rank"]}, key=int)

    def at(cell: Cell, rank: str) -> list[float]:
        return [run.result["by_rank"][rank][cell.metric] for run in cell.runs]

    return "at rank", columns, ((cell.key[2], [spread(at(cell, rank)) for rank in columns]) for cell in many)


def tuning(own: list[Cell]) -> tuple[str, list[str], Iterator[Row]]:
    tuned = [cell for cell in own if cell.tuning]

    def row(cell: Cell) -> list[str]:
        return [f"{point(run.scheduled.tried)}: {score(run):.3f}" for run in cell.tuning]

    most = max((len(cell.tuning) for cell in tuned), default=0)
    return "held out", [f"try {i + 1}" for i in range(most)], ((cell.key[2], row(cell)) for cell in tuned)


def point(tried: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in tried.items())


def spread(values: Iterable[float]) -> str:
    """Mean (standard deviation), the mean alone of one value, nothing of none."""
    values = list(values)
    mean = f"{np.mean(values):.3f}" if values else ""
    return mean + (f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else "")


def table(what: str, columns: list[str], rows: list[Row]) -> None:
    print(f"| {what} | {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * len(columns))
    for label, row in rows:
        print(f"| {label} | {' | '.join(row)} |")
    print()


if __name__ == "__main__":
    main(sys.argv[1])
