"""Studies on a machine with a GPU that is there for minutes: one after another until the time is up, and packed.

    PYTHONPATH=src python3 tests/gpu/studies.py OUT STUDY.toml ... [--data DIR] [--seconds 500] [--processes 15]

What an earlier day left (studies/unfinished/*.tgz) is unpacked into OUT first, and OUT/NAME.tgz holds each study that
was touched, with its part of the store: put those that are not done back into studies/unfinished. The same command goes
on. Where NVIDIA's MPS is there it is started, since a step of a small model leaves a card idle.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
LEFT_OUT = ("adapter", "checkpoint", ".lock")  # of a run's folder: a run that is not done starts anew
FOR_PACKING = 15  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the store, the studies and what is packed")
    parser.add_argument("studies", type=Path, nargs="+", help="files of studies, in order")
    parser.add_argument("--data", type=Path, required=True, help="folder with the GLUE tasks")
    parser.add_argument("--seconds", type=float, default=500, help="in all")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    given = parser.parse_args()
    until = time.monotonic() + given.seconds - FOR_PACKING
    given.out.mkdir(parents=True, exist_ok=True)
    for left in sorted((REPO / "studies/unfinished").glob("*.tgz")):
        with tarfile.open(left) as packed:
            packed.extractall(given.out, filter="data")
    if shutil.which("nvidia-cuda-mps-control"):
        subprocess.run(["nvidia-cuda-mps-control", "-d"], start_new_session=True, check=False)
    for file in given.studies:
        if time.monotonic() < until:
            began, ended = time.monotonic(), run(file, given, until)
            print(f"{file.stem}: exit {ended} after {time.monotonic() - began:.0f} s", flush=True)
            print(f"{file.stem}: {pack(given.out, file.stem)}", flush=True)
    return 0


def run(file: Path, given: argparse.Namespace, until: float) -> int:
    """Run a study until its end, or stop it when the time is up; its exit status."""
    command = [sys.executable, "-m", "loralab", "study", str(file), "--data", str(given.data), "--retry"]
    command += ["--on", f"processes:{given.processes}", "--store", str(given.out / "store")]
    command += ["--out", str(given.out / "studies" / file.stem)]
    with (given.out / f"{file.stem}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            return process.wait(max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            return process.wait(FOR_PACKING / 2)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def pack(out: Path, name: str) -> str:
    """Pack a study and those of its runs that are done; how many these are."""
    study = out / "studies" / name
    if not (study / "study.json").is_file():
        return "nothing to pack"
    planned = {entry["address"] for entry in json.loads((study / "study.json").read_text())["planned"]} - {None}
    done = sorted(address for address in planned if (out / "store" / address / "result.json").is_file())
    with tarfile.open(out / f"{name}.tgz", "w:gz") as packed:
        packed.add(study, f"studies/{name}", filter=lambda entry: None if "/report" in entry.name else entry)
        for address in done:
            folder = out / "store" / address
            for path in sorted(p for p in folder.iterdir() if p.name not in LEFT_OUT):
                packed.add(path, f"store/{address}/{path.name}")
    return f"{len(done)} of {len(planned)} planned runs are done"


if __name__ == "__main__":
    sys.exit(main())
