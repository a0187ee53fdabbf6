"""The reliability campaign: `make reliability` runs the long forms of the fault, file, edit and label tests.

Every test named here has a short form in `make test`; LORALAB_CAMPAIGN makes it long. The table of kinds, tests, passes
and seconds goes to stdout and, with --out, into a page.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
KINDS = {  # what is promised -> (file of tests, how many times its short form)
    "a run goes on after any kill, a full disk, a folder taken away": ("test_faults.py", 4),
    "a folder is read whole or refused; nothing hostile runs": ("test_hostile.py", 30),
    "nothing answers otherwise than the model at hand": ("test_silent.py", 1),
    "a label is the same text in every format": ("test_labels.py", 10),
    "a study file with a wrong type is one line": ("test_study_file.py", 10),
    "one bad run does not end a study": ("test_study.py", 1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown page to write")
    arguments = parser.parse_args()
    rows, failed = [], 0
    for promise, (file, times) in KINDS.items():
        print(f"{file}: {promise} ...", file=sys.stderr, flush=True)
        passed, bad, skipped, seconds = run(file, times)
        failed += bad
        rows.append(f"| {promise} | `{file}` x {times} | {passed} | {bad} | {skipped} | {seconds:.0f} |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    heads = "| promise | tests | passed | failed | skipped | seconds |\n| --- | --- | ---: | ---: | ---: | ---: |"
    page = f"# Reliability\n\n`make reliability`, on {machine}.\n\n" + "\n".join([heads, *rows]) + "\n"
    print(page)
    if arguments.out is not None:
        arguments.out.write_text(page)
    return 1 if failed else 0


def run(file: str, times: int) -> tuple[int, int, int, float]:
    """(passed, failed, skipped, seconds) of a file of tests in its long form."""
    with TemporaryDirectory() as folder:
        report, started = Path(folder) / "report.xml", time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*command, str(HERE / file)], env=os.environ | {"LORALAB_CAMPAIGN": str(times)}, check=False)
        (suite,) = ET.parse(report).getroot().iter("testsuite")
        count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        bad = count["failures"] + count["errors"]
        return count["tests"] - bad - count["skipped"], bad, count["skipped"], time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
