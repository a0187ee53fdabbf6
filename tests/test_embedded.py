"""The embedded task: minimal pairs that share no content word between splits and that single words do not solve."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef

from loralab.data import Split, embedded
from loralab.data.embedded import CLOSED, PAIRS, PATTERNS, WORDS

REPO = Path(__file__).parents[1]
PAGE = (REPO / "docs/embedded-task.md").read_text()
SPLITS = tuple(PAIRS)
ALL = embedded.pairs()
TASK = embedded.load()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def forms(tables: dict[str, str]) -> set[str]:
    return set(words(" ".join(tables.values())))


def literals() -> set[str]:
    """The words that stand in a pattern as they are."""
    slots = {slot for patterns in PATTERNS.values() for slot in re.split(r"[\s|?]+", " ".join(patterns))}
    return {slot for slot in slots if slot.isalpha() and slot not in CLOSED | WORDS["train"]}


def sentences(split: str) -> set[str]:
    return {text for pair in ALL if pair.split == split for text in (pair.good, pair.bad)}


def edits(good: str, bad: str) -> int:
    """Levenshtein distance in words, by the textbook recursion; the slow oracle of "differs in one place"."""
    a, b = words(good), words(bad)
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, left in enumerate(a, 1):
        for j, right in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (left != right))
    return table[len(a), len(b)]


def of(split: str) -> Split:
    return TASK.train if split == "train" else TASK.validation["validation"]


def test_no_content_word_is_shared() -> None:
    train, validation = forms(WORDS["train"]), forms(WORDS["validation"])
    function = forms(CLOSED) | literals()
    assert set(WORDS["train"]) == set(WORDS["validation"])
    assert not train & validation
    assert not (train | validation) & function
    for split, content in (("train", train), ("validation", validation)):
        assert set(words(" ".join(sentences(split)))) <= content | function


def test_every_class_is_asked_for_by_a_pattern() -> None:
    asked = set(re.findall(r"\w+", " ".join(slot for patterns in PATTERNS.values() for slot in patterns)))
    assert not (set(CLOSED) | set(WORDS["train"])) - asked


@pytest.mark.parametrize("split", SPLITS)
def test_a_content_word_stands_in_one_row_and_a_class_has_rows_of_one_length(split: str) -> None:
    rows = [row.split("/") for text in WORDS[split].values() for row in text.split()]
    times = Counter(form for row in rows for form in set(row))
    assert [form for form, count in times.items() if count > 1] == []
    assert all(len({len(row) for row in rows}) == 1 for rows in embedded.word_forms(split).values())


def test_a_pair_differs_in_one_place() -> None:
    assert [pair for pair in ALL if edits(pair.good, pair.bad) != 1] == []


def test_agreement_changes_the_form_and_not_the_word() -> None:
    families = {
        split: [set(words(" ".join(row))) for rows in embedded.word_forms(split).values() for row in rows]
        for split in SPLITS
    }
    for pair in ALL:
        if pair.phenomenon not in ("argument structure", "filler-gap"):
            changed = set(words(pair.good)) ^ set(words(pair.bad))
            assert any(changed <= family for family in families[pair.split]), pair


def test_sentences_look_like_sentences() -> None:
    wrong = [text for split in SPLITS for text in sentences(split) if not re.fullmatch(r"[A-Z]\w*( \w+)+[.?]", text)]
    assert wrong == []


def test_no_sentence_comes_twice() -> None:
    # so none has both labels, and both members of a pair are in one split only
    times = Counter(text for pair in ALL for text in (pair.good, pair.bad))
    assert times.most_common(1)[0][1] == 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_task_holds_the_pairs(split: str) -> None:
    rows = of(split)
    chosen = [pair for pair in ALL if pair.split == split]
    assert Counter(zip([text for (text,) in rows.texts], rows.labels, strict=True)) == Counter(
        [(pair.good, 1) for pair in chosen] + [(pair.bad, 0) for pair in chosen]
    )
    assert Counter(pair.phenomenon for pair in chosen) == dict.fromkeys(PATTERNS, PAIRS[split])
    assert sum(rows.labels) * 2 == len(rows) == 2 * len(PATTERNS) * PAIRS[split]


@pytest.mark.parametrize("split", SPLITS)
def test_every_hundred_rows_are_mixed(split: str) -> None:
    labels = of(split).labels
    assert all(25 <= sum(labels[start : start + 100]) <= 75 for start in range(0, len(labels) - 99, 100))


def test_the_same_in_another_process() -> None:
    program = "import random; random.seed(5); from loralab.data import embedded; print(embedded.load().sha256)"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": other, "PYTHONPATH": str(REPO / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == TASK.sha256


def test_single_words_do_not_solve_it() -> None:
    count = CountVectorizer()
    train, validation = of("train"), of("validation")
    model = LogisticRegression(max_iter=1000).fit(count.fit_transform([text for (text,) in train.texts]), train.labels)
    guessed = model.predict(count.transform([text for (text,) in validation.texts]))
    assert abs(matthews_corrcoef(validation.labels, guessed)) < 0.1


def test_the_page_tells_the_truth() -> None:
    """Counts, examples and hash of docs/embedded-task.md, the table in the order of the grammar."""
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}
    pairs = {(pair.phenomenon, pair.good, pair.bad) for pair in ALL if pair.split == "validation"}
    assert [name for name in table if name in PATTERNS] == list(PATTERNS)
    for name, patterns in PATTERNS.items():
        number, good, bad = table[name]
        assert number == str(len(patterns))
        assert (name, good, bad.removeprefix("\\*")) in pairs
    for split, cells in ((split, table[split]) for split in SPLITS):
        content = {row for text in WORDS[split].values() for row in text.split()}
        assert cells == [f"{len(of(split)):,}", f"{PAIRS[split]}", f"{len(content)}"]
    assert TASK.sha256 in PAGE
