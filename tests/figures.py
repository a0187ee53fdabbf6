"""The commands behind docs/benchmarks.md, one after another: `make figures` on a machine that does nothing else.

    python tests/figures.py [--data DIR] [--out runs/figures] [--only NAME ...]

OUT/NAME.md gets what a command printed, OUT/figures.md all of it with the commands. What is there already is not
measured again, so the same command goes on after a stop. --list names the parts.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

MPNET, SMOLLM2 = "--models mpnet", "--learns text --models smollm2 --lengths 256 --batch-size 4 --methods lora"
EPOCH = "--epoch --data {data} --rows 1024 --repeats 2"
OWN = "--allocator own"
STEPS = {  # part -> flags of `loralab bench`: the aims first
    "mpnet-qv": f"{MPNET} --methods lora --targets attention-qv --repeats 5",
    "mpnet": f"{MPNET} --methods lora dora --repeats 3",
    "smollm2": f"{SMOLLM2} --repeats 5",
    "cola": f"{EPOCH} --tasks cola --methods lora --together 1 16",
    "mixed": "--mixed --targets attention-qv",
    "roofline-mpnet": f"--roofline {MPNET} --methods lora --repeats 3",
    "roofline-smollm2": f"--roofline {SMOLLM2} --repeats 3",
    "against-full": f"{EPOCH} --tasks cola mrpc --methods lora full",
    "own-mpnet-qv": f"{MPNET} --methods lora --targets attention-qv --repeats 7 {OWN}",
    "own-mpnet": f"{MPNET} --methods lora dora vera lora-fa qlora full --repeats 3 {OWN}",
    "own-smollm2": f"{SMOLLM2} --repeats 5 {OWN}",
    "own-cola": f"{EPOCH} --tasks cola --methods lora --together 1 16 {OWN}",
    "float32-mpnet-qv": f"{MPNET} --methods lora --targets attention-qv --dtypes float32 --repeats 3",
    "lengths": "--models minilm --methods lora dora full --lengths 16 64 128 --repeats 3",
}
COMMANDS = {
    **{part: f"-m loralab bench {flags} --markdown --out {{out}}/bench" for part, flags in STEPS.items()},
    "one-line": "studies/one_line.py --data {data} --repeats 2",
    "latency": "studies/latency.py",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/glue"), help="folder with the GLUE tasks")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"))
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for number, part in enumerate(given.only, 1):
        command = COMMANDS[part].format(data=given.data, out=given.out)
        if given.list:
            print(f"{part:20} python {command}")
            continue
        failed += not measured(f"{number} of {len(given.only)}, {part}", command, given.out / f"{part}.md")
    if not given.list:
        parts = [(part, given.out / f"{part}.md") for part in COMMANDS]
        text = [
            f"## {part}\n\n`python {COMMANDS[part]}`\n\n{path.read_text()}" for part, path in parts if path.is_file()
        ]
        (given.out / "figures.md").write_text("\n".join(text))
        print(f"{given.out / 'figures.md'}: {len(text)} of {len(COMMANDS)} parts, {failed} failed")
    return int(failed > 0)


def measured(name: str, command: str, path: Path) -> bool:
    """Run a command unless its output is there; whether it is there now."""
    if path.is_file():
        print(f"{name}: was measured")
        return True
    began = time.monotonic()
    print(f"{name}: {command}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        path.write_text(done.stdout)
    print(f"{name}: exit {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
