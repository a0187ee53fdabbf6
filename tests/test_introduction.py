"""The introduction for students: its code runs and shows what it says, and its pictures are those of the script."""

import re
import runpy
from pathlib import Path

import pytest
from test_docs import blocks

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "introduction.md").read_text()


@pytest.fixture(scope="module")
def ran():
    """The names that all blocks leave behind, run in order."""
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks(PAGE, "python")), "introduction.md", "exec"), names)
    return names


def test_every_method_learns_what_the_page_says(ran):
    for exact in ("lora", "dora"):
        assert ran[exact][-1] < 1e-3 * ran[exact][0], exact
    assert 0.3 * ran["vera"][0] < ran["vera"][-1] < 0.95 * ran["vera"][0]  # a part of the change
    assert 0 < ran["qlora"][-1] < 0.02 * ran["qlora"][0]  # the rest is rounding
    errors = ran["errors"]
    assert errors[1] > errors[2] > errors[4]
    assert (ran["merged"] - ran["wanted"]).abs().max() < 1e-2
    assert set(ran["codes"].unique().tolist()) <= set(range(16))


def test_each_block_is_about_ten_lines():
    for block in blocks(PAGE, "python"):
        assert len([line for line in block.splitlines() if line.strip()]) <= 16


def test_pictures_are_those_of_the_script(tmp_path):
    script = runpy.run_path(str(DOCS / "pictures/introduction.py"))
    script["main"](tmp_path)
    named = re.findall(r"\]\(pictures/(intro-\w+\.svg)\)", PAGE)
    assert sorted(named) == sorted(path.name for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_text() == (DOCS / "pictures" / path.name).read_text()


def test_the_study_of_the_tutorial_is_one(tmp_path, monkeypatch):
    from loralab.study.toml import read

    runpy.run_path(str(DOCS / "examples/messy.py"))["main"](tmp_path, 60)
    (text,) = blocks((DOCS / "tutorials/dora-or-lora.md").read_text(), "toml")
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    made = read(tmp_path / "mine.toml")
    assert [method.label for method in made.methods] == ["lora", "dora"]
    assert made.budget(made.methods[0]) == 3


def test_the_index_leads_to_every_page():
    index = (DOCS / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)#]+\.md)", index))
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"}
    assert linked == there
