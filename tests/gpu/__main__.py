"""What loralab does on a GPU, measured in a few minutes: is it right, is it fast, and how many adapters at once.

    PYTHONPATH=src python3 tests/gpu --out OUT [--seconds 420] [--parts 1234] [--compile] [--toy]

It needs torch, transformers, accelerate and, to compare, peft; no network. Without bitsandbytes the cases in 4 bit are
left out, without liger-kernel its loss, and without minilm and the CoLA of --data the epoch. OUT/gpu.json gets every
number and traceback after each case, OUT/gpu.md the tables that are printed. On a CPU everything has toy size, so
`make gpu-dry` runs every line (docs/benchmarks.md).
"""

import argparse
import importlib.metadata
import itertools
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from laws import METHODS, laws, paged
from models import BF16, DEVICE, FLOAT, GPU, KINDS, TOY, free, timed
from speed import JOBS, LOSSES, SIDES, cola, job, serving, together

from loralab import fast
from loralab.disk import write_json

SHARES = {"1": 0.3, "2": 0.47, "3": 0.13, "4": 0.1}  # of the seconds, by part
FOR_COMPILING = 100  # seconds before the end that the last compiled case may begin


class Report:
    """The record of every case, written after each."""

    def __init__(self, out: Path) -> None:
        self.out, self.began = out, time.time()
        self.records: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)

    def case(
        self, part: str, name: str, until: float, function: Callable[..., dict[str, Any]], *arguments: Any
    ) -> None:
        """Run a case if it begins within `until` seconds of the start, and keep its result or its traceback."""
        began, record = time.time(), {"part": part, "name": name}
        try:
            free()
            late = began - self.began > until
            record |= {"left out": "no time"} if late else function(*arguments)
        except Exception:
            record["error"] = traceback.format_exc()
        self.records.append(record | {"seconds": time.time() - began})
        write_json(self.out / "gpu.json", {"began": self.began, "records": self.records})

    def wrong(self) -> bool:
        """Whether anything failed: a case, a side of one, or a law that does not hold."""
        parts = [[r, *r.get("checks", {}).values(), *r.get("sides", {}).values()] for r in self.records]
        return any("error" in part or part.get("ok") is False for case in parts for part in case)

    def tables(self) -> str:
        """At most 80 lines: relative errors; times and peaks as multiples of the first side's; what failed."""
        right: dict[str, Any] = {}
        times: dict[str, Any] = {}
        first: dict[str, Any] = {}
        bad: list[str] = []
        for r in self.records:
            group, checks, sides = r["name"].partition(", ")[0], r.get("checks", {}), r.get("sides", {})
            for key, check in checks.items():
                right.setdefault(group, {}).setdefault(key, []).append(check)
            for key, c in sides.items():
                if "ms" in c:
                    first.setdefault(group, c)
                times.setdefault(r["part"], {}).setdefault(r["name"], {})[key] = cell(c, first.get(group))
            failed = [(key, c["error"]) for key, c in {"": r, **checks, **sides}.items() if "error" in c]
            bad += [f"{r['name']} {key}: {error.strip().splitlines()[-1][:150]}" for key, error in failed]
        gone = [f"{r['name']}: {r['left out']}" for r in self.records if "left out" in r]
        lines = [str(self.records[0].get("facts")), ""]
        passed = {group: {key: passes(cs) for key, cs in row.items()} for group, row in right.items()}
        lines += grid("passed, worst", passed)
        for rows in times.values():
            lines += ["", *grid("a step, or a batch", rows)]
        lines += ["", f"{time.time() - self.began:.0f} s; left out {len(gone)}: {gone[::8]}; failed {len(bad)}:", *bad]
        return "\n".join(lines[:80])


def cell(side: dict[str, Any], first: dict[str, Any] | None) -> str:
    """Time and peak of one side, and as multiples of the first side's."""
    if "ms" not in side or first is None:
        return "failed"
    size = f"{side['GB']:.2f} GB {side['GB'] / (first['GB'] or 1):.2f}x"
    return f"{side['ms']:.1f} ms {first['ms'] / side['ms']:.2f}x, {size}"


def passes(checks: list[dict[str, Any]]) -> str:
    """How many of the models passed, and the worst relative error."""
    return f"{sum(c['ok'] for c in checks)}/{len(checks)} {max(c.get('value', 1e9) for c in checks):.0e}"


