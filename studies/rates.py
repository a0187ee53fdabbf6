"""The tables of docs/methods.md: `python studies/rates.py SEARCH CHECK...`, folders that `loralab study` wrote.

SEARCH is the study of studies/quality.toml (a grid of rates for each method), CHECK those of studies/learns.toml
(every method at its default rate). Scores of the search are those on the held-out rows that chose. A star says that it
was not clearly above the head alone, in accuracy where the task has it.
"""

import sys
from statistics import mean

from loralab.recipe import recipe
from loralab.study import Cell, Study, load
from loralab.study.search import score

HEAD = "head"
CLEAR = 0.02  # of a metric, above the head alone


def search(study: Study) -> None:
    cells = study.cells()
    points = {key: [p for p in study.schedule if p.key == key and p.role == "tune"] for key in cells}
    most = max(map(len, points.values()))
    print("| method | " + "rate: score | " * most + "default | validation |")
    print("| --- | " + "---: | " * most + "---: | ---: |")
    for key, cell in cells.items():
        tried = {run.scheduled.address: score(run) for run in cell.tuning}
        best = max(tried.values(), default=None)
        row = []
        for p in points[key]:
            found = tried.get(p.address)
            shown = "fails" if found is None else f"**{found:.3f}**" if found == best else f"{found:.3f}"
            row.append(f"{p.tried['lr']:g}: {shown}")
        row += [""] * (most - len(row))
        print(f"| {key[2]} | {' | '.join(row)} | {recipe(key[2]).lr:g} | {score_text(cell, cells)} |")


def checks(studies: list[Study]) -> None:
    cells = {key: cell for study in studies for key, cell in study.cells().items() if cell.runs}
    places = list(dict.fromkeys(key[:2] for key in cells))
    print("| method | rate | " + " | ".join(f"{task}, {model}" for task, model in places) + " |")
    print("| --- | ---: | " + " | ".join("---:" for _ in places) + " |")
    for method in dict.fromkeys(key[2] for key in cells):
        scores = [score_text(cells.get((*place, method)), cells) for place in places]
        print(f"| {method} | {recipe(method).lr:g} | {' | '.join(scores)} |")


def score_text(cell: Cell | None, cells: dict) -> str:
    if cell is None or not cell.runs:
        return ""
    head = cells[(*cell.key[:2], HEAD)]
    clear = cell.key[2] == HEAD or not head.runs or accuracy_or_score(cell) > accuracy_or_score(head) + CLEAR
    return f"{cell.scores.mean():.3f}{'' if clear else ' *'}"


def accuracy_or_score(cell: Cell) -> float:
    """Accuracy where the task has it: of MRPC's rows one class for all has an F1 of 0.812. Else the score."""
    return mean(run.result["metrics"].get("accuracy", of) for run, of in zip(cell.runs, cell.scores, strict=True))


if __name__ == "__main__":
    found = [load(folder) for folder in sys.argv[1:]]
    search(found[0])
    print()
    checks(found[1:])
