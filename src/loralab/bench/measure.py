"""Runs both backends in alternating turns and puts together what they measure."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

from loralab.bench.cases import Case, EpochCase, MixedCase
from loralab.errors import UserError

NAMES = ("peft", "loralab")
TURN = 0.6  # seconds that the slower backend measures before the other's turn, in at most MOST steps
MOST = 10
WARM = 2  # steps before the first turn
INSTALL = "pip install 'peft==0.21.*'"
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of `n` values."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    n: int


def quartiles(values: Sequence[float]) -> Quartiles:
    """Median and quartiles, interpolated linearly between two values."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(middle, low, high, len(values))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Quartiles:
    """Quartiles of theirs / ours, turn by turn: neighbours in time share what else the machine does."""
    return quartiles([a / b for a, b in zip(theirs, ours, strict=True)])


# ---- processes -------------------------------------------------------------------------------------------------------


class WorkerProcess:
    """The process of a backend (worker.py), started at once; `ask` sends a request and waits for the answer."""

    def __init__(self, backend: str, threads: int | None = None) -> None:
        self.backend = backend
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        waits = {"ACTIVE": "PASSIVE"}  # idle threads of one process must not spin through the turn of the other
        policy = os.environ.get("OMP_WAIT_POLICY")
        env = QUIET | os.environ | ({} if policy is None else {"OMP_WAIT_POLICY": waits.get(policy.upper(), policy)})
        command = [sys.executable, "-m", "loralab.bench.worker", backend, str(threads or 0)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, bufsize=1, env=env
        )

    def ask(self, request: str, **arguments: Any) -> Any:
        """The answer of the worker's method of that name. Raises UserError if it raised one, or if it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": request, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"the process of {self.backend} ended at {request!r}: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply["answer"]

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.process.poll()}, out of memory perhaps"

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@contextmanager
def workers(*backends: str, threads: int | None) -> Iterator[list[WorkerProcess]]:
    """Processes that end with the block, whatever happens in it."""
    started = [WorkerProcess(backend, threads) for backend in backends]
    try:
        yield started
    finally:
        for worker in started:
            worker.stop()


# ---- measurements ----------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One bench; `done` is called after each turn, for a progress bar."""

    repeats: int = 7
    threads: int | None = None
    done: Callable[[], None] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)  # dtype -> operations a second, one a turn

    def __post_init__(self) -> None:
        if find_spec("peft") is None:
            raise UserError(f"bench compares with PEFT, which is not installed: {INSTALL}")
        for flag, number in (("--repeats", self.repeats), ("--threads", self.threads)):
            if number is not None and number < 1:
                raise UserError(f"{flag} {number}: expected 1 or more")

    def steps(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Time, memory and products of a step of each case."""
        with workers("loralab", threads=self.threads) as (third,):  # holds no model; takes the machine's rate
            return [self._step(case, third) for case in cases]

    def _step(self, case: Case, third: WorkerProcess) -> dict[str, Any]:
        settings, dtype = case.to_json(), str(case.precision).removeprefix("torch.")
        with workers(*NAMES, threads=self.threads) as started:
            pair = dict(zip(NAMES, started, strict=True))
            for worker in pair.values():  # one after the other, so that a machine with little memory can
                self._ask_facts(worker)
            built = {name: worker.ask("build", case=settings) for name, worker in pair.items()}
            warm = {name: worker.ask("steps", untimed=0, timed=WARM) for name, worker in pair.items()}
            counts = turn(max(min(seconds) for seconds in warm.values()))
            times: dict[str, list[float]] = {name: [] for name in NAMES}
            rates = []
            for name in self._turns():
                times[name].append(median(pair[name].ask("steps", **counts)))
                if len(times["peft"]) == len(times["loralab"]):  # after both
                    rates.append(third.ask("rate", dtype=dtype))
                    self.done()
            memory = {name: worker.ask("memory") for name, worker in pair.items()}
            operations = pair["loralab"].ask("flops", case=settings)
        self.rates.setdefault(dtype, []).extend(rates)
        return {
            "case": settings,
            "seconds": _by_turn(times),
            "faster": asdict(ratio(times["peft"], times["loralab"])),
            "memory": memory,
            "memory_ratio": {key: memory["loralab"][key] / memory["peft"][key] for key in memory["peft"]},
            "trainable": {name: answer["trainable"] for name, answer in built.items()},
            "operations": operations,
            "rate": median(rates),
            "fraction": {name: operations / median(times[name]) / median(rates) for name in NAMES},
            "choices": built["loralab"]["choices"],
        }

    def epochs(self, cases: Sequence[EpochCase]) -> list[dict[str, Any]]:
        """Rows a second of each task, every epoch in a fresh process."""
        return [self._epoch(case) for case in cases]

    def _epoch(self, case: EpochCase) -> dict[str, Any]:
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
        for name in self._turns():
            with workers(name, threads=self.threads) as (worker,):
                self._ask_facts(worker)
                measured[name].append(worker.ask("epoch", case=case.to_json()))
            self.done()
        speeds = {name: [one["rows"] / one["seconds"] for one in measured[name]] for name in NAMES}
        peaks = {name: median(one["peak"] for one in measured[name]) for name in NAMES}
        return {
            "case": case.to_json(),
            "rows": {name: measured[name][0]["rows"] for name in NAMES},
            "rows_per_s": _by_turn(speeds),
            "faster": asdict(ratio(speeds["loralab"], speeds["peft"])),
            "memory": {name: {"peak": peaks[name]} for name in NAMES},
            "memory_ratio": {"peak": peaks["loralab"] / peaks["peft"]},
        }

    def mixed(self, case: MixedCase) -> dict[str, Any]:
        """Seconds of a batch whose rows have an adapter each, beside one merged adapter and PEFT (mixed.py)."""
        with workers("peft", threads=self.threads) as (worker,):
            self._ask_facts(worker)
            found = worker.ask("mixed", case=case.to_json(), repeats=self.repeats)
        self.done()
        return {"case": case.to_json(), **found}

    def profile(self, case: Case) -> dict[str, Any]:
        """The operations that take most of a step's time, by torch's profiler."""
        profiles = {}
        for name in NAMES:
            with workers(name, threads=self.threads) as (worker,):
                self._ask_facts(worker)
                profiles[name] = worker.ask("profile", case=case.to_json())
            self.done()
        return {"case": case.to_json(), "backends": profiles}

    def roofline(self, case: Case) -> dict[str, Any]:
        """What the products of a step take one by one, beside the step of loralab."""
        with workers("loralab", threads=self.threads) as (worker,):
            self._ask_facts(worker)
            found = worker.ask("roofline", case=case.to_json())
        self.done()
        return {"case": case.to_json(), **found}

    def _turns(self) -> Iterator[str]:
        """Names of backends, each as often as repeats; who begins alternates."""
        for i in range(self.repeats):
            yield from NAMES if i % 2 == 0 else reversed(NAMES)

    def _ask_facts(self, worker: WorkerProcess) -> None:
        """Machine and versions, from the processes that measure; the answer also says that the imports are done."""
        self.facts = {key: self.facts.get(key, {}) | value for key, value in worker.ask("facts").items()}


def _by_turn(values: Mapping[str, list[float]]) -> dict[str, Any]:
    """Quartiles of each backend, and every turn."""
    return {name: asdict(quartiles(values[name])) | {"turns": values[name]} for name in NAMES}


def turn(step: float) -> dict[str, int]:
    """Steps of a turn where one step takes that many seconds; an untimed one fills the caches before short ones."""
    timed = max(1, min(MOST, math.ceil(TURN / step)))
    return {"untimed": int(timed > 1), "timed": timed}
