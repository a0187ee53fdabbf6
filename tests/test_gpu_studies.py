"""`make gpu-studies` on a CPU: it packs what is done, and goes on from what an earlier day left."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
STUDY = """
tasks = [{{ name = "animals", task = {file}, text = "sentence", label = "label" }}]
models = [{model}]
seeds = [0]
adapters = false
packed = true
methods = [{{ method = "lora", rank = 3 }}, "head"]

[protocol]
epochs = 2
max_length = 32
batch_size = 20
lr = 2e-2
"""


@pytest.mark.slow
def test_studies_are_packed_and_go_on(tiny, own, tmp_path):
    text = STUDY.format(file=json.dumps(str(own["class"])), model=json.dumps(str(tiny)))
    (tmp_path / "small.toml").write_text(text)

    def run(out, seconds):
        command = [sys.executable, REPO / "tests/gpu/studies.py", out, tmp_path / "small.toml", "--data", tmp_path]
        environment = os.environ | {"PYTHONPATH": str(REPO / "src")}
        more = ["--seconds", str(seconds), "--processes", "1"]
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=True).stdout

    assert "2 of 2 planned runs are done" in run(tmp_path / "a", 900)
    with tarfile.open(tmp_path / "a/small.tgz") as packed:
        names = packed.getnames()
        packed.extractall(tmp_path / "b", filter="data")
    assert sum(name.endswith("result.json") for name in names) == 2
    assert not any("adapter" in name or "checkpoint" in name for name in names)
    runs = list((tmp_path / "b/store").glob("*/result.json"))
    before = [path.stat().st_mtime_ns for path in runs]
    assert len(runs) == 2
    assert "2 of 2 planned runs are done" in run(tmp_path / "b", 900)
    assert before == [path.stat().st_mtime_ns for path in runs]
    assert len(json.loads((tmp_path / "b/studies/small/results.json").read_text())["cells"]) == 2
