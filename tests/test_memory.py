"""Memory: each storage once, of the largest batch; a plan is what the step really takes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from archs import build, rows
from peaks import SETUPS, measured
from torch import nn

import loralab
from loralab import models
from loralab.errors import UserError
from loralab.train.memory import Kept, by_layer, layer_of, ledger, tensor_bytes
from loralab.train.planner import Meter, Setup, Step, largest_batch, plan


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The tiny model without dropout, whose masks are drawn outside torch."""
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("speed", ["auto", "off"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "full", "lora-fa"])
def test_a_plan_is_what_a_step_takes(plain, method, speed):
    setup = Setup(model=plain, method=method, speed=speed, dtype="float32", batch=5, length=11, rank=None)
    planned = plan(setup)
    model, _ = models.classifier(plain, 2, False, torch.float32, seed=0)
    step = Step(model, setup)
    step(setup)
    with Meter() as meter:
        step(setup)
    kept = tensor_bytes([*model.parameters(), *model.buffers()])
    layers = by_layer(model, step.optimizer, step.kept.layers)
    assert layers == planned.layers
    assert planned.tensors - meter.most == pytest.approx(kept + planned.ledger["optimizer"], rel=0.02)


@pytest.mark.parametrize("counts", [(3, 5, 2), (5, 3), (2, 5)])
def test_activations_are_those_of_the_largest_batch(counts):
    model = nn.ModuleDict({"a": nn.Linear(7, 11, bias=False)})
    kept = Kept(model)
    for n in counts:
        with kept.watch(n):
            model["a"](torch.ones(n, 7)).square()
    assert sum(kept.layers.values()) == 4 * max(counts) * (7 + 11)
    assert kept.layers["a"] == 4 * max(counts) * 7  # x; the square's input is kept outside


def test_every_byte_of_a_model_is_in_one_layer():
    model = build("bert")
    adapters = loralab.attach(model, "vera", head=True, rank=5)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-3))
    model(**rows()).logits.sum().backward()
    optimizer.step()
    layers = by_layer(model, optimizer, {})
    learned = [p for p in model.parameters() if p.requires_grad]
    constants = [t for layer in adapters.layers.values() for t in layer.constants["default"].values()]
    assert ledger(layers)["weights"] == tensor_bytes([*model.parameters(), *model.buffers(), *constants])
    assert ledger(layers)["gradients"] == tensor_bytes(p.grad for p in learned)
    assert ledger(layers)["optimizer"] == tensor_bytes(t for s in optimizer.state.values() for t in s.values())
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1", "bert.embeddings", "classifier"} <= set(layers)
    assert layer_of("bert.encoder.layer.1.output.dense.weight", model) == "bert.encoder.layer.1"


def test_the_largest_batch_fits_and_a_larger_one_does_not(plain):
    setup = Setup(model=plain, batch=1, length=8)
    room = plan(replace(setup, batch=13)).peak
    assert largest_batch(setup, room) == 13
    assert largest_batch(setup, room - 1) == 12
    assert largest_batch(setup, 1000) == 0


def test_what_cannot_be_planned_is_told(plain):
    with pytest.raises(UserError, match="--length 99: .* takes 40 tokens"):
        plan(Setup(model=plain, length=99))
    with pytest.raises(UserError, match="batch=0: expected 1 or more"):
        Setup(batch=0)


@pytest.mark.parametrize("name", SETUPS)
def test_a_plan_agrees_with_the_measured_peak(minilm, name):
    assert measured(name)[0] == pytest.approx(plan(SETUPS[name]).training, rel=0.15)
