"""Runs the two sides in turn and puts together what they tell."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

from loralab.bench.cases import Case, EpochCase
from loralab.bench.spread import ratio, spread
from loralab.bench.told import SIDES
from loralab.errors import UserError

TURN = 0.6  # seconds that the slower side measures before the other's turn, and no more than MOST steps
MOST = 10
WARM = 2  # steps before the first turn
INSTALL = "pip install 'peft==0.21.*'"


class Worker:
    """A side's process, started at once; `ask` waits for its answer."""

    def __init__(self, side: str, threads: int | None = None) -> None:
        self.side = side
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        waits = {"ACTIVE": "PASSIVE"}  # idle threads of one side must not spin through the turn of the other
        policy = os.environ.get("OMP_WAIT_POLICY")
        env = os.environ | ({} if policy is None else {"OMP_WAIT_POLICY": waits.get(policy.upper(), policy)})
        command = [sys.executable, "-m", "loralab.bench.worker", side, str(threads or 0)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, bufsize=1, env=env
        )

    def ask(self, do: str, **given: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **given}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"the process of {self.side} ended at {do!r}: {self._last_words()}")
        told = json.loads(line)
        if "error" in told:
            raise UserError(told["error"])
        return told["answer"]

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.process.poll()}, out of memory perhaps"

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@contextmanager
def workers(*sides: str, threads: int | None) -> Iterator[list[Worker]]:
    """Processes that end with the block, whatever happens in it."""
    started = [Worker(side, threads) for side in sides]
    try:
        yield started
    finally:
        for worker in started:
            worker.stop()


@dataclass
class Bench:
    """One run: `done` is called after each turn, for a bar."""

    repeats: int = 7
    threads: int | None = None
    done: Callable[[], None] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)  # dtype -> operations a second, one a turn

    def __post_init__(self) -> None:
        if find_spec("peft") is None:
            raise UserError(f"bench compares with PEFT, which is not installed: {INSTALL}")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats}: expected 1 or more")

    def steps(self, cases: list[Case]) -> list[dict[str, Any]]:
        """Time, memory and products of a step of each case."""
        with workers("loralab", threads=self.threads) as (third,):  # holds no model; takes the machine's rate
            return [self._case(case, third) for case in cases]

    def _case(self, case: Case, third: Worker) -> dict[str, Any]:
        with workers(*SIDES, threads=self.threads) as pair:
            sides = dict(zip(SIDES, pair, strict=True))
            for side in SIDES:  # one after the other, so that a machine with little memory can
                self._know(sides[side])
            built = {side: worker.ask("build", case=asdict(case)) for side, worker in sides.items()}
            warm = {side: worker.ask("steps", untimed=0, timed=WARM) for side, worker in sides.items()}
            plan = turn(max(min(seconds) for seconds in warm.values()))
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            rates = self.rates.setdefault(case.dtype, [])
            mine = []
            for i in range(self.repeats):
                for side in SIDES if i % 2 == 0 else reversed(SIDES):
                    times[side].append(median(sides[side].ask("steps", **plan)))
                mine.append(third.ask("rate", dtype=case.dtype))
                self.done()
            memory = {side: worker.ask("memory") for side, worker in sides.items()}
            operations = sides["loralab"].ask("products", case=asdict(case))
        rates += mine
        return {
            "case": asdict(case),
            "seconds": {side: asdict(spread(times[side])) | {"turns": times[side]} for side in SIDES},
            "faster": asdict(ratio(times["peft"], times["loralab"])),
            "memory": memory,
            "memory_ratio": {key: memory["loralab"][key] / memory["peft"][key] for key in memory["peft"]},
            "trainable": {side: told["trainable"] for side, told in built.items()},
            "operations": operations,
            "rate": median(mine),
            "fraction": {side: operations / median(times[side]) / median(mine) for side in SIDES},
            "choices": built["loralab"]["choices"],
        }

    def epochs(self, cases: list[EpochCase]) -> list[dict[str, Any]]:
        """Rows a second of each task, every epoch in a fresh process."""
        return [self._epoch(case) for case in cases]

    def _epoch(self, case: EpochCase) -> dict[str, Any]:
        told: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for i in range(self.repeats):
            for side in SIDES if i % 2 == 0 else reversed(SIDES):
                with workers(side, threads=self.threads) as (worker,):
                    self._know(worker)
                    told[side].append(worker.ask("epoch", case=asdict(case)))
                self.done()
        speeds = {side: [one["rows"] / one["seconds"] for one in told[side]] for side in SIDES}
        peaks = {side: median(one["peak"] for one in told[side]) for side in SIDES}
        return {
            "case": asdict(case),
            "rows": {side: told[side][0]["rows"] for side in SIDES},
            "rows_per_s": {side: asdict(spread(speeds[side])) | {"turns": speeds[side]} for side in SIDES},
            "faster": asdict(ratio(speeds["loralab"], speeds["peft"])),
            "memory": {side: {"peak": peaks[side]} for side in SIDES},
            "memory_ratio": {"peak": peaks["loralab"] / peaks["peft"]},
        }

    def _know(self, worker: Worker) -> None:
        """Machine and versions, from the processes that measure; the answer also says that its imports are done."""
        told = worker.ask("facts")
        self.facts = {key: self.facts.get(key, {}) | value for key, value in told.items()}


def turn(step: float) -> dict[str, int]:
    """How many steps a turn has when one takes that long; before short ones comes one that fills the caches again."""
    timed = max(1, min(MOST, math.ceil(TURN / step)))
    return {"untimed": int(timed > 1), "timed": timed}
