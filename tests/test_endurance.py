"""What goes on for long stays flat: memory, objects, file descriptors and threads, in training and in serving.

`make reliability` takes ten thousand steps, and adds and removes a thousand adapters.
"""

import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from archs import build, rows, shake
from conftest import LONG
from test_train import settings

import loralab
from loralab.run import train
from loralab.run.state import RunState

STEPS = 10_000 if LONG else 360
ADAPTERS = 1_000 if LONG else 60
MEMORY = 24 * 2**20  # bytes that the allocator may keep more or less from one half to the other


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    memory: int  # resident bytes
    objects: int  # that the collector follows
    tensors: int
    descriptors: int
    threads: int


def held() -> Held:
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = sum(issubclass(type(x), torch.Tensor) for x in objects)
    files = len(os.listdir("/proc/self/fd"))
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), len(objects), tensors, files, threading.active_count())


def assert_flat(before: Held, after: Held, objects: int) -> None:
    """`objects` is how many more there may be."""
    assert after.tensors == before.tensors
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.objects - before.objects <= objects
    assert after.memory - before.memory <= MEMORY


@pytest.mark.parametrize("method", ["lora"])
def test_a_long_run_stays_flat(tiny, own, tmp_path, monkeypatch, tally, method):
    """An epoch leaves its record and nothing else."""
    real, seen, steps = RunState.step, {}, 0
    epochs = STEPS // 40 + 1  # an epoch has more steps than that

    def step(self, loss, chosen):
        nonlocal steps
        real(self, loss, chosen)
        steps = self.progress.step
        if self.progress.epoch in (epochs // 3, epochs - 1) and self.progress.batch == 2:
            seen[self.progress.epoch] = held()

    monkeypatch.setattr(RunState, "step", step)
    result = train(settings(tiny, own, tmp_path / "r", method=method, batch_size=4, epochs=epochs, lr=1e-3))
    (first, before), (last, after) = seen.items()
    assert result["selected_epoch"] <= epochs
    assert steps >= STEPS
    tally("training steps", steps)
    assert_flat(before, after, objects=8 * (last - first))  # the record of an epoch is 3 or 4 dicts


def test_adapters_that_come_and_go_leave_nothing(tmp_path, tally):
    model, seen = build("bert"), []
    adapters = loralab.attach(model, "lora", name="stays", rank=2, head=True)
    with adapters.use("stays"), torch.no_grad():
        right = model(**rows()).logits
    kinds = [("lora", {"rank": 3}), ("dora", {"rank": 2}), ("vera", {"rank": 4}), ("lokr", {"rank": 2})]
    for i in range(ADAPTERS):
        method, given = kinds[i % len(kinds)]
        adapters.add("guest", method, head=i % 2 == 0, seed=i, **given)
        shake(adapters, "guest", seed=i)
        with adapters.use("guest"):
            model(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        with adapters.use(["stays", "guest"], ids=[0, 1, 1, 0, 1]), adapters.caching(), torch.no_grad():
            mixed = model(**rows()).logits
        torch.testing.assert_close(mixed[[0, 3]], right[[0, 3]], rtol=0, atol=1e-5)
        if i % 8 == 0:
            adapters.save(tmp_path / "guest", "guest")
        adapters.remove("guest")
        model.zero_grad(set_to_none=True)
        if i in (ADAPTERS // 3, ADAPTERS - 1):
            seen.append(held())
    tally("adapters added and removed", ADAPTERS)
    assert_flat(*seen, objects=20)
    with adapters.use("stays"), torch.no_grad():
        assert torch.equal(model(**rows()).logits, right)
