"""Train in forked processes that are killed, or whose disk fails, at an exact file operation; for test_faults.py.

    python faults.py PLANS.json REPORTS.json

A plan holds `runs` (settings, which share passes if there are several) or `study` (the table of a study file) with the
runner that it goes `on`; `fault` (kill, kill at random, or the name of an errno), `points` (how many of all operations
to try, 0 for every one) and `twice` (whether the process that goes on is killed too). The first process is left alone
and counts the operations. For each point a process gets the fault there, or is killed after a random time, then a
process with the same settings has to come to the same tensors, metrics and results. The report counts the faults that
came and lists what is not the same.
"""

import errno
import gc
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loralab import disk
from loralab.errors import UserError
from loralab.run import RunInterrupted, Settings, train_together
from loralab.run.setup import prepare
from loralab.study.bar import StudyBar
from loralab.study.run_study import run_study
from loralab.study.runners import runner
from loralab.study.toml import define

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
REMOVES = ("os.remove", "os.rmdir")  # a full disk still takes these
USER_ERROR = 3  # exit code


class Faults:
    """Counts the file operations of this process below a folder, and does something at the n-th."""

    def __init__(self, root: Path, fault: str, at: int) -> None:
        self.root, self.fault, self.at = str(root), fault, at
        self.done: list[str] = []
        self.quiet = False

    def install(self) -> None:
        sys.addaudithook(self._hook)
        fsync, write_text, save_file = os.fsync, pathlib.Path.write_text, disk.save_file

        def counted_fsync(descriptor):
            self.operation(f"fsync {descriptor}", torn=None)
            fsync(descriptor)

        def counted_write(path, text, *more, **given):
            if self.ours(path):
                self.operation(f"write half of {path}", torn=lambda: write_text(path, text[: len(text) // 2]))
            return write_text(path, text, *more, **given)

        def counted_save(tensors, path, *more, **given):
            def half():
                save_file(tensors, path, *more, **given)
                os.truncate(path, os.path.getsize(path) // 2)

            self.operation(f"save {path}", torn=None, error=SafetensorError)
            self.operation(f"save half of {path}", torn=half, error=SafetensorError)
            save_file(tensors, path, *more, **given)

        os.fsync, pathlib.Path.write_text, disk.save_file = counted_fsync, counted_write, counted_save

    def ours(self, path) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(self.root)

    def _hook(self, event, args) -> None:
        if self.quiet:
            return
        if event == "open" and self.ours(args[0]) and args[2] & WRITES:
            self.operation(f"open {args[0]}")
        elif event in EVENTS and (self.ours(args[0]) or args[-1] not in (-1, None)):  # rmtree names files by descriptor
            self.operation(f"{event} {args[0]}")

    def operation(self, name: str, torn=None, error=None) -> None:
        self.done.append(name)
        here = len(self.done)
        if self.fault == "kill" and here == self.at:
            self.quiet = True
            if torn is not None:
                torn()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault not in ("kill", "none") and here >= self.at and not name.startswith(REMOVES):
            code = getattr(errno, self.fault)
            if error is not None:
                raise error(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
            raise OSError(code, os.strerror(code))


def fork(work, seconds: float | None = None) -> int:
    """The exit code of a child that does some work; negative: it was killed, as after `seconds` if it still works."""
    pid = os.fork()
    if pid == 0:
        try:
            code = work()
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def child(plan: dict, root: Path, fault: str, at: int, notes: Path):
    """The work of a process: train, and write how many operations that took and what errors it came to."""

    def work() -> int:
        faults = Faults(root, fault, at)
        faults.install()
        errors = study(plan, root) if "study" in plan else runs(plan, root)
        faults.quiet = True
        told = [f"{type(e).__name__}: {e}" for e in errors]
        came = fault not in ("kill", "none") and len(faults.done) >= at
        notes.write_text(json.dumps({"operations": faults.done, "errors": told, "came": came}))
        outside = RunInterrupted, OSError
        unexpected = [e for e in errors if not isinstance(e, outside) and "cannot be written" not in str(e)]
        return 4 if unexpected else USER_ERROR if errors else 0

    return work


def runs(plan: dict, root: Path) -> list[UserError]:
    many = [Settings(**run, text=("sentence",), out=root / str(i), resume=True) for i, run in enumerate(plan["runs"])]
    return [outcome for outcome in train_together(many) if isinstance(outcome, UserError)]


def study(plan: dict, root: Path) -> list[Exception]:
    definition = define({**plan["study"], "store": str(root / "store")}, "study", root)
    try:
        done = run_study(definition, root / "study", runner(plan["on"]), StudyBar())
    except (UserError, OSError) as error:  # the command line shows both as one line
        return [error]
    return [UserError(why) for cell in done.cells().values() for why in cell.failed]


def state(root: Path) -> dict:
    """All that runs came to, but for time and memory."""
    found = {}
    for folder in sorted(file.parent for file in root.rglob("result.json")):
        result = json.loads((folder / "result.json").read_text())
        found[f"{folder.name} result"] = {k: v for k, v in result.items() if k not in ("time", "memory")}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[f"{folder.name} metrics"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        for name in ("adapter/adapter.safetensors", "predictions.safetensors"):
            with safe_open(folder / name, "pt") as file:
                found[f"{folder.name} {name}"] = {key: file.get_tensor(key) for key in sorted(file.keys())}
    # the lock that a dead process leaves in a finished run of a study holds nothing, and nobody opens that run again
    files = [p.relative_to(root) for p in root.rglob("*") if not p.match("store/*/.lock")]
    found["files"] = sorted(map(str, files))
    for file in root.glob("study/study.json"):
        found["planned"] = json.loads(file.read_text())["planned"]
    return found


def different(a: dict, b: dict, tolerance: float) -> list[str]:
    """What two states differ in; runs that share passes round otherwise when they share them with others."""
    wrong = [key for key in a.keys() | b.keys() if key not in a or key not in b]
    for key in a.keys() & b.keys():
        if "safetensors" in key:
            same = a[key].keys() == b[key].keys() and all(
                torch.equal(t, b[key][name]) or (tolerance and torch.allclose(t, b[key][name], rtol=0, atol=tolerance))
                for name, t in a[key].items()
            )
        elif tolerance and key.endswith("metrics"):
            same = len(a[key]) == len(b[key])
        elif key.endswith("result"):
            same = not (apart := differences(a[key], b[key], tolerance))
            key = f"{key} ({'; '.join(apart[:3])})"
        else:
            same = a[key] == b[key]
        wrong += [] if same else [key]
    return wrong


def differences(a: object, b: object, tolerance: float, at: str = "") -> list[str]:
    """Where two JSON values differ, numbers that are no counts by more than a tolerance."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], tolerance, f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, x in enumerate(a) for found in differences(x, b[i], tolerance, f"{at}[{i}]")]
    if isinstance(a, float) and isinstance(b, float):
        return [] if abs(a - b) <= tolerance else [f"{at}: {a} {b}"]
    return [] if a == b else [f"{at}: {a!r} {b!r}"]


def campaign(plan: dict, place: Path) -> dict:
    """The report of a plan; `place` is a folder for its runs."""
    place.mkdir()
    fault, notes, kills, came = plan["fault"], place / "notes.json", 0, 0
    whole, started = place / "whole", time.monotonic()
    assert fork(child(plan, whole, "none", 0, notes)) == 0, "the undisturbed run failed"
    seconds = time.monotonic() - started
    operations, expected = json.loads(notes.read_text())["operations"], state(whole)
    count = len(operations)
    few = min(plan["points"] or count, count)
    tried = [1 + i * (count - 1) // max(1, few - 1) for i in range(few)]
    problems, messages = [], set()
    for n in tried:
        root = place / f"cut-{n}"
        name = operations[n - 1].replace(str(whole), "")
        if fault == "kill at random":
            after = random.uniform(0, seconds)
            name = f"after {after:.3f} s"
            kills += fork(child(plan, root, "none", 0, notes), after) == -signal.SIGKILL
        elif fault == "kill":
            code = fork(child(plan, root, fault, n, notes))
            kills += code == -signal.SIGKILL
            if code != -signal.SIGKILL:
                problems.append(f"{n} {name}: exit code {code}, not killed")
        else:
            code = fork(child(plan, root, fault, n, notes))
            note = json.loads(notes.read_text())
            told = note["errors"] if code in (USER_ERROR, 4, 0) else []
            came += note["came"]
            messages.update(text.replace(str(root), "ROOT") for text in told)
            if code not in (0, USER_ERROR) or any("\n" in text for text in told):
                problems.append(f"{n} {name}: exit code {code}, {told}")
            if left := [str(path) for path in root.rglob("*.tmp")]:
                problems.append(f"{n} {name}: {left} left behind")
        if plan.get("twice"):
            kills += fork(child(plan, root, "kill", 1 + n * 7 % count, notes)) == -signal.SIGKILL
        code = fork(child(plan, root, "none", 0, notes))
        if code != 0:
            problems.append(f"{n} {name}: it does not go on: exit code {code}, {notes.read_text()}")
        elif wrong := different(state(root), expected, plan.get("tolerance", 0.0)):
            problems.append(f"{n} {name}: other {', '.join(wrong)}")
        shutil.rmtree(root, ignore_errors=True)
    return {
        "operations": operations, "kills": kills, "faults": came, "problems": problems, "messages": sorted(messages)
    }  # fmt: skip


def main(plans: Path, reports: Path) -> None:
    torch.set_num_threads(1)
    asked = json.loads(plans.read_text())
    first = next(plan["runs"][0] for plan in asked if "runs" in plan)
    prepare(Settings(**first, text=("sentence",)))  # imports what every child needs
    gc.collect()
    gc.freeze()  # else each child copies these objects when it collects its own
    made = [campaign(plan, reports.parent / f"plan-{i}") for i, plan in enumerate(asked)]
    reports.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
