"""Run the programs that once showed a fault, and print what each shows now: `make cases`; docs/cases.md is its output.

    python tests/cases.py [--write docs/cases.md] [FOLDER]

FOLDER, by default shared/cases beside the repository, holds the programs as they were when they showed it. Where it is
not there, nothing is run. Names that have changed since are given to the programs under their old ones.
"""

import argparse
import html
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
CASES = REPO.parent / "shared/cases"
LINES, WIDTH, SECONDS = 4, 400, 1200  # of what a program prints last; how long it may take
OLD_NAMES = """
import runpy, sys, loralab, loralab.fast
loralab.speed = loralab.fast
loralab.Adapters.entry = lambda self, name=None: self.spec(name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BEFORE = {  # case -> what it showed
    "01-tied-all-linear-merge": "all-linear adapted a tied output layer, and merge and Trainer's checkpoint failed",
    "02-tied-head-or-qlora": "a tied weight as target, head or 4-bit base ended in tracebacks or broke the tie",
    "03-ema-stale-eval": "evaluation after weights were swapped through .data answered with the old ones",
    "05-head-in-half": "a head of a float16 model learned in float16, or met an input of another dtype",
    "06-labels-lost-by-merge": "labels of the adapter were lost by merge and load",
    "07-nested-head-roundtrip": "a head inside another module was lost on the way to PEFT and back",
    "08-dotted-folder": "a folder with a dot in its name could not be loaded",
    "11-offloaded-base": "a base offloaded by accelerate was adapted from weights that were not there",
    "12-hooks-dropped": "hooks of an adapted layer no longer ran",
    "14-bnb-only-lm-head": "on a base in 4 bit from bitsandbytes only the output layer was adapted, without a word",
    "16-compiled-first": "a model that was compiled or wrapped first had its head adapted as a layer",
    "17-moe-experts-untold": "experts of a mixture, most of the model, were left out without a word",
    "18-embedding-as-head": "an embedding as a head failed with a traceback at the first forward pass",
    "20-ddp-inactive-adapter": "DistributedDataParallel waited for gradients of adapters that were not active",
    "30-delta-lora-is-lora": "delta-lora trained as plain LoRA in runs shorter than its wait",
    "31-fast-path-loses-gradients": "what was unfrozen after the fast path was put in got no gradient",
    "32-removed-adapter-answers-as-base": "after its adapter was removed, rows were answered by the bare base",
    "33-threads-answer-wrong": "adapters of two threads mixed",
    "34-resume": "--resume of nothing was accepted silently, and went on with other data",
    "35-save-beside-export": "load gave the older of two adapters in a folder; changed bits were not seen",
    "36-saved-by-trainer-is-half-a-base": "save_pretrained wrote a base under names that no model reads",
    "37-merge-of-a-causal-adapter": "merge of a causal adapter wrote a classifier with a random head",
    "38-study-drops-values": "wrong types in a study file were dropped, or ended in tracebacks",
}


def run(case: Path) -> tuple[int, list[str]]:
    """(exit status, what a program printed last)."""
    program = ["sh", str(case)] if case.suffix == ".sh" else [sys.executable, "-c", OLD_NAMES, str(case)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    more |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(REPO / "src")}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                program, cwd=folder, env=os.environ | more, text=True, timeout=SECONDS,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124, [f"still running after {SECONDS} s"]
    lines = [line.strip() for line in done.stdout.splitlines() if line[:1].strip() and "model shards" not in line]
    return done.returncode, [clean(line) for line in lines[-LINES:]]


def clean(line: str) -> str:
    """A line without the folders of this machine, cut short."""
    words = ["…/" + Path(word).name if word.startswith(("/", "'/")) else word for word in line.split(" ")]
    text = " ".join(words)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def row(name: str, code: int, lines: list[str]) -> str:
    said = "<br>".join(f"<code>{html.escape(line, quote=False).replace('|', '¦')}</code>" for line in lines)
    return f"| {name} | {BEFORE.get(name, 'not described here')} | {code} | {said} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=CASES)
    given = parser.parse_args()
    cases = sorted(path for path in given.folder.glob("*") if path.suffix in (".py", ".sh"))
    if not cases:
        print(f"skipped: no programs in {given.folder}")
        return
    table = [
        "# Programs that once showed a fault\n",
        "Each is kept as it was when it showed it, and runs on the code as it is now: `make cases`.\n",
        "| case | what it showed | exit | what it prints now, its last lines |",
        "| --- | --- | ---: | --- |",
    ]
    for case in cases:
        table.append(row(case.stem, *run(case)))
        print(table[-1], flush=True)
    if given.write is not None:
        given.write.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
