"""docs/how-to-add-a-method.md is followed to the letter, on a copy of the library and its tests."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_docs import HOW_TO, REPO, blocks

TEXT = HOW_TO.read_text()
NEW = ("scaled-lora", "rsdora")


def edit(root: Path, block: str) -> None:
    """`# FILE` is a new file; `# FILE, in TABLE` has imports, which go above the table, and rows, which go into it."""
    heading, _, text = block.partition("\n")
    file, _, table = heading.removeprefix("# ").partition(", in ")
    if not table:
        assert not (root / file).exists()
        (root / file).write_text(text)
        return
    imports, rows = "", text
    if text.startswith("from "):
        imports, _, rows = text.partition("\n\n")
    before = (root / file).read_text()
    after = re.sub(rf"^{table}\b.*= {{.*\n", lambda found: f"{imports}\n{found[0]}{rows}", before, flags=re.MULTILINE)
    assert after != before, f"no table {table} in {file}"
    (root / file).write_text(after)


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """The repository after the edits of the page."""
    root = tmp_path_factory.mktemp("repository")
    for folder in ("src", "tests", "docs"):
        shutil.copytree(REPO / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(REPO / "pyproject.toml", root)
    for block in blocks(TEXT, "python"):
        edit(root, block)
    return root


def run(root: Path, *words: str) -> str:
    env = os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *words], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(program: str) -> list[list[str]]:
    """The commands of the page that start with a word, without it."""
    lines = [shlex.split(line) for block in blocks(TEXT, "sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words[0] == program]


@pytest.mark.slow
def test_the_new_methods_are_listed_trained_and_read_back(copied, tiny):
    outputs = {}
    for words in commands("loralab"):
        swapped = [str(tiny) if word == "minilm" else word for word in words]
        outputs[" ".join(words[:2]) if words[0] == "methods" else words[0]] = run(copied, "-m", "loralab", *swapped)
    assert list(outputs) == ["methods", "methods scaled-lora", "train", "inspect"]
    assert "Start of the scalar c; 1 starts as LoRA does." in outputs["methods scaled-lora"]
    listed = {line.split()[0]: line for line in outputs["methods"].splitlines() if line.strip()}
    (promised,) = re.findall(r"are ([\d,]+) for `scaled-lora`", TEXT)
    assert set(NEW) <= listed.keys()
    assert promised in listed["scaled-lora"]
    learned = {
        key: t for key, t in load_file(copied / "runs/scaled/adapter/adapter.safetensors").items() if key[-2:] == ".c"
    }
    assert learned
    assert all(not torch.equal(c, torch.ones_like(c)) for c in learned.values())


@pytest.mark.slow
def test_the_new_methods_keep_the_laws(copied):
    (laws,) = (words for words in commands("python") if words[:2] == ["-m", "pytest"])
    output = run(copied, *laws, "-v", "-p", "no:cacheprovider", "-p", "no:xdist")
    passed = re.findall(r"::test_(\d+)_\w+\[(?:\w+-)?(scaled-lora|rsdora)\b.*\] PASSED", output)
    of = {name: {int(law) for law, tested in passed if tested == name} for name in NEW}
    assert of == {"scaled-lora": set(range(1, 11)), "rsdora": set(range(1, 10))}  # the tenth has no named rows
    assert "SKIPPED" not in output
    assert "test_every_setting_changes_something_or_is_refused[scaled-lora-c_start] PASSED" in output


def test_a_method_touches_three_files_and_its_pages_come_from_commands(copied):
    touched = [block.partition("\n")[0].removeprefix("# ").partition(", in ")[0] for block in blocks(TEXT, "python")]
    assert set(touched) == {"src/loralab/methods/scaled.py", "src/loralab/recipe.py", "tests/literal.py"}
    run(copied, "docs/tables.py")
    assert all(f"| `{name}` |" in (copied / "docs/methods.md").read_text() for name in NEW)
    assert ["docs/tables.py"] in commands("python")
    assert ["tests/conformance.py"] in commands("python")


def test_the_table_of_methods_is_that_of_the_code():
    tables = runpy.run_path(str(REPO / "docs/tables.py"))
    page = tables["PAGE"].read_text()
    assert tables["written"](page) == page, "run: python docs/tables.py"
