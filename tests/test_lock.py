"""requirements.lock is constraints.txt with hashes: the same versions, every file by its hash, and no address."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    """Package -> version; that of a build without CUDA is the version itself."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s+]+)", text, re.M)
    return {plain(name): version for name, version in found}


@pytest.fixture(scope="module")
def lock():
    return (REPO / "requirements.lock").read_text()


def test_the_lock_holds_the_versions_that_the_tests_run_with(lock):
    assert pins(lock) == pins((REPO / "constraints.txt").read_text())


def test_every_package_of_the_lock_has_hashes_and_none_an_address(lock):
    assert re.findall(r"\S*://\S*|\S*@\s*file\S*", lock) == []
    packages = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.M)[1:]
    assert len(packages) == len(pins(lock)) > 90
    line = re.compile(r"[A-Za-z0-9._-]+==\S+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+")
    assert [package for package in packages if not line.fullmatch(package)] == []
