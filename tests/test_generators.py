"""A checkpoint keeps the random generator of every device of the model, as far as the devices here can show it."""

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from torch import nn

from loralab.run import Settings, generators
from loralab.run.folder import RunFolder
from loralab.run.setup import prepare
from loralab.run.state import RunState

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] + [
    "mps"
] * torch.backends.mps.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_device_draws_after_a_restore_is_what_it_drew_before(device):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3, affine=False)).to(device)
    saved = generators.states(model)
    assert [torch.device(name) for name in saved] == [next(model.parameters()).device]
    assert all(t.device.type == "cpu" and t.dtype == torch.uint8 for t in saved.values())
    drawn = torch.rand(4, device=device)
    assert not torch.equal(torch.rand(4, device=device), drawn)
    generators.restore(saved)
    assert torch.equal(torch.rand(4, device=device), drawn)


def test_a_checkpoint_brings_back_the_generators_of_devices_beside_the_runs_own(tmp_path):
    """A run that shares passes draws from a generator of its own; torch's is that of the device."""
    table = tmp_path / "t.csv"
    table.write_text(
        "text,label\n" + "".join(f"a {word} thing {i},{word}\n" for i in range(20) for word in ("dog", "cat"))
    )
    given = {"text": ("text",), "label": "label", "rank": 2, "max_length": 16, "epochs": 1}
    settings = Settings(task=str(table), model=str(tiny_model(tmp_path / "model")), out=tmp_path / "run", **given)
    run, folder = prepare(settings), RunFolder(tmp_path / "run")
    folder.path.mkdir()
    state = RunState(run, folder, Accelerator(cpu=True), torch.Generator().manual_seed(7))
    state.save_checkpoint()
    of_device, of_run = torch.rand(4), torch.rand(4, generator=state.generator)
    assert not torch.equal(of_device, of_run)
    said = []
    assert state.load_checkpoint(said.append)
    assert torch.equal(torch.rand(4), of_device)
    assert torch.equal(torch.rand(4, generator=state.generator), of_run)
    assert said == []
