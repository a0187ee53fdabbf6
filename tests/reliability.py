"""The reliability campaign: `make reliability` runs the long forms of these tests and writes docs/reliability.md.

Each test has a short form in `make test`; LORALAB_CAMPAIGN makes it long. The tests count what they try (`tally` in
conftest.py), and this program adds that up over all jobs, of which several run at a time; Ray, which takes a slow start
for a dead node, comes first and alone. A promise is kept if nothing failed and enough was tried.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

HERE = Path(__file__).parent
LIMIT = 40 * 60  # seconds of a job: one that hangs has failed


class Promise(NamedTuple):
    promise: str
    how: str
    least: int  # how many make a campaign


PROMISES = {  # what the tests count -> the promise
    "kills": Promise(
        "A run or study that is killed goes on with the same command to the same bits",
        "SIGKILL before exact file operations (every one of a run with LoRA), in the middle of writes and at random "
        "times: eight methods alone, some killed twice; three runs in one pass; a study in turn and in passes. "
        "Compared: adapters, predictions, metrics, results, file names. Runs in one pass come to the same within 1e-5, "
        "since a resumed one may share its steps with fewer others",
        100,
    ),
    "file faults": Promise(
        "A full or read-only disk, or a folder that is taken away, is one line, leaves nothing half-written, and the "
        "same command goes on",
        "ENOSPC, EROFS and EIO before file operations of eight methods alone, of three runs in one pass and of a "
        "study; a real file system of 64 kB; a run folder that is removed, and made anew by another, in the middle",
        100,
    ),
    "mutated files": Promise(
        "A damaged or forged file is one UserError or reads as what it was, with the model untouched",
        "Bytes flipped, cut, inserted, exchanged; JSON and TOML changed in structure; headers of safetensors forged: "
        "adapter folders of 14 methods, of PEFT and of 0.1.0, run folders, checkpoints, studies and their files, data "
        "and results as CSV, TSV, JSON, JSONL and parquet. Within 4 GiB of address space and 20 seconds each",
        10_000,
    ),
    "edits": Promise(
        "A cached update never answers stale",
        "Eight ways to change a tensor, some behind torch's back, of every factor, of weight, bias, norm and head, on "
        "the plain and the fast path; the right answer comes from a model that is built anew",
        150,
    ),
    "label files": Promise(
        "A text and a label are the same in every format, there and back",
        "Labels that look like numbers, dates, missing values or other labels, in CSV, TSV, JSON, JSONL and parquet: "
        "train, validation and predictions name the same texts",
        60,
    ),
    "answers of threads": Promise(
        "Threads use adapters of one model at once, each its own",
        "16 threads, 16 adapters of LoRA and DoRA: their own, a mixed batch and the default, with and without caching, "
        "on the plain and the fast path",
        1_000,
    ),
    "workers and nodes": Promise(
        "A study on Ray outlives its workers and nodes and comes to the bits of an undisturbed one",
        "SIGKILL to workers in the middle of their runs; one of two nodes is lost with the runs on it",
        2,
    ),
    "training steps": Promise(
        "Memory, file descriptors and threads stay flat while a run trains",
        "One run; measured are resident memory, Python objects, descriptors and threads in its second half",
        10_000,
    ),
    "adapters added and removed": Promise(
        "Memory, file descriptors and threads stay flat while adapters come and go",
        "Adapters of several methods, loaded or new, answer, learn, are saved and removed",
        1_000,
    ),
}
JOBS = [  # (tests, how many times their short form), those that take longest first
    ("test_faults.py", 1),
    ("test_endurance.py", 1),
    ("test_hostile_files.py", 6),
    ("test_hostile.py", 10),
    ("test_labels.py", 1),
    ("test_silent.py -k stale_value", 1),
    ("test_threads.py -k threads_use", 4),
    ("test_study_file.py -k wrong_types", 4),
    ("test_study.py -k exception", 1),
]
ALONE = [("test_ray_faults.py", 1)]  # a slow start is taken there for a dead node


class Outcome(NamedTuple):
    """What came of a job."""

    counts: Counter[str]  # what was tried, and "... failed"
    seconds: Counter[str]  # of the tests that count each kind
    passed: int
    failed: int
    skipped: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs/reliability.md", help="the page to write")
    parser.add_argument("--at-once", type=int, default=2, help="how many files of tests run at a time")
    arguments = parser.parse_args()
    started = time.monotonic()
    outcomes = [run(*job) for job in ALONE]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        outcomes += pool.map(lambda job: run(*job), JOBS)
    page, kept = written(outcomes, time.monotonic() - started, arguments.at_once)
    print(page)
    arguments.out.write_text(page)
    return 0 if kept else 1


def written(outcomes: Sequence[Outcome], seconds: float, at_once: int) -> tuple[str, bool]:
    """The page, and whether every promise was kept."""
    counts = sum((o.counts for o in outcomes), Counter())
    taken = sum((o.seconds for o in outcomes), Counter())
    passed, failed, skipped = (sum(column) for column in zip(*(o[2:] for o in outcomes), strict=True))
    rows = [
        f"| {p.promise} | {p.how} | {counts[kind]:,} {kind} | {counts[f'{kind} failed']:,} | {taken[kind]:,.0f} |"
        for kind, p in PROMISES.items()
    ]
    few = [f"{kind}: {counts[kind]:,} of {p.least:,}" for kind, p in PROMISES.items() if counts[kind] < p.least]
    kept = not few and not failed and not any(counts[f"{kind} failed"] for kind in PROMISES)
    verdict = "All promises were kept." if kept else "**Not all promises were kept.**"
    verdict += f" Too few were tried: {'; '.join(few)}." if few else ""
    page = f"""# Reliability

