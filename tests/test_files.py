"""Adapter folders: strict, complete, and never half-written."""

import json

import pytest
import torch
from archs import build, rows, shake
from safetensors.torch import load_file, save_file

import loralab
from loralab.files import HEADER, TENSORS


@pytest.fixture
def folder(tmp_path):
    adapters = loralab.attach(
        build("bert"), "lora", name="mrpc", rank=3, alpha=5, head=True, labels=["no", "yes", "so"]
    )
    shake(adapters, "mrpc")
    return adapters.save(tmp_path / "adapter")


def spoil(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def test_the_header_says_all_that_the_adapter_needs(folder):
    header = json.loads((folder / HEADER).read_text())
    assert header["scaling"] == 5 / 3
    assert header["labels"] == ["no", "yes", "so"]
    assert header["head"] == ["classifier"]
    assert header["coverage"]["all-linear"][0] == "bert.encoder.layer.0.attention.self.query"
    assert set(header["roles"].values()) == {"A", "B", "head"}
    assert len(header["base"]["sha256"]) == 64
    assert {file.name for file in folder.iterdir()} == {HEADER, TENSORS}


def test_every_problem_is_named_at_once_and_the_model_stays(folder):
    def change(tensors):
        del tensors["bert.pooler.dense.A"]
        tensors["stray.A"] = torch.zeros(2)
        tensors["bert.pooler.dense.B"] = torch.zeros(7, 2)
        tensors["classifier.bias"][0] = torch.nan

    spoil(folder, change)
    model, batch = build("bert"), rows()
    before = model(**batch).logits
    with pytest.raises(loralab.UserError) as caught:
        loralab.load(model, folder)
    told = str(caught.value)
    for part in (
        "missing tensors: bert.pooler.dense.A",
        "unexpected tensors: stray.A",
        "(7, 2), expected (24, 3)",
        "not finite",
    ):
        assert part in told
    assert torch.equal(model(**batch).logits, before)
    assert not hasattr(model, "_loralab")
    assert all(p.requires_grad for p in model.parameters())


def test_a_wrong_base_is_refused_and_the_right_one_in_bfloat16_is_not(folder):
    with pytest.raises(loralab.UserError, match="trained on another base"):
        loralab.load(build("bert", seed=5), folder)
    loralab.load(build("bert", seed=5), folder, check_base=False)
    half = loralab.load(build("bert").to(torch.bfloat16), folder)
    assert half.names == ["mrpc"]
    with pytest.raises(loralab.UserError, match=r"the model has no bert\.encoder"):
        loralab.load(build("mpnet"), folder)


def test_the_hash_is_that_of_the_base_before_training_and_storing():
    hashes = set()
    for method, given in (("lora", {}), ("lora", {"store": "bfloat16"}), ("full", {}), ("head", {})):
        model = build("bert")
        adapters = loralab.attach(model, method, head=True, **given)
        optimizer = torch.optim.SGD(adapters.parameter_groups(lr=0.1))
        model(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        optimizer.step()
        hashes.add(adapters.base_sha256)
    assert len(hashes) == 1


def test_two_adapters_of_different_label_counts_load_beside_each_other(folder, tmp_path):
    other = loralab.attach(build("bert"), "rslora", name="rte", rank=2, head=True, labels=["a", "b"])
    shake(other, "rte")
    other.save(tmp_path / "rte")
    model, batch = build("bert"), rows()
    loralab.load(model, folder)
    adapters = loralab.load(model, tmp_path / "rte")
    assert adapters.names == ["mrpc", "rte"]
    assert adapters.active.names == ("rte",)
    assert torch.equal(model(**batch).logits, other.model(**batch).logits)
    with adapters.use("mrpc"):
        assert model(**batch).logits.shape == (5, 3)
    with pytest.raises(loralab.UserError, match="there already"):
        loralab.load(model, folder)


@pytest.mark.parametrize(
    ("spoil_it", "told"),
    [
        (lambda f: (f / HEADER).unlink(), "no adapter folder"),
        (lambda f: (f / HEADER).write_text("{"), "cannot be read"),
        (lambda f: (f / HEADER).write_text("[]"), "expected a JSON object"),
        (lambda f: (f / HEADER).write_text("{}"), "format None"),
        (lambda f: (f / TENSORS).write_bytes(b"\x10" * 40), "cannot be read"),
        (lambda f: (f / TENSORS).unlink(), "cannot be read"),
        (
            lambda f: (f / HEADER).write_text((f / HEADER).read_text().replace('"kind": "lora"', '"kind": "lara"')),
            "newer",
        ),
        (lambda f: (f / HEADER).write_text((f / HEADER).read_text().replace('"rank": 3', '"rank": -3')), "rank=-3"),
        (
            lambda f: (f / HEADER).write_text((f / HEADER).read_text().replace('"version": 1', '"version": 2')),
            "version 2",
        ),
    ],
)
def test_a_spoiled_folder_is_one_line(folder, spoil_it, told):
    spoil_it(folder)
    with pytest.raises(loralab.UserError) as caught:
        loralab.load(build("bert"), folder)
    assert told in str(caught.value)


def test_a_folder_that_cannot_be_written_is_a_user_error(folder, tmp_path):
    adapters = loralab.load(build("bert"), folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(loralab.UserError, match="cannot write"):
        adapters.save(tmp_path / "file" / "adapter")


def test_peft_folders_with_what_is_not_read_here_are_refused(folder, tmp_path):
    adapters = loralab.load(build("bert"), folder)
    adapters.export(tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    with pytest.raises(loralab.UserError, match="lora_bias=True"):
        loralab.load(build("bert"), tmp_path / "peft")
