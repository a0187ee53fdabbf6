"""One run of a study, repeated and compared; a study with some of its methods."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from test_cli import cli, flags, refused  # noqa: F401  (fixtures)
from test_study import study

from loralab.cli import main
from loralab.errors import UserError
from loralab.run import Settings
from loralab.study.rerun import compare, rerun, settings_of


@pytest.fixture(scope="module")
def first(tiny, own, tmp_path_factory):
    """A finished run folder, of settings that are not at their defaults."""
    folder = tmp_path_factory.mktemp("first") / "run"
    more = {"warmup": 0.25, "weight_decay": 0.05, "dropout": 0.1, "targets": "attention-qv"}
    assert main(flags(tiny, own, out=folder, **more)) == 0
    return folder


def test_settings_come_back_from_a_run_folder(first, tiny, own):
    s = settings_of(first)
    assert (s.task, s.model, s.text, s.rank) == (str(own["class"]), str(tiny), ("sentence",), 3)
    assert json.loads(json.dumps(s.to_json())) == json.loads((first / "run.json").read_text())["settings"]


def test_a_run_repeats_to_the_bit_on_one_machine(first, cli, tmp_path):  # noqa: F811
    code, out, _ = cli("rerun", first, "--out", "again")
    assert code == 0
    assert "the same to the bit" in out
    found = compare(first, tmp_path / "again")
    assert found.same
    assert (found.logits, found.other_answers, found.around) == (0.0, 0, [])
    assert len(found.numbers) == 3  # the metric and the loss of two epochs


def test_a_difference_is_told_with_what_differs_around_the_runs(first, tmp_path):
    other = shutil.copytree(first, tmp_path / "other")
    tensors = load_file(other / "predictions.safetensors")
    key = next(key for key in tensors if key.endswith("logits"))
    tensors[key][0] = torch.tensor([-9.0, 9.0]) * (1 if tensors[key][0].argmax() == 0 else -1)
    largest = (tensors[key] - load_file(first / "predictions.safetensors")[key]).abs().max().item()
    save_file(tensors, other / "predictions.safetensors")
    facts = json.loads((other / "run.json").read_text())
    facts["versions"]["torch"] = "2.7.0"
    (other / "run.json").write_text(json.dumps(facts))
    found = compare(first, other)
    assert not found.same
    assert (found.other_answers, found.logits) == (1, pytest.approx(largest))
    assert [line for line in found.around if line.startswith("torch: ") and line.endswith("2.7.0 now")]


def test_passes_that_were_shared_are_told(first, tmp_path):
    other = shutil.copytree(first, tmp_path / "other")
    result = json.loads((other / "result.json").read_text())
    result["time"]["together"] = 6
    (other / "result.json").write_text(json.dumps(result))
    assert compare(other, first).around == ["runs that shared its passes: 6 then, 1 now"]


def test_a_run_of_another_base_or_of_no_run_is_refused(first, refused, tmp_path, tiny):  # noqa: F811
    assert "is no run: expected an address" in refused("rerun", "0123456789abcdef")
    facts = json.loads((first / "run.json").read_text())
    changed = shutil.copytree(first, tmp_path / "changed")
    facts["settings"]["model"] = str(tiny_model(tmp_path / "other", "roberta"))
    (changed / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="the base of that run had another hash"):
        rerun(changed, tmp_path / "out")
    facts["settings"]["from_the_future"] = 3
    (changed / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="from_the_future=3"):
        settings_of(changed)


def test_settings_of_an_older_version_are_read(first, tmp_path):
    old = shutil.copytree(first, tmp_path / "old")
    facts = json.loads((old / "run.json").read_text())
    facts["settings"]["plan"] = facts["settings"].pop("policy")
    del facts["settings"]["class_weights"]
    (old / "run.json").write_text(json.dumps(facts))
    assert settings_of(old).class_weights == Settings(task="cola").class_weights


def test_a_study_with_some_of_its_methods(tiny, own):
    whole = study(tiny, own, methods=["lora", "dora", {"method": "vera", "name": "V"}], compare={"reference": "lora"})
    assert [m.label for m in whole.only(["V", "lora"]).methods] == ["lora", "V"]
    assert [m.label for m in whole.only(["vera", "lora"]).methods] == ["lora", "V"]
    with pytest.raises(UserError, match=r"--methods dorra: .*did you mean 'dora'"):
        whole.only(["dorra"])
    with pytest.raises(UserError, match="leaves out lora, which reference"):
        whole.only(["dora"])
