"""What studies cost: `python studies/hours.py STUDY...`, folders that `loralab study` wrote, as a Markdown table.

Hours are of training as the runs measured it; runs that shared passes shared the time. A run that two
studies have is counted with the first that is named.
"""

import sys
from pathlib import Path

from loralab.study import load


def main(folders: list[str]) -> None:
    print("| study | runs | of them tuning | hours |")
    print("| --- | ---: | ---: | ---: |")
    seen: set[str] = set()
    total = 0.0
    for folder in folders:
        study = load(folder)
        runs = {run.scheduled.address: run for cell in study.cells().values() for run in (*cell.tuning, *cell.runs)}
        hours = sum(run.result["time"]["train_s"] for key, run in runs.items() if key not in seen) / 3600
        tuning = sum(run.scheduled.role == "tune" for run in runs.values())
        total += hours
        seen |= runs.keys()
        print(f"| {Path(folder).name} | {len(runs)} | {tuning} | {hours:.1f} |")
    print(f"| all | {len(seen)} | | {total:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
