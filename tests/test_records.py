"""The embedded task for decoders: rows say what is asked, validation has words of its own, and it never changes."""

import json
import re
from pathlib import Path

import pytest

from loralab import data, objectives
from loralab.data import records
from loralab.errors import UserError

FIELDS = ["name", "age", "city", "job", "languages", "member", "balance", "alias"]
PAGE = (Path(__file__).parents[1] / "docs/language-models.md").read_text()


def number(word: str) -> int:
    """Read a number from 20 to 79 in digits or words."""
    tens, _, ones = word.partition("-")
    return int(word) if word.isdecimal() else 10 * records.TENS.index(tens) + 20 + records.ONES.index(ones)


def read(text: str) -> dict:
    """Read a description back with patterns of its own; a slow oracle of the generator."""
    found = {
        "name": re.match(r"(.+?) (?:is|turned|lives|has|comes|works|speaks|knows|learned|goes|signs|owes)\b", text)[1]
    }
    if age := re.search(r"\b(?:is|turned) ([0-9]+|[a-z]+ty(?:-[a-z]+)?)(?: years old| this year|,|\.(?!\d))", text):
        found["age"] = number(age[1])
    if city := re.search(r"(?:lives in|has a flat in|comes from) ([^,.]+)", text):
        found["city"] = city[1]
    if job := re.search(r"(?:works as a|has a job as a) ([^,.]+)|is a ([^,.]+) by trade", text):
        found["job"] = job[1] or job[2]
    if re.search("speaks no foreign language|knows no other language", text):
        found["languages"] = []
    elif spoken := re.search(r"(?:speaks|knows|learned) ((?:[A-Z][a-z]+(?:, | and )?)+)", text):
        found["languages"] = re.findall("[A-Z][a-z]+", spoken[1].split(", and ")[0])
    if re.search(r"is a member|has joined the club|is not a member|has not joined the club", text):
        found["member"] = " not " not in re.search(r"is (not )?a member|has (not )?joined", text)[0]
    if money := re.search(r"(owes|has|is) ([0-9.]+) euros( behind)?", text):
        value = float(money[2])
        found["balance"] = -value if money[1] == "owes" or money[3] else value
    if alias := re.search('"(.+?)"', text):
        found["alias"] = alias[1]
    return found


@pytest.mark.parametrize("split", records.ROWS)
def test_a_description_says_its_record_and_no_more(split):
    pairs = records.pairs(split)
    for text, record in pairs:
        assert read(text) == record, text
        assert list(record) == [field for field in FIELDS if field in record]
    assert {len(record) for _, record in pairs} == {5, 6, 7, 8}
    assert all(any(field not in record for _, record in pairs) for field in FIELDS[1:])
    assert len(dict(pairs)) == len(pairs) == records.ROWS[split]


def test_some_records_are_unusual():
    """An age in words, money owed, cents, an empty list, a name of several parts: in some rows of each split."""
    for split, rows in records.ROWS.items():
        pairs = records.pairs(split)
        unusual = {
            "words": [p for p in pairs if re.search(r"ty(-[a-z]+)?( years old| this year|[,.])", p[0])],
            "owed": [p for p in pairs if p[1].get("balance", 0) < 0],
            "cents": [p for p in pairs if p[1].get("balance", 0) % 1],
            "empty": [p for p in pairs if p[1].get("languages") == []],
            "parts": [p for p in pairs if re.search("['-]| .+ ", p[1]["name"])],
        }
        for kind, found in unusual.items():
            assert 0.02 * rows < len(found) < 0.5 * rows, kind


def test_validation_has_words_of_its_own():
    for kind in records.WORDS["train"]:
        assert not {*records.words("train", kind)} & {*records.words("validation", kind)}
    for field in ("name", "city", "job", "alias", "languages"):
        seen = [
            {str(record.get(field)) for _, record in records.pairs(split)} - {"None", "[]"} for split in records.ROWS
        ]
        assert not seen[0] & seen[1]


def test_the_task_is_chats_of_objective_causal():
    task = objectives.load("records")
    assert objectives.find("Records").name == task.objective == "causal"
    assert task.metrics == objectives.causal.LANGUAGE
    assert {len(task.train), *map(len, task.validation.values())} == {*records.ROWS.values()}
    for row, (text, record) in zip(task.train.texts, records.pairs("train"), strict=True):
        (asker, question), (speaker, answer) = row
        assert (asker, speaker) == ("user", "assistant")
        assert question == records.QUESTION + text
        assert json.loads(answer) == record
        assert all(field in question for field in FIELDS)
    assert "records" in data.names()
    assert objectives.load("records", options={"loss_on": "all"}).options == {"loss_on": "all"}
    with pytest.raises(UserError, match="records cannot be read as tagging"):
        objectives.load("records", objective="tagging")


def test_the_page_says_what_the_task_is():
    """Its hash, which names it in every run, and an example: whoever changes a word makes another task."""
    task = records.load()
    assert f"`{task.sha256}`" in PAGE
    train, validation = records.ROWS.values()
    assert f"Train has {train:,} rows, validation {validation}" in PAGE
    (text, record), *_ = records.pairs("validation")
    assert text in PAGE
    assert json.dumps(record, ensure_ascii=False) in PAGE
    assert records.QUESTION.strip() in PAGE
