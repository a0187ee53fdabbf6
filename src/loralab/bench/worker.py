"""The process of one backend: it builds a model and does what each line of its stdin asks, one line of JSON back.

Between two lines it is blocked in a read, so it takes no part of the machine while the other process measures.
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
from loralab.bench import mixed, profile, roofline
from loralab.bench.backends import BACKENDS, adapted, batch, stepper
from loralab.bench.cases import Case, EpochCase, MixedCase, from_json
from loralab.bench.epoch import EPOCHS
from loralab.bench.flops import step_flops
from loralab.errors import UserError
from loralab.fast.machine import hardware, rate, units
from loralab.run.memory import Peak

REQUESTS = (  # methods of Worker
    "facts", "build", "steps", "memory", "flops", "rate", "epoch", "mixed", "profile", "roofline",
)  # fmt: skip
Json = dict[str, Any]


class Worker:
    """What one process holds between two requests. The methods answer in what JSON can hold."""

    def __init__(self, backend: str, threads: int | None) -> None:
        self.backend = backend
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.peak = Peak()  # from here on: what the imports took is left out
        self.training: Peak | None = None
        self.before_training = 0
        self.step: Callable[[], None] | None = None

    def facts(self) -> Json:
        """Machine and versions."""
        versions = {"loralab": loralab.__version__, "torch": torch.__version__, "python": platform.python_version()}
        versions["transformers"] = transformers.__version__
        if self.backend == "peft":
            import peft

            versions["peft"] = peft.__version__
        return {"machine": {"name": cpu_name(), **hardware(), **units()}, "versions": versions}

    def build(self, case: Json) -> Json:
        """Build the model of a case; the requests after it are about that model."""
        c = from_json(Case, case)
        built = BACKENDS[self.backend](c)
        self.step = stepper(built, *batch(c, built.model.config))
        gc.collect()
        self.before_training, self.training = self.peak.bytes, Peak()
        return {
            "trainable": sum(p.numel() for p in built.trainable),
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

    def flops(self, case: Json) -> int:
        """Operations that a step needs. Asked for last, as it makes a model of its own without the fast path."""
        c = from_json(Case, case)
        adapters = adapted(c)
        return step_flops(adapters, batch(c, adapters.model.config)[0])

    def rate(self, dtype: str) -> float:
        """Operations a second of a large product."""
        return rate(getattr(torch, dtype))

    def epoch(self, case: Json) -> Json:
        """A whole epoch; its peak includes loading."""
        rows, seconds = EPOCHS[self.backend](from_json(EpochCase, case))
        return {"rows": rows, "seconds": seconds, "peak": self.peak.bytes}

    def mixed(self, case: Json, repeats: int) -> Json:
        """Batches whose rows have an adapter each; PEFT's too, whichever backend this is."""
        return mixed.measure(from_json(MixedCase, case), repeats)

    def profile(self, case: Json) -> Json:
        """The operations that take most of a step."""
        return profile.measure(self.backend, from_json(Case, case))

    def roofline(self, case: Json) -> Json:
        """What the products of a step take one by one, beside the step."""
        return roofline.measure(from_json(Case, case))


def cpu_name() -> str:
    """The processor's name where Linux tells it, else the machine type."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answer each line {"do": ..., ...} with {"answer": ...} or, for a user's error, {"error": ...}."""
    for line in requests:
        arguments = json.loads(line)
        request = arguments.pop("do")
        assert request in REQUESTS
        try:
            reply = {"answer": getattr(worker, request)(**arguments)}
        except UserError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=answers, flush=True)


def main() -> None:
    """Serve until stdin ends; arguments are the backend and the number of threads, 0 for torch's own choice."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    backend, threads = sys.argv[1:]
    if backend == "peft":
        import peft  # noqa: F401  (not counted later)
    serve(Worker(backend, int(threads) or None), sys.stdin, answers)


if __name__ == "__main__":
    main()