def grid(title: str, rows: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a markdown table."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    body = [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in ([title, *columns], ["---"] * (len(columns) + 1), *body)]


def facts() -> dict[str, Any]:
    """The card, versions, and what the device multiplies a second."""
    found = {str(p.metadata["Name"]).lower(): p.version for p in importlib.metadata.distributions()}
    wanted = [
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "numpy",
        "triton",
        "bitsandbytes",
        "liger_kernel",
    ]
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    card = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() if GPU else "none"
    n = 8192 if GPU else 512
    x = torch.randn(n, n, device=DEVICE, dtype=BF16)
    rate = 2e-12 * n**3 / min(timed(lambda: x @ x, 10) for _ in range(5))
    versions = {name: found.get(name) for name in wanted}
    return {"facts": {"card": card, **versions, "TFLOP/s of a large bf16 product": round(rate, 2)}}


def deadlines(arguments: argparse.Namespace) -> dict[str, float]:
    """Part -> seconds from the start after which none of its cases begins."""
    seconds = arguments.seconds - (FOR_COMPILING if arguments.compile else 0)
    shares = {part: share for part, share in SHARES.items() if part in arguments.parts}
    ends = itertools.accumulate(shares.values())
    return {part: seconds * end / sum(shares.values()) for part, end in zip(shares, ends, strict=True)}


def run_laws(report: Report, until: float) -> None:
    """Part 1."""
    for dtype, method, kind in itertools.product((FLOAT, BF16), METHODS, KINDS):
        report.case("1", f"{method} {str(dtype)[6:]}, {kind}", until, laws, kind, method, dtype)
    for store, method, kind in itertools.product(("nf4", "nf4-dq"), ("lora", "dora"), KINDS):
        report.case("1", f"{method} over {store}, {kind}", until, laws, kind, method, FLOAT, store)
    for kind in KINDS:
        report.case("1", f"qlora, {kind}", until, paged, kind)


def run_steps(report: Report, until: float) -> None:
    """Part 2: full fine-tuning once a shape; the block by force where a model has one."""
    for shape, name in itertools.product(("roberta-base", "llama-1b"), JOBS):
        sides = [side for side in SIDES if side != "full" or "q,v" in name]
        sides = [side for side in sides if side != "block" or shape == "roberta-base"]
        report.case("2", f"{shape}, {name}", until, job, shape, name, sides)
    report.case("2", "llama-1b, lora r16 all, by loss", until, job, "llama-1b", "lora r16 all", LOSSES)


def run_many(report: Report, until: float) -> None:
    """Part 3."""
    report.case("3", "16 runs", until, together, 16, 2 if TOY else 8)
    report.case("3", "32 adapters", until, serving, 32)


def run_epoch(report: Report, until: float, data: Path) -> None:
    """Part 4."""
    report.case("4", "CoLA on minilm, 1000 rows", until, cola, data)


def run_compiled(report: Report, until: float) -> None:
    """Steps through torch.compile; a toy has all but the generated code, which takes a minute to make."""
    if TOY:
        fast.COMPILER = "aot_eager"
    for shape in ("roberta-base", "llama-1b"):
        report.case("5", f"{shape}, compiled", until, job, shape, "lora r16 all", ["held", "fast", "compile"])


def main() -> int:
    """Run the parts that were asked for; 1 where anything failed."""
    arguments = parsed()
    hf.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("highest")  # no TF32
    report = Report(Path(arguments.out))
    report.case("0", "facts", arguments.seconds, facts)
    for part, until in deadlines(arguments).items():
        parts: dict[str, Callable[[Report, float], None]] = {
            "1": run_laws,
            "2": run_steps,
            "3": run_many,
            "4": partial(run_epoch, data=Path(arguments.data)),
        }
        parts[part](report, until)
    if arguments.compile:
        run_compiled(report, arguments.seconds - FOR_COMPILING)
    (report.out / "gpu.md").write_text(report.tables() + "\n")
    print(report.tables())
    return int(report.wrong())


def parsed() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=".", help="folder of gpu.json and gpu.md")
    last = float("inf") if TOY else 420.0
    parser.add_argument(
        "--seconds", type=float, default=last, help="no case begins later; 420, and without end for a toy"
    )
    parser.add_argument("--parts", default="1234", help="1 is it right, 2 steps, 3 how many at once, 4 an epoch")
    parser.add_argument(
        "--data", default=".whl/pack/glue", help="folder with the GLUE tasks, of which the epoch takes CoLA"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too, last; it takes a minute a model")
    parser.add_argument("--toy", action="store_true", help="every line, at the sizes that a CPU gets")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
