"""What `make gpu` needs, as far as a machine without a GPU can show it; `make gpu-dry` runs every line of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MISSING = ["cyclopts", "datasets", "bitsandbytes", "peft", "ray", "trl"]  # what a GPU machine may lack
WITHOUT = f"""
import importlib.abc, importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] in {MISSING} else find_spec(name, *more)
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {MISSING}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(HERE)!r})
"""
LIBRARY = """
import tempfile
import loralab
from archs import build, rows
for method in ("lora", "dora", "vera", "superlora"):
    model = build("bert")
    adapters = loralab.attach(model, method, head=True)
    loralab.fast.enable(model)
    model.train()(**rows()).logits.sum().backward()
    loralab.load(build("bert"), adapters.save(tempfile.mkdtemp()))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("program", [LIBRARY, "import loralab.bench"], ids=["library", "bench"])
def test_optional_packages_are_optional(program):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def laws(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "gpu"))
    import laws

    yield laws
    for name in ("laws", "models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "method"), [("bert", "dora"), ("llama", "superlora"), ("gpt2", "vera")])
def test_the_laws_hold_on_a_cpu(laws, kind, method, dtype):
    found = laws.laws(kind, method, dtype)["checks"]
    assert len(found) >= 8
    assert all(check["ok"] for check in found.values()), found
    assert laws.laws(kind, method, dtype, store="float32")["checks"].keys() < found.keys()


def test_a_law_that_is_broken_is_seen(laws):
    bad = laws.judged(
        {"off": lambda: 1.0, "nothing": lambda: laws.off(torch.zeros(1), torch.zeros(1)), "fails": lambda: 1 / 0}, 0.1
    )
    assert not any(check["ok"] for check in bad["checks"].values())
    assert "ZeroDivisionError" in bad["checks"]["fails"]["error"]
