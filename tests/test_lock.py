"""requirements.lock is constraints.txt with hashes: the same versions, every file by its hash, and no address."""

import base64
import hashlib
import re
from pathlib import Path

import audit
import licences
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


@pytest.mark.parametrize(
    "text", ["Apache-2.0", "MIT License", "BSD-3-Clause AND MIT", "GPL-3.0-or-later OR MIT", "MPL-2.0"]
)
def test_a_licence_that_fits_is_known(text):
    assert licences.licence(text) is not None


@pytest.mark.parametrize(
    "text", ["", "GPL-3.0-only", "MIT AND LGPL-2.1", "GNU Affero General Public License v3, BSD", "mine"]
)
def test_a_licence_that_is_unknown_or_does_not_fit_fails(text):
    assert licences.licence(text) is None


def test_an_audit_sees_a_changed_file_a_lost_one_and_another_version(tmp_path, monkeypatch):
    info = tmp_path / "some_package-1.5.dist-info"
    info.mkdir()
    lines = []
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(f"{name} = 1\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256((tmp_path / name).read_bytes()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{(tmp_path / name).stat().st_size}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.5\n")
    (info / "RECORD").write_text("".join(lines) + "some_package-1.5.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert audit.problems("some-package", "1.5") == []
    assert len(audit.problems("some-package", "1.6")) == 1
    (tmp_path / "one.py").write_text("one.py = 2\n")
    assert audit.problems("some-package", "1.5") == ["some-package: one.py is not as it was packed"]
    (tmp_path / "two.py").unlink()
    assert len(audit.problems("some-package", "1.5")) == 2
    assert audit.problems("no-such-package-here", "1.5") == ["no-such-package-here: not installed"]
