"""The wheel works where nothing else of the repository is. `.ci/run` does this too, in each run of CI."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_wheel_works_by_itself(minilm, tmp_path):
    program = Path(__file__).parent / "wheel.py"
    borrowed = sysconfig.get_path("purelib")
    command = [sys.executable, str(program), "--out", str(tmp_path), "--borrow", borrowed]
    done = subprocess.run(command, env=os.environ | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "it works by itself" in done.stdout
