"""Adapters in two processes, on the CPU: Accelerate's DistributedDataParallel, and FSDP2's divided tensors.

Each process sees a half of every batch. What all of them learn, and the folder that is saved, are those of one process
that sees the whole.
"""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from archs import build, rows, shake
from safetensors.torch import load_file, save_file

import loralab
from loralab.files import TENSORS

METHODS = {
    "lora": {"rank": 3, "alpha": 5.0}, "dora": {"rank": 3, "alpha": 5.0}, "vera": {"rank": 7}, "pissa": {"rank": 2},
    "delta-lora": {"rank": 3, "wait": 1}, "dylora": {"rank": 4}, "adalora": {"rank": 5, "total_steps": 6},
    "lora-fa-precond": {"rank": 3},
    "superlora": {}, "loha": {"rank": 3},
}  # fmt: skip
STEPS, PROCESSES, ROWS = 4, 2, 6
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


def attached(method):
    model = build("bert")
    adapters = loralab.attach(model, method, name="a", targets="attention", head=True, seed=3, **METHODS[method])
    shake(adapters, "a", std=0.1)
    return model.train(), adapters


def batches(rank=0, processes=1):
    mine = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
    for seed in range(STEPS):
        batch = rows(count=ROWS, seed=seed)
        batch["attention_mask"][:] = 1
        yield {**{key: t[mine] for key, t in batch.items()}, "labels": LABELS[mine]}


def train(model, optimizer, given, backward=torch.Tensor.backward):
    for batch in given:
        backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


def sgd(adapters):
    return torch.optim.SGD(adapters.parameter_groups(lr=0.5), momentum=0.9)


def averaged(rank, method, folder):
    """Train with Accelerate, which averages gradients; the first process saves."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == PROCESSES
    model, adapters = attached(method)
    called, optimizer = accelerator.prepare(model, sgd(adapters))
    assert type(called).__name__ == "DistributedDataParallel"
    train(called, optimizer, batches(rank, PROCESSES), accelerator.backward)
    if accelerator.is_main_process:
        adapters.save(folder / method)


def divided(rank, method, folder):
    """Train with FSDP2: each process has a half of every tensor; all of them save, and the first one writes."""
    from torch.distributed.fsdp import fully_shard

    model, adapters = attached(method)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert adapters.divided
    train(model, sgd(adapters), batches(rank, PROCESSES))
    for leave in (adapters.merge, lambda: adapters.export(folder / "no")):
        with pytest.raises(loralab.UserError, match="load it in one process"):
            leave()
    adapters.save(folder / method)
    model.save_pretrained(folder / f"{method}-checkpoint", is_main_process=rank == 0)


def process(rank, kind, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for method in METHODS:
        kind(rank, method, folder)
        dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [averaged, divided])
def test_two_processes_learn_and_save_what_one_does(kind, tmp_path):
    mp.spawn(process, (kind, free_port(), tmp_path), nprocs=PROCESSES)
    for method in METHODS:
        model, adapters = attached(method)
        before = {key: t.detach().clone() for key, t in adapters.state().items()}
        train(model, sgd(adapters), batches())
        saved = load_file(tmp_path / method / TENSORS)
        assert saved.keys() == {key for key, _ in loralab.adapters.once(adapters.tensors()).items()}
        for key, t in saved.items():
            torch.testing.assert_close(t, adapters.state()[key].detach(), rtol=0, atol=2e-4, msg=f"{method} {key}")
        assert any((adapters.state()[key] - t).abs().max() > 0.01 for key, t in before.items()), method
        again = build("bert")
        loralab.load(again, tmp_path / method)  # the hash of the base is that of the whole
        if kind is divided:
            loralab.load(build("bert"), tmp_path / f"{method}-checkpoint", name="b")
            written = load_file(tmp_path / f"{method}-checkpoint" / "model.safetensors")
            assert all(torch.equal(written[f"loralab/a/{key}"], t) for key, t in saved.items())


@pytest.mark.parametrize("where", ["folder", "checkpoint"])
def test_counters_of_older_folders_have_no_axis_and_are_read(where, tmp_path):
    """A scalar cannot be divided among processes, so a counter is (1,) now."""
    from loralab import files
    from loralab.disk import read_json, write_json
    from loralab.files import sealed

    model, adapters = attached("delta-lora")
    train(model, sgd(adapters), batches())
    assert all(t.shape == (1,) for key, t in adapters.state().items() if key.endswith(".step"))
    name, start = (TENSORS, "") if where == "folder" else ("model.safetensors", "loralab/a/")
    adapters.save(tmp_path) if where == "folder" else model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / name)
    old = {key: t.reshape(()) if key.endswith(".step") and key.startswith(start) else t for key, t in tensors.items()}
    save_file(old, tmp_path / name)
    header = read_json(tmp_path / files.HEADER)
    for key, record in header["tensors"].items():
        record["shape"] = [] if key.endswith(".step") else record["shape"]
    write_json(tmp_path / files.HEADER, sealed(header))
    again = loralab.load(build("bert"), tmp_path)
    assert all(torch.equal(t, adapters.state()[key]) for key, t in again.state("a").items())
    if where == "checkpoint":
        fresh, other = attached("delta-lora")
        assert not fresh.load_state_dict(load_file(tmp_path / name), strict=False).unexpected_keys
        assert all(torch.equal(t, adapters.state()[key]) for key, t in other.state("a").items())
