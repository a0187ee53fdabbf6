"""The licences of all that requirements.lock installs, as a table: `make licences` writes docs/licences.md.

    python tests/licences.py [--write docs/licences.md]

A licence is what a package says of itself: its expression, else its classifiers, else its text. Exits with 1 for a
package that says nothing known, or whose licence asks of a program that imports it what Apache-2.0 does not allow.
"""

import argparse
import re
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

REPO = Path(__file__).parents[1]
FINE = {  # how a licence is found in what a package says -> its short name; the first that is found counts
    r"apache": "Apache-2.0", r"\bmpl|mozilla": "MPL-2.0", r"bsd|new bsd": "BSD", r"\bmit\b": "MIT", r"\bisc\b": "ISC",
    r"psf|python software": "PSF-2.0", r"hpnd|\bcmu\b": "HPND", r"zlib": "Zlib",
    r"unlicense|public domain|\bcc0": "public domain",
}  # fmt: skip
COPYLEFT = r"\b[AL]?GPL|General Public License|SSPL"  # MPL-2.0 asks for the source of its own files only


def said(package: Distribution) -> str:
    """What a package says of its licence, in one line; empty if nothing."""
    data = package.metadata
    classifiers = [line.rpartition(" :: ")[2] for line in data.get_all("Classifier", []) if line.startswith("License")]
    own = [line for line in classifiers if line != "OSI Approved"]
    text = data.get("License-Expression") or ", ".join(own) or data.get("License") or ""
    return " ".join(text.split())[:120]


def licence(text: str) -> str | None:
    """The short name of a licence that is known and fits; None for any other."""
    found = [name for pattern, name in FINE.items() if re.search(pattern, text, re.I)]
    copyleft = re.search(COPYLEFT, text) and not re.search(r"\bOR\b", text)
    return None if copyleft or not found else found[0]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    pins = re.findall(r"^([A-Za-z0-9._-]+)==", (REPO / "requirements.lock").read_text(), re.M)
    rows = [(p.metadata["Name"], p.version, said(p)) for p in map(distribution, pins)]
    table = [
        "# Licences\n",
        "All that `requirements.lock` installs, and what each package says of its licence: `make licences`. loralab is",
        "Apache-2.0 itself and contains none of them.\n",
        "| package | version | licence |",
        "| --- | --- | --- |",
        *(f"| {name} | {version} | {text or 'says nothing'} |" for name, version, text in rows),
    ]
    if given.write is not None:
        given.write.write_text("\n".join(table) + "\n")
    wrong = [f"{name}: {text or 'says nothing'}" for name, _, text in rows if licence(text) is None]
    print(f"{len(rows)} packages, {len(wrong)} with a licence that is unknown here or does not fit", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
