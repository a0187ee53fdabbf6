"""The process of one side: it builds a model and does what each line of its stdin asks, one line of JSON back.

Between two lines it is blocked in a read, so it takes no part of the machine while the other side measures.
"""

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer  # noqa: F401  (not counted later)

import loralab
from loralab.bench import epoch, products
from loralab.bench.cases import Case, EpochCase
from loralab.bench.sides import SIDES, adapted, batch, stepper
from loralab.errors import UserError
from loralab.fast.machine import hardware, rate, units
from loralab.run.memory import Peak


class Side:
    """What one process holds between two requests."""

    def __init__(self, side: str, threads: int | None) -> None:
        self.side = side
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.peak = Peak()  # from here on: what the imports took is left out
        self.training: Peak | None = None
        self.before_training = 0
        self.step: Callable[[], None] | None = None

    def facts(self) -> dict[str, Any]:
        """Machine and versions."""
        versions = {"loralab": loralab.__version__, "torch": torch.__version__, "python": platform.python_version()}
        versions["transformers"] = transformers.__version__
        if self.side == "peft":
            import peft

            versions["peft"] = peft.__version__
        return {"machine": {"name": cpu_name(), **hardware(), **units()}, "versions": versions}

    def build(self, case: dict[str, Any]) -> dict[str, Any]:
        c = Case(**case)
        built = SIDES[self.side](c)
        self.step = stepper(built, *batch(c, built.model.config))
        gc.collect()
        self.before_training, self.training = self.peak.bytes, Peak()
        return {
            "trainable": sum(p.numel() for p in built.learned),
            "choices": [vars(choice) for choice in built.choices],
        }

    def steps(self, untimed: int, timed: int) -> list[float]:
        """Seconds of each timed step."""
        assert self.step is not None
        seconds = []
        for i in range(untimed + timed):
            started = time.perf_counter()
            self.step()
            if i >= untimed:
                seconds.append(time.perf_counter() - started)
        return seconds

    def memory(self) -> dict[str, int]:
        """Bytes above what the imports take: the peak of all, loading included, and that of training alone."""
        assert self.training is not None
        training = self.training.bytes + self.training.before - self.peak.before
        return {"peak": max(self.before_training, training), "training": training}

    def products(self, case: dict[str, Any]) -> int:
        """Operations of a step; of a model of its own, without the fast path, so it is asked for last."""
        c = Case(**case)
        adapters = adapted(c)
        return products.needed(adapters, batch(c, adapters.model.config)[0])

    def rate(self, dtype: str) -> float:
        return rate(getattr(torch, dtype))

    def epoch(self, case: dict[str, Any]) -> dict[str, Any]:
        """A whole epoch; its peak includes loading."""
        rows, seconds = epoch.SIDES[self.side](EpochCase(**case))
        return {"rows": rows, "seconds": seconds, "peak": self.peak.bytes}


DOES = ("facts", "build", "steps", "memory", "products", "rate", "epoch")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def serve(side: Side, requests: TextIO, answers: TextIO) -> None:
    """Answers each line {"do": ..., ...} with {"answer": ...} or, for a user's error, {"error": ...}."""
    for line in requests:
        given = json.loads(line)
        do = given.pop("do")
        assert do in DOES
        try:
            told = {"answer": getattr(side, do)(**given)}
        except UserError as error:
            told = {"error": str(error)}
        print(json.dumps(told), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    side, threads = sys.argv[1:]
    if side == "peft":
        import peft  # noqa: F401  (not counted later)
    from loralab.cli import _quiet

    _quiet()
    serve(Side(side, int(threads) or None), sys.stdin, answers)


if __name__ == "__main__":
    main()
