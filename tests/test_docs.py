"""The documentation is true: its file tree, tables, commands and code are those of the library."""

import json
import re
import shlex
from pathlib import Path

import docs_site
import figures
import pytest
from test_cli import flags

import loralab
from loralab.cli import COMMANDS, app, main
from loralab.recipe import NAMED

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("**/*.md"))]
README = (REPO / "README.md").read_text()
ARCHITECTURE = (REPO / "docs/architecture.md").read_text()
HOW_TO = REPO / "docs/how-to-add-a-method.md"  # its commands are run, by test_how_to.py
PROTOCOL = (REPO / "docs/protocol.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for kind, block in fenced if kind == language]


def first_cells(text: str, heading: str) -> list[str]:
    """What the first table under a heading has in its first column, in backticks."""
    table = re.search(r"^\|.*?(?=\n\n|\Z)", text.partition(heading)[2], re.MULTILINE | re.DOTALL)
    assert table, f"no table under {heading!r}"
    return [cell for line in table[0].splitlines()[2:] for cell in re.findall(r"`([^`]+)`", line.split("|")[1])]


# ---- what is there ---------------------------------------------------------------------------------------------------


def test_the_architecture_names_every_module():
    package = Path(loralab.__file__).parent
    there = {path.name + "/" * path.is_dir() for path in package.iterdir() if not path.name.startswith(("_", "py."))}
    storeys = ARCHITECTURE.partition("## The storeys")[2].partition("\n## ")[0]
    assert there - set(re.findall(r"`([\w.]+/?)`", storeys)) == set()


def test_no_file_of_the_package_has_more_than_500_lines():
    lines = {path.name: path.read_text().count("\n") for path in Path(loralab.__file__).parent.glob("**/*.py")}
    assert [name for name, count in lines.items() if count > 500] == []


def test_what_the_readme_says_of_places_is_there():
    (tree,) = [block for block in blocks(README, "") if block.startswith("src/loralab/")]
    named = [word for line in tree.splitlines()[1:] for word in re.findall(r"\b[\w]+(?:\.py|/)(?=\s|:|$)", line)]
    package = Path(loralab.__file__).parent
    assert len(named) > 15
    assert [name for name in named if not (package / name).exists()] == []


def test_the_readme_names_every_family_of_methods():
    """The table itself is docs/methods.md, which a command writes."""
    text = README.partition("## Methods")[2].partition("\n## ")[0].lower()
    plain = {name.removeprefix("frozen-").removesuffix("-precond") for name in NAMED} - {
        "superlora",
        "qdora",
        "full",
        "head",
    }
    assert [name for name in plain if name not in text] == []


def test_the_readme_names_every_command():
    assert [cell.split()[1] for cell in first_cells(README, "## Command line")] == list(COMMANDS)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_site_carries_what_its_pages_lead_to():
    """`make docs` checks every link of what it made; this needs no builder."""
    for page in (REPO / "docs").glob("**/*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            led = (page.parent / target).resolve()
            inside = led.is_relative_to(REPO / "docs") or led in docs_site.carried()
            assert inside, f"{page.name} links to {target}, which is not on the site: see CARRIED in tests/docs_site.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_know_no_machine(page):
    assert re.findall(r"(?:/home/|/root/|/tmp/|/work/|C:\\)\S*", page.read_text()) == []


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Every `loralab ...` a page tells the reader to type, in a shell block or in backticks."""
    shell = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").strip() for line in shell.splitlines()]
    quoted = re.findall(rf"`(?:accelerate launch -m )?(loralab (?:{'|'.join(COMMANDS)})\b[^`]*)`", text)
    return [line for line in (*lines, *quoted) if line.startswith("loralab ")]


PROMISED = [(page.name, command) for page in PAGES if page != HOW_TO for command in commands(page.read_text())]
PROMISED += [("--help", example) for _, example in COMMANDS.values()]
PROMISED += [("make figures", f"loralab bench {flags}") for flags in figures.STEPS.values()]


@pytest.mark.parametrize(("page", "command"), PROMISED)
def test_a_command_of_the_documentation_parses(page, command):
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
    assert words[0] in COMMANDS
    if len(words) == 1 and words[0] not in ("demo", "methods"):
        return  # only its name
    if words[0] == "train" and "--task" not in words:
        words += ["--task", "cola"]  # prose may leave it out
    _, bound, _ = app().parse_args(words, exit_on_error=False, print_error=False)
    settings = bound.arguments.get("settings")
    if settings is not None and getattr(settings, "ranks", None) is None:
        settings.recipe()


# ---- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", blocks(README, "python"), ids=lambda code: code.split()[1])
def test_the_code_of_the_readme_runs(code, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("FacebookAI/roberta-base", str(tiny)), "example", "exec"), {})


def test_the_loops_of_the_page_run_one_after_the_other(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks((REPO / "docs/own-loop.md").read_text(), "python"))
    exec(compile(code.replace("FacebookAI/roberta-base", str(tiny)), "own-loop.md", "exec"), {})
    out = capsys.readouterr().out
    assert all(word in out for word in ("adapter", "dora", "'label': "))
    assert (tmp_path / "mood-adapter/README.md").exists()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_protocol_names_every_field_that_a_run_writes(tiny, own, tmp_path):
    assert main(flags(tiny, own, method="dylora", out=tmp_path / "run")) == 0  # which writes `by_rank` too
    for file, heading in (
        ("run.json", "Fields of `run.json`:"),
        ("result.json", "Fields of `result.json`:"),
        ("adapter/adapter.json", "`adapter.json` holds:"),
    ):
        written = json.loads((tmp_path / "run" / file).read_text())
        assert sorted(first_cells(PROTOCOL, heading)) == sorted(written)
    there = {path.name + "/" * path.is_dir() for path in (tmp_path / "run").iterdir()}
    assert there | {"checkpoint/"} == set(first_cells(PROTOCOL, "## Files of a run folder"))
