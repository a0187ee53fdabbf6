"""Is what is installed what requirements.lock names, and as it was packed? `make audit`.

    python tests/audit.py

Offline: every package of the lock has the version of the lock, and every file of it the hash that its wheel records.
With pip-audit and the network also: has any of them a known vulnerability? Where that cannot be asked it says so.
"""

import base64
import hashlib
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements.lock"
CANNOT = "known vulnerabilities: not asked for"


def problems(name: str, version: str) -> list[str]:
    """What is wrong with one installed package."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return [f"{name}: not installed"]
    if package.version != version:
        return [f"{name}: {package.version} is installed, the lock names {version}"]
    return [f"{name}: {path} is not as it was packed" for path in changed(package)]


def changed(package: Distribution) -> list[str]:
    """Files of a package whose bytes are not those of its RECORD, or that are gone."""
    wrong = []
    for file in package.files or ():
        if file.hash is None:  # RECORD itself, and what an installer made
            continue
        place = Path(str(package.locate_file(file)))
        digest = hashlib.new(file.hash.mode, place.read_bytes()).digest() if place.is_file() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            wrong.append(str(file))
    return wrong


def vulnerabilities() -> int:
    """Ask pip-audit; 0 if it finds nothing or cannot be asked."""
    if importlib.util.find_spec("pip_audit") is None:
        print(f"{CANNOT}: pip-audit is not installed (pip install pip-audit)")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", str(LOCK)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Error" in done.stderr:
        print(f"{CANNOT}: pip-audit cannot reach its source ({done.stderr.strip().splitlines()[-1][:150]})")
        return 0
    print(done.stdout + done.stderr, end="")
    return done.returncode


def main() -> int:
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", LOCK.read_text(), re.M)
    wrong = [problem for name, version in pins for problem in problems(name, version)]
    print(f"{len(pins)} packages against {LOCK.name} and their RECORD files: {len(wrong)} problems", *wrong, sep="\n")
    return 1 if vulnerabilities() or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
