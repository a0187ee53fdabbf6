"""Write the small files of docs/objectives.md: `python docs/examples/rows.py FOLDER`. Deterministic, no network.

reviews.csv: reviews with quotes, line breaks and odd labels; people.conll: names of persons and places, with names in
the last fifth that no other row has; quiz.jsonl: questions with choices; topics.csv: texts with several topics.
"""

import csv
import json
import sys
from pathlib import Path
from random import Random

GOOD = ["wonderful", "charming", "funny", "moving", "brilliant", "warm", "clever", "fine"]
BAD = ["dull", "tedious", "clumsy", "noisy", "pointless", "weak", "stale", "grim"]
FILMS = ["film", "story", "cast", "script", "ending", "music"]
FIRST = [
    *("Anna", "Boris", "Chen", "Dalia", "Emeka", "Fatou", "Georg", "Hana", "Ivo", "Jana"),
    *("Kofi", "Lena", "Marek", "Nadia", "Omar", "Petra", "Quinn", "Rosa", "Stefan", "Tariq"),
]
LAST = [
    *("Abel", "Brandt", "Costa", "Diallo", "Eriksen", "Ferrari", "Gruber", "Haas"),
    *("Ito", "Jansen", "Keller", "Lopez", "Meyer", "Novak", "Okoro", "Park"),
]
TOWNS = [
    *("Aarhus", "Bergen", "Cusco", "Dakar", "Essen", "Faro", "Genoa", "Hanoi"),
    *("Izmir", "Jaipur", "Kyoto", "Lagos", "Malmo", "Nairobi", "Oslo", "Porto"),
]
TOPICS = {
    "price": ["cheap", "expensive", "price", "costs"], "service": ["waiter", "friendly", "rude", "staff"],
    "food": ["soup", "bread", "tasty", "salty"], "place": ["garden", "noisy", "view", "terrace"],
}  # fmt: skip


def reviews(random: Random) -> list[tuple[str, str]]:
    """(text, stars): stars are "good", "bad" and, rarely, "so-so"; some texts have quotes, commas and line breaks."""
    rows = []
    for _ in range(400):
        stars = random.choices(["good", "bad", "so-so"], [5, 4, 1])[0]
        words = {"good": [GOOD, GOOD], "bad": [BAD, BAD], "so-so": [GOOD, BAD]}[stars]
        a, b = (random.choice(part) for part in words)
        text = f"The {random.choice(FILMS)} is {a}, the {random.choice(FILMS)} {b}."
        text = random.choice([text, f'"{text}"', text.replace(", ", ",\n"), f"  {text} 10/10?"])
        rows.append((text, stars))
    return rows


def people(random: Random) -> list[list[tuple[str, str]]]:
    """Sentences as (word, BIO tag)."""
    rows = []
    for i in range(400):
        part = slice(0, 14) if i < 320 else slice(14, None)
        first, last, town = (random.choice(names[part]) for names in (FIRST, LAST, TOWNS))
        person = [(first, "B-PER"), (last, "I-PER")][: random.choice([1, 2, 2])]
        place = [(town, "B-LOC")]
        plain = [[(w, "O") for w in text.split()] for text in ("lives in", "has never seen", "writes from", "left")]
        rows.append([*person, *random.choice(plain), *place, (".", "O")])
    return rows


def quiz(random: Random) -> list[dict[str, object]]:
    """Which of these is a town, a first name, something good?"""
    kinds = {"a town": TOWNS, "a first name": FIRST, "a kind word for a film": GOOD}
    rows = []
    for _ in range(300):
        kind = random.choice(list(kinds))
        right = random.choice(kinds[kind])
        wrong = [random.choice(words) for other, words in kinds.items() if other != kind]
        choices = [right, *wrong]
        random.shuffle(choices)
        rows.append({"question": f"Which one is {kind}?", "choices": choices, "answer": choices.index(right)})
    return rows


def topics(random: Random) -> list[tuple[str, str]]:
    """(text, topics with ; between them)."""
    rows = []
    for _ in range(300):
        found = sorted(random.sample(list(TOPICS), random.choice([1, 1, 2, 3])))
        text = ", ".join(random.choice(TOPICS[topic]) for topic in found)
        rows.append((f"We noted: {text}.", ";".join(found)))
    return rows


def main(folder: Path) -> None:
    """Write all files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, heads, make in (("reviews", ("text", "label"), reviews), ("topics", ("text", "labels"), topics)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([heads, *make(Random(1))])
    sentences = ["".join(f"{word} {tag}\n" for word, tag in row) for row in people(Random(1))]
    (folder / "people.conll").write_text("\n".join(sentences[:320]), encoding="utf-8")
    (folder / "new-people.conll").write_text("\n".join(sentences[320:]), encoding="utf-8")
    lines = [json.dumps(row) for row in quiz(Random(1))]
    (folder / "quiz.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "rows"))
