"""docs/results.md says what the commands print: its numbers, from the stored runs, by tables.py and afterwards.py."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from loralab.data import is_flat
from loralab.study import load

REPO = Path(__file__).parents[1]
RESULTS = REPO / "studies/results"
PAGE = (REPO / "docs/results.md").read_text()
NUMBER = re.compile(r"(?<![\w.])\d\.\d{3}(?!\d)")
SPREAD = re.compile(r"\d\.\d{3} \(\d\.\d{3}\)")
SECTIONS = {  # heading of the page -> the studies whose numbers stand under it
    "# Results": ("verdict",),
    "## verdict": ("verdict",),
    "## The earlier studies": ("utaustin", "utaustin-mpnet"),
    "## utaustin on minilm": ("utaustin",),
    "## utaustin on mpnet": ("utaustin", "utaustin-mpnet"),
    "## cornell": ("cornell",),
    "### Rank and targets": ("cornell-grid",),
    "### Targets, each at its own rate": ("targets",),
    "### Ranks, each at its own rate": ("ranks",),
    "### Rows cut at 128 or at 256 tokens": ("tokens",),
    "## cs4782": ("cs4782", "cornell-grid", "osnabrueck", "osnabrueck-ranks"),
    "### Delta-LoRA, each wait at its own rate": ("delta",),
    "### LoRA+ ratios on MNLI, each at its own rate": ("ratios",),
    "### RTE from an adapter for MNLI": ("rte-from-mnli",),
    "### A base in 4 bits, at its own rate": ("double-quantization",),
    "## osnabrueck": ("osnabrueck", "osnabrueck-ranks"),
}
TYPED = {  # numbers that a command of the page itself gives, or an earlier edition of it
    "0.767": "q alone at ten times the rate: the `loralab train` line beside it",
    "0.002": "LoRA+ ratio 32, quoted from an earlier edition, and standard deviations of the grid",
}


def own(heading):
    """The text under a heading, up to the next one."""
    text = PAGE.partition(f"{heading}\n")[2]
    return re.split(r"^#{1,3} (?!What is not supported)", text, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.fixture(scope="module")
def printed():
    """Study -> what the two commands print of it, and the numbers of its comparisons."""
    sys.path.insert(0, str(REPO / "studies"))
    try:
        import afterwards
        import tables
    finally:
        sys.path.pop(0)
    found = {}
    for name in sorted({study for studies in SECTIONS.values() for study in studies}):
        out = io.StringIO()
        with redirect_stdout(out):
            tables.main(str(RESULTS / name))
            afterwards.main(str(RESULTS / name))
        found[name] = out.getvalue()
    return found


def rounded(name):
    """The numbers of a study's comparisons as the page rounds them."""
    results = json.loads((RESULTS / name / "results.json").read_text())
    rows = results["comparisons"] + [
        row for family in results.get("planned_contrasts", []) for row in family["contrasts"]
    ]
    keys = ("difference", "low", "high", "p_holm", "p_equivalent_holm", "smallest")
    return {f"{abs(row[key]):.3f}" for row in rows for key in keys if row.get(key) is not None}


def test_what_is_not_known_is_an_empty_cell(printed):
    """A mean of nothing is nan, and a warning: a cell of runs without predictions, or with fewer epochs."""
    assert {name: re.findall(r"\bnan\b.*", text) for name, text in printed.items()} == {name: [] for name in printed}


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_mean_with_its_spread_is_printed(printed, heading):
    there = {pair for study in SECTIONS[heading] for pair in SPREAD.findall(printed[study])}
    told = SPREAD.findall(own(heading))
    assert [pair for pair in told if pair not in there] == []


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_number_with_three_digits_is_printed(printed, heading):
    there = set(TYPED)
    for study in SECTIONS[heading]:
        there |= set(NUMBER.findall(printed[study])) | rounded(study)
        there |= {f"{float(x):.3f}" for x in re.findall(r"\d\.\d{4}(?!\d)", printed[study])}
    told = NUMBER.findall(own(heading))
    assert len(told) > 5
    assert [number for number in told if number not in there] == []


@pytest.mark.parametrize("heading", ["## verdict", "## utaustin on minilm", "## cornell", "## cs4782"])
def test_a_row_of_scores_is_that_of_its_method(printed, heading):
    """The scores of a method stand in its own row, in the order of the printed tasks."""
    (study,) = SECTIONS[heading][:1]
    scores = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for line in printed[study].partition("\n\n")[0].splitlines()[2:]
        for cells in [line.strip("| ").split("|")]
    }
    rows = [line.strip("| ").split(" | ") for line in own(heading).splitlines() if SPREAD.search(line)]
    tables = {row[0]: row[1:] for row in rows if row[0] in scores}
    assert tables.keys() == scores.keys()
    for method, told in tables.items():
        places = [told.index(score) for score in scores[method]]
        assert places == sorted(places), method


def test_the_check_by_sign_flips_is_told_as_it_is():
    results = json.loads((RESULTS / "verdict/results.json").read_text())
    found = [row for family in results["planned_contrasts"] for row in family["contrasts"]]
    differ = {id(row) for row in found if row["verdict"] in ("better", "worse")}
    by_signs = {id(row) for row in found if row["p_signs"] < 0.05}
    counts = len(differ & by_signs), len(found), len(by_signs - differ)
    assert differ <= by_signs
    assert "finds all {} differences of the {} contrasts again, and {} more".format(*counts) in " ".join(PAGE.split())


def test_the_shares_that_runs_call_acceptable_are_printed(printed):
    shares = re.findall(r"(\d+) to (\d+) % \|", printed["utaustin"].partition("| cola |")[2].partition("\n\n")[0])
    learned = [(int(low), int(high)) for low, high in shares if high != "100"]
    low, high = min(x for x, _ in learned), max(x for _, x in learned)
    assert f"runs call {low} to {high} % of the rows acceptable where 69 %" in " ".join(PAGE.split())
    assert "cola: 69 % of the rows are of class 1" in printed["utaustin"]


def test_the_hours_are_those_of_the_command():
    sys.path.insert(0, str(REPO / "studies"))
    try:
        import hours
    finally:
        sys.path.pop(0)
    table = PAGE.partition("| study | runs | of them tuning | hours |")[2].partition("\n\n")[0].strip().splitlines()[1:]
    out = io.StringIO()
    with redirect_stdout(out):
        hours.main([str(RESULTS / row.split("|")[1].strip()) for row in table[:-1]])
    assert out.getvalue().strip().splitlines()[2:] == table


def test_the_rule_for_regressions_finds_the_runs_that_learned_nothing_and_no_other():
    cells = load(RESULTS / "verdict").cells()
    runs = [run for key, cell in cells.items() if key[0] == "stsb" for run in cell.runs]
    assert len(runs) == 7 * 12
    flat = [is_flat(run.reported.logits[:, 0], run.reported.labels) for run in runs]
    assert flat == [run.selected < 0.8 for run in runs]
    assert sum(flat) == 4
