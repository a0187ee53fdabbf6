"""Write the messy files of docs/tutorials/own-csv.md: `python docs/examples/messy.py FOLDER [ROWS]`. Deterministic.

reviews.csv: as an office program saves it, with semicolons, cp1252 and \\r\\n; labels in several spellings, a rare
third class, missing titles, line breaks within cells, and rows that cannot be used. merge.json: labels that are one.
test.csv: clean rows with labels. new.csv: rows to answer. calls.csv: rows for three adapters (mood, subject, length).
mood.csv, subject.csv and length.csv: what these learn from.
"""

import csv
import json
import sys
from pathlib import Path
from random import Random

ROWS = 800
GOOD = ["wonderful", "charming", "funny", "moving", "brilliant", "warm", "clever", "fine"]
BAD = ["dull", "tedious", "clumsy", "noisy", "pointless", "weak", "stale", "grim"]
THINGS = {"film": ["cast", "script", "ending", "music"], "food": ["soup", "bread", "café", "crème brûlée"]}
SPELLINGS = {"great": ["great"] * 12 + ["Great", "GREAT"], "poor": ["poor"] * 12 + ["Poor"], "mixed": ["mixed"]}
MERGE = {"Great": "great", "GREAT": "great", "Poor": "poor"}
COLUMNS = ("id", "title", "body", "stars")
Review = tuple[str, str, str]  # title, body, stars


def review(random: Random, stars: str, subject: str = "film") -> Review:
    """Make a review whose words show its stars; a mixed one praises one thing and blames another."""
    words = {"great": (GOOD, GOOD), "poor": (BAD, BAD), "mixed": (GOOD, BAD)}[stars]
    a, b = (random.choice(part) for part in words)
    one, other = random.sample(THINGS[subject], 2)
    title = random.choice([f"So {a}", f"{a.capitalize()}!", "My visit", "10 € well spent?"])
    joint = ", but" if stars == "mixed" else " and"
    return title, f"The {one} is {a}{joint} the {other} {b}.", stars


def reviews(random: Random, count: int) -> list[Review]:
    """Make reviews, one in twelve of them mixed."""
    return [review(random, random.choices(["great", "poor", "mixed"], [6, 5, 1])[0]) for _ in range(count)]


def messy(random: Random, count: int) -> list[list[str]]:
    """Make rows as people leave them. Rows 5, 50 and 100 have no text, 20 has no label, 70 has a cell too many."""
    rows = []
    for number, (title, body, stars) in enumerate(reviews(random, count), 1):
        title = "" if random.random() < 0.05 else title
        body = random.choice([body, f'"{body}"', body.replace(" and", ",\nand"), body + " ", body])
        row = [f"R{number:04}", title, body, random.choice(SPELLINGS[stars])]
        if number in (5, 50, 100):
            row[1:3] = "", " "
        if number == 20:
            row[3] = ""
        rows.append(row + ["?"] * (number == 70))
    return rows


def write(path: Path, header: tuple[str, ...], rows: list[list[str]], encoding: str = "utf-8", mark: str = ",") -> None:
    """Write a CSV; one in cp1252 has the line ends of Windows."""
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=mark, lineterminator="\r\n" if encoding == "cp1252" else "\n")
        writer.writerows([list(header), *rows])


def main(folder: Path, count: int = ROWS) -> None:
    """Write all files; `count` is the number of rows of reviews.csv."""
    random = Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "reviews.csv", COLUMNS, messy(random, count), "cp1252", ";")
    (folder / "merge.json").write_text(json.dumps(MERGE) + "\n")
    tests = [[f"T{i:03}", *row] for i, row in enumerate(reviews(random, max(40, count // 6)))]
    write(folder / "test.csv", COLUMNS, tests)
    write(folder / "new.csv", COLUMNS[:3], [row[:3] for row in tests[:30]])
    pool = [(review(random, random.choice(["great", "poor"]), random.choice(["film", "food"]))) for _ in range(count)]
    kinds = {
        "mood": lambda body, stars: stars,
        "subject": lambda body, stars: "film" if any(word in body for word in THINGS["film"]) else "food",
        "length": lambda body, stars: "long" if len(body.split()) > 8 else "short",
    }
    bodies = [(body if random.random() < 0.5 else f"Honestly, I have to say: {body}", stars) for _, body, stars in pool]
    for name, label in kinds.items():
        write(folder / f"{name}.csv", ("text", "label"), [[body, label(body, stars)] for body, stars in bodies])
    calls = [[random.choice(list(kinds)), body] for body, _ in bodies[:60]]
    write(folder / "calls.csv", ("which", "text"), calls)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
