"""Addresses of runs: every setting that decides a result changes them, nothing else does, and no version moves them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from loralab.model_names import find
from loralab.recipe import FACTORS, Recipe, recipe
from loralab.run import Settings
from loralab.study import address as address_module
from loralab.study import load
from loralab.study.address import IN_HASHES, IN_RECIPE, NOT_RESULT, OF_KIND, RECIPE, SETTINGS, address, content

RESULTS = Path(__file__).parents[1] / "studies/results"
REVISED = "delta"  # the study of delta-lora in its revision 2
STORED = sorted(file.parent.name for file in RESULTS.glob("*/study.json"))
OLD_SETTINGS = {"plan": "policy"}  # settings of stored studies that have another name now


@pytest.fixture(scope="module")
def stored_models(minilm) -> set[str]:
    """Models of stored studies that are on this machine."""
    return {name for name in ("minilm", "mpnet") if find(name) is not None}


# ---- the tables ------------------------------------------------------------------------------------------------------


def test_every_setting_has_a_line_in_the_tables():
    """Without one, renaming it in the code would change addresses: add `name: (name, default)`."""
    settings = {f.name for f in dataclasses.fields(Settings)}
    assert settings - NOT_RESULT - IN_RECIPE - IN_HASHES == set(SETTINGS)
    assert {f.name for f in dataclasses.fields(Recipe)} - {"factors"} == set(RECIPE)
    assert set(FACTORS) == set(OF_KIND)
    for kind, factors in FACTORS.items():
        assert {f.name for f in dataclasses.fields(factors)} == set(OF_KIND[kind]), kind


@pytest.mark.parametrize("table", [SETTINGS, RECIPE, *OF_KIND.values()])
def test_no_two_settings_have_one_key(table):
    keys = [key for key, _ in table.values()]
    assert len(set(keys)) == len(keys)
    assert not {"kind", "revision", "factors"} & set(keys)


def test_a_rename_or_another_default_in_the_code_moves_no_address(tiny, own, monkeypatch):
    """What counts is the table: a setting at the table's default is left out, another value has the table's key."""
    base = Settings(task=str(own["class"]), text=("sentence",), label="label", model=str(tiny))
    assert content(dataclasses.replace(base, policy="drop"))["recipe"]["plan"] == "drop"  # its name in version 0.1.0
    usual = address(base)
    monkeypatch.setattr(address_module, "SETTINGS", SETTINGS | {"epochs": ("epochs", 7)})  # as if 3 were a new default
    assert content(base)["settings"]["epochs"] == 3
    assert address(base) != usual


def test_a_method_that_computes_something_else_has_a_revision_in_its_addresses(tiny, own, monkeypatch):
    base = Settings(task=str(own["class"]), text=("sentence",), label="label", model=str(tiny))
    assert "revision" not in content(base)["recipe"]["factors"]
    assert content(dataclasses.replace(base, method="delta-lora"))["recipe"]["factors"]["revision"] == 2
    before = address(base)
    monkeypatch.setattr(FACTORS["lora"], "revision", 2)
    assert content(base)["recipe"]["factors"]["revision"] == 2
    assert address(base) != before


def test_a_start_that_computes_something_else_has_a_revision_in_its_addresses(tiny, own):
    base = Settings(task=str(own["class"]), text=("sentence",), label="label", model=str(tiny))
    assert "start_revision" not in content(base)["recipe"]
    assert content(dataclasses.replace(base, method="lora-ga"))["recipe"]["start_revision"] == 2


# ---- stored runs -----------------------------------------------------------------------------------------------------


def listed(value):
    """A setting as JSON has it -> as Settings has it."""
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", STORED)
def test_addresses_of_stored_runs_are_what_they_were(name, glue, stored_models):
    """Of every run that a stored study wants, from its settings; older runs of delta-lora are of its revision 1."""
    compared = 0
    for scheduled in load(RESULTS / name).schedule:
        if scheduled.model not in stored_models or scheduled.settings is None:  # no value learned: nothing was chosen
            continue
        if scheduled.settings.get("from_adapter"):  # its files, which the address names, are not in the repository
            continue
        stored = {OLD_SETTINGS.get(key, key): listed(value) for key, value in scheduled.settings.items()}
        run = RESULTS / "store" / str(scheduled.address) / "run.json"
        precision = (
            json.loads(run.read_text())["precision"] if run.is_file() else "bfloat16"
        )  # of the machine it ran on
        settings = Settings(**stored | {"data": glue, "dtype": precision})
        revised = scheduled.settings["method"] == "delta-lora" and name != REVISED
        assert (address(settings) == scheduled.address) != revised, stored
        compared += 1
    if not compared:
        pytest.skip("the model of this study is not installed: make models")


def test_stored_runs_of_delta_lora_are_those_of_revision_1(glue, stored_models, monkeypatch):
    monkeypatch.setattr(FACTORS["delta-lora"], "revision", 1)
    found = [
        s for name in STORED if name != REVISED for s in load(RESULTS / name).schedule
        if s.settings and s.settings["method"] == "delta-lora" and s.model in stored_models
    ]  # fmt: skip
    assert found
    for scheduled in found:
        stored = {OLD_SETTINGS.get(key, key): value for key, value in dict(scheduled.settings or {}).items()}
        settings = Settings(**stored | {"data": glue, "text": (), "dtype": "bfloat16", "set": ("wait=500",)})
        assert address(settings) == scheduled.address


# ---- what decides a result -------------------------------------------------------------------------------------------

OTHERWISE = {  # a value that no other row has, for every setting that can decide a result
    "train_rows": 50, "validation_rows": 20,
    "method": "dora", "seed": 3, "rank": 5, "alpha": 3.0, "exclude": ("output",), "targets": "mlp",
    "lr": 0.3, "lr_ratio": 3.0, "head_lr": 0.3,
    "epochs": 5, "batch_size": 5, "accumulate": 2, "max_length": 20, "dropout": 0.3, "policy": "drop",
    "set": ("stabilized=true",),
    "store": "int8", "speed": "off", "attention": "eager", "dtype": "bfloat16",
    "weight_decay": 0.3, "schedule": "cosine", "warmup": 0.3, "clip": 0.3,
    "selection": "last", "patience": 3, "eval_every": 7, "max_steps": 9, "max_time": "9m",
    "objective": "multi-label", "checkpointing": True, "held_out": "unused",
    "generate_metric": "exact", "class_weights": "balanced", "select_by": "f1_macro",
}  # fmt: skip
OF_POLICY = {"drop": {"keep": 0.5}, "alora": {"rounds": 2}, "groups": {"span": 2}}  # refused with another policy


def test_every_setting_that_decides_a_result_changes_the_address(tiny, own, tmp_path):
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({"adapted": {"encoder.layer.0.attention.self.query": {"rank": 3}}}))
    base = Settings(task=str(own["class"]), text=("sentence",), label="label", model=str(tiny), dtype="float32")
    fields = {f.name for f in dataclasses.fields(Settings)}
    free = {
        "resume": True,
        "out": tmp_path / "x",
        "track": "tensorboard",
        "threads": 3,
        "checkpoint_every": 7,
        "device": "cpu",
        "licence": "mit",
    }
    assert set(free) == NOT_RESULT
    of_policy = {key for values in OF_POLICY.values() for key in values}
    assert (
        set(OTHERWISE) | set(free) | IN_HASHES | {"ranks", "template", "loss_on", "pack", "generate_rows"} | of_policy
        >= fields
    )
    found = [address(dataclasses.replace(base, **{key: value})) for key, value in OTHERWISE.items()]
    found += [address(dataclasses.replace(base, task=str(own["value"]))), address(base)]
    found += [address(dataclasses.replace(base, policy="groups")), address(dataclasses.replace(base, policy="alora"))]
    found += [address(dataclasses.replace(base, policy=policy, **values)) for policy, values in OF_POLICY.items()]
    found.append(address(dataclasses.replace(base, generate_metric="exact", generate_rows=7)))
    template, chats = tmp_path / "template.jinja", tmp_path / "chats.jsonl"
    rows = [{"prompt": f"the {word}", "completion": word} for word in ("cat", "dog", "red", "blue")]
    chats.write_text("\n".join(map(json.dumps, rows)))
    causal = Settings(task=str(chats), model=str(tiny))
    found += [address(dataclasses.replace(causal, **more)) for more in ({}, {"loss_on": "all"}, {"pack": True})]
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        found.append(address(dataclasses.replace(causal, template=template)))
    assert len(set(found)) == len(found)
    assert address(dataclasses.replace(base, **free)) == address(base)


def test_equal_runs_have_one_address_however_they_are_written(tiny, own, tmp_path):
    def at(**given):
        usual = {"task": str(own["class"]), "text": ("sentence",), "label": "label", "model": str(tiny)}
        return address(Settings(**{**usual, **given}))

    assert at(method="lora+") == at(method="lora", lr=recipe("lora+").lr, lr_ratio=16)
    assert at() == at(rank=8, alpha=16, lr=1e-3, problem_type="classification", objective="classification")
    assert at(method="full") == at(method="full", targets="mlp")
    moved, copied = shutil.copy(own["class"], tmp_path / "other.csv"), shutil.copytree(tiny, tmp_path / "model")
    assert at() == at(task=str(moved), model=str(copied))
    with (tmp_path / "other2.csv").open("w") as more:
        more.write(own["class"].read_text() + "the cat sees,cat\n")
    assert at() != at(task=str(tmp_path / "other2.csv"))
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    address_module.base.cache_clear()
    assert at() != at(model=str(copied))