`make reliability` runs the long forms of these tests and writes this page. Each has a short form in `make test`, or in
`make test-all` where it kills workers of Ray. A kill, a file or an edit is counted when it was really tried.

Machine: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}. In all
{seconds / 60:.0f} minutes, {at_once} files of tests at a time (Ray's alone).

{passed} tests passed, {failed} failed, {skipped} were skipped. {verdict}

| promise | how it is tested | tried | failed | seconds |
| --- | --- | ---: | ---: | ---: |
"""
    return page + "\n".join(rows) + "\n", kept


def run(tests: str, times: int) -> Outcome:
    """Run a file of tests, or some of its tests, in their long form."""
    file, *options = tests.split(maxsplit=2)
    print(f"{tests} x {times} ...", file=sys.stderr, flush=True)
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", str(HERE / file), *options]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}", f"--basetemp={folder}/tmp"]
        environment = os.environ | {"LORALAB_CAMPAIGN": str(times)}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            print(f"{tests}: not done after {LIMIT} seconds", file=sys.stderr)
            return Outcome(Counter(), Counter(), 0, 1, 0)
        outcome = read(report)
        if done.returncode:
            print(f"{tests}: {done.stdout[-8000:]}{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return outcome._replace(failed=max(outcome.failed, int(done.returncode != 0)))


def read(report: Path) -> Outcome:
    """The counts of a JUnit report; a test that fails has failed in one thing at least."""
    counts, seconds, ends = Counter[str](), Counter[str](), Counter[str]()
    for case in ET.parse(report).iter("testcase") if report.is_file() else ():
        end = next((e.tag for e in case if e.tag in ("failure", "error", "skipped")), "passed")
        ends["failed" if end in ("failure", "error") else end] += 1
        found = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}  # hypothesis has some too
        for kind in [kind for kind in PROMISES if kind in found]:
            failed = int(found[f"{kind} failed"])
            counts[kind] += int(found[kind])
            counts[f"{kind} failed"] += max(failed, 1) if end in ("failure", "error") else failed
            seconds[kind] += float(case.get("time", 0))
    return Outcome(counts, seconds, ends["passed"], ends["failed"], ends["skipped"])


if __name__ == "__main__":
    sys.exit(main())
