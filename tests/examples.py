"""Run the shell commands of a page, in order: `python tests/examples.py PAGE` (see `make examples`)."""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]


def commands(page: Path) -> list[list[str]]:
    """The `loralab` commands of the page's shell blocks under its examples."""
    text = page.read_text().partition("## Examples")[2]
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in shell.splitlines() if line.startswith("loralab ")]


def main(page: Path) -> int:
    """Run all in a new folder; return how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, REPO / "docs/examples/rows.py", "rows"], cwd=folder, check=True)
        for words in commands(page):
            words = [str(REPO / word) if word.startswith("../") else word for word in words]
            print("$", shlex.join(words), flush=True)
            started = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "loralab", *words[1:]], cwd=folder, check=False)
            failed += done.returncode != 0
            print(f"exit {done.returncode}, {time.monotonic() - started:.0f} s\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
