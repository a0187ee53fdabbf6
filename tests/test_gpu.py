"""What `make gpu` needs, as far as a machine without a GPU can show it; `make gpu-dry` runs every line of it."""

import contextlib
import importlib
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
@pytest.mark.parametrize("program", [LIBRARY, "import loralab.bench, loralab.bench.epoch"], ids=["library", "bench"])
def test_optional_packages_are_optional(program):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def from_gpu(monkeypatch, name):
    """A module of tests/gpu, imported anew."""
    monkeypatch.syspath_prepend(str(HERE / "gpu"))
    for module in ("laws", "models", "speed"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def laws(monkeypatch):
    return from_gpu(monkeypatch, "laws")


@pytest.fixture
def speed(monkeypatch):
    return from_gpu(monkeypatch, "speed")


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


def test_each_way_to_the_loss_of_a_decoder_gives_the_same_loss_and_gradient(speed):
    pytest.importorskip("peft")
    batch, found = speed.inputs("llama-1b"), {}
    for name in speed.LOSSES:
        if name.endswith("liger"):  # its kernels need a GPU
            continue
        model, autocast = speed.side(name, "llama-1b", *speed.JOBS["lora r16 all"])
        learned = [p for key, p in model.named_parameters() if p.requires_grad]
        for p in learned:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        loss = speed.loss_of(model, autocast, batch, contextlib.nullcontext(), 1, name.endswith("pieces"))
        loss.backward()
        found[name] = torch.stack([loss.detach().double(), *sorted(p.grad.double().norm() for p in learned)])
    assert len(found) == 3
    for name, values in found.items():
        torch.testing.assert_close(values, found["fast"], rtol=0.05, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_an_epoch_without_data_or_model_says_what_it_lacks(speed, tmp_path):
    assert set(speed.cola(tmp_path)) == {"left out"}
