"""Runs that start from an adapter, and runs that try several rates."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loralab
from loralab import LayerRank, RankMap, UserError, adapters
from loralab.cli import main
from loralab.files import inside
from loralab.models import pretrained
from loralab.run import Settings, train
from loralab.run.setup import prepare, prepare_together
from loralab.run.start import begin_from
from loralab.run.tune import tune
from loralab.study.address import address
from loralab.study.toml import define

QUERY, VALUE = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value"))


def settings(tiny, own, out=None, **given):
    usual = {"epochs": 2, "max_length": 32, "batch_size": 20, "lr": 2e-2, "rank": 3, "text": ("sentence",)}
    return Settings(task=str(own["class"]), label="label", model=str(tiny), out=out, **usual | given)


@pytest.fixture(scope="module")
def trained(tiny, own, tmp_path_factory):
    """A folder of runs of several methods, by name."""
    folder = tmp_path_factory.mktemp("trained")
    for method in ("lora", "dora", "vera", "lora-fa", "full", "pissa"):
        given = {} if method in ("full", "vera") else {"rank": 3}
        train(settings(tiny, own, folder / method, method=method, epochs=1, **{"rank": None, **given}))
    return folder


# ---- from an adapter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "lora-fa", "full", "pissa"])
def test_a_run_begins_with_the_tensors_of_the_adapter(trained, tiny, own, method):
    folder = trained / method / "adapter"
    given = {"rank": None} if method in ("full", "vera") else {}
    run = prepare(settings(tiny, own, method=method, seed=5, from_adapter=folder, **given))
    fresh = prepare(settings(tiny, own, method=method, seed=5, **given))
    stored = adapters.read(folder).tensors
    state = run.adapters.state(run.name)
    assert stored
    for key, tensor in stored.items():
        torch.testing.assert_close(state[key].detach(), tensor, rtol=0, atol=0)
    assert any(not torch.equal(state[key], t) for key, t in fresh.adapters.state(fresh.name).items())
    assert any(f"starts from the adapter class of {folder}" in note for note in run.notes)
    assert not any("new head" in note for note in run.notes)


def test_the_head_is_new_where_labels_differ(trained, tiny, own):
    """From classes to scores: the layers are the adapter's, the head is that of a run without it."""
    s = replace(settings(tiny, own, seed=5), task=str(own["value"]))
    fresh, run = prepare(s), prepare(replace(s, from_adapter=trained / "lora/adapter"))
    stored, heads = adapters.read(trained / "lora/adapter"), run.adapters.spec(run.name).heads
    mine, new = run.adapters.state(run.name), fresh.adapters.state(fresh.name)
    for key, tensor in mine.items():
        expected = stored.tensors[key] if inside(key, heads) is None else new[key]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    assert any("with a new head: its labels are" in note for note in run.notes)


def test_runs_over_one_model_begin_each_with_its_own(trained, tiny, own):
    runs = prepare_together(
        [settings(tiny, own), settings(tiny, own, from_adapter=trained / "lora/adapter"), settings(tiny, own, seed=1)]
    )
    first, begun, other = (run.adapters.state(run.name) for run in runs)
    stored = adapters.read(trained / "lora/adapter").tensors
    assert all(torch.equal(begun[key], tensor) for key, tensor in stored.items())
    assert not all(torch.equal(first[key], tensor) for key, tensor in stored.items())
    assert not all(torch.equal(other[key], tensor) for key, tensor in stored.items())


def test_no_step_from_an_adapter_gives_its_score_again(trained, tiny, own, tmp_path):
    """At a rate of next to nothing the run reports what the adapter scored."""
    before = json.loads((trained / "lora/result.json").read_text())
    after = train(settings(tiny, own, tmp_path / "a", epochs=1, lr=1e-12, from_adapter=trained / "lora/adapter"))
    assert after["metrics"] == pytest.approx(before["metrics"])
    assert after["protocol"]["start"] == "adapter"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rank": 4, "alpha": 64 / 3}, "other shapes"),
        ({"alpha": 5.0}, "its alpha is 16.0, that of the run 5.0"),
        ({"method": "dora"}, "its gain is False"),
        ({"method": "vera", "rank": None}, "its method is lora"),
        ({"targets": "attention"}, "the run has no"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(trained, tiny, own, given, told):
    with pytest.raises(UserError, match=told):
        prepare(settings(tiny, own, from_adapter=trained / "lora/adapter", **given))
    with pytest.raises(UserError, match="holds no adapter"):
        address(settings(tiny, own, from_adapter=trained))


SAME_TENSORS = {  # settings of an adapter -> others of a run, under which its tensors are another update
    "ia3": ({"inputs": ("value",)}, {}),
    "delta-lora": ({"rank": 3, "follow": 1.0}, {"rank": 3, "follow": 9.0}),
    "superlora": ({"rank": 3, "projection": "fastfood"}, {"rank": 3}),
    "vera": ({"projection_seed": 1}, {}),
    "oft": ({"block": 8}, {"block": 8, "terms": 3}),
    "lora": tuple({"ranks": RankMap({QUERY: LayerRank(3, alpha=a), VALUE: 0})} for a in (4.0, 64.0)),
}
SAME_UPDATE = {  # as above, where they are the same update
    "lora": ({"rank": 4, "alpha": 8.0}, {"rank": 4, "alpha": 4.0, "stabilized": True}),
    "delta-lora": ({"rank": 3, "wait": 1}, {"rank": 3, "wait": 5}),
    "adalora": ({"rank": 3, "total_steps": 30}, {"rank": 3, "total_steps": 90, "orthogonality": 0.1}),
    "ia3": ({"inputs": ("value",)}, {"inputs": ("self.value",)}),
    "oft": ({"block": 24}, {"block": 23}),
}


def begun(tiny, folder, method, first, then):
    """A fresh adapter of settings `then`, begun from a saved one of settings `first`."""
    for i, given in enumerate((first, then)):
        adapters = loralab.attach(pretrained(str(tiny), "SEQ_CLS", 2).model, method, targets=[QUERY, VALUE], **given)
        if i == 0:
            adapters.save(folder)
    return begin_from(adapters, "default", folder)


@pytest.mark.parametrize("method", SAME_TENSORS)
def test_settings_under_which_the_tensors_are_another_update_are_refused(tiny, tmp_path, method):
    first, then = SAME_TENSORS[method]
    with pytest.raises(UserError, match="its .* is .*, that of the run .*give the run the method and settings"):
        begun(tiny, tmp_path, method, first, then)
    assert "starts from" in begun(tiny, tmp_path / "same", method, first, first)


@pytest.mark.parametrize("method", SAME_UPDATE)
def test_settings_that_have_no_part_in_the_update_may_differ(tiny, tmp_path, method):
    assert "starts from" in begun(tiny, tmp_path, method, *SAME_UPDATE[method])


def test_the_address_has_the_adapter_and_not_its_place(trained, tiny, own, tmp_path):
    shutil.copytree(trained / "lora/adapter", tmp_path / "copy")
    here, there = (
        address(settings(tiny, own, from_adapter=folder)) for folder in (trained / "lora/adapter", tmp_path / "copy")
    )
    other = address(settings(tiny, own, from_adapter=trained / "dora/adapter"))
    assert here == there
    assert len({here, other, address(settings(tiny, own))}) == 3


def test_a_column_of_a_study_starts_from_an_adapter(trained, tiny, own):
    d = define(
        {
            "tasks": [{"task": str(own["class"]), "text": "sentence", "label": "label"}],
            "models": [str(tiny)],
            "methods": [{"rank": 3}, {"name": "begun", "rank": 3, "from_adapter": "lora/adapter"}],
        },
        "begun",
        trained,
    )
    begun = d.settings(d.tasks[0], d.models[0], d.methods[1], 0, {})
    assert begun.from_adapter == trained / "lora/adapter"


# ---- several rates ---------------------------------------------------------------------------------------------------


def test_the_rate_with_the_best_held_out_score_is_the_result(tiny, own, tmp_path):
    rates = [1e-5, 2e-2, 5e-3]
    tried, best = tune(settings(tiny, own, tmp_path / "t", lr=None), rates)
    alone = {}
    for lr in rates:
        train(settings(tiny, own, tmp_path / f"alone-{lr}", lr=lr))
        lines = (tmp_path / f"alone-{lr}/metrics.jsonl").read_text().splitlines()
        alone[lr] = max(json.loads(line)["held_out"]["accuracy"] for line in lines)
    assert [x.lr for x in tried] == rates
    assert {x.lr: x.held_out for x in tried} == pytest.approx(alone, abs=1e-6)
    there = [x for x in tried if x.why is None]
    assert best.held_out == max(x.held_out for x in there)
    assert best.result == json.loads((best.folder / "result.json").read_text())
    assert (best.folder / "adapter/adapter.json").is_file()
    table = json.loads((tmp_path / "t/tune.json").read_text())
    assert (table["best"], len(table["rates"])) == (best.folder.name, 3)


def test_the_command_prints_the_rates_and_the_winners_folder(tiny, own, tmp_path, capsys):
    flags = ["train", "--task", str(own["class"]), "--text", "sentence", "--label", "label", "--model", str(tiny)]
    flags += ["--epochs", "2", "--max-length", "32", "--batch-size", "20", "--lr", "0.02", "--out", str(tmp_path / "t")]
    assert main([*flags, "--tune"]) == 0
    told = capsys.readouterr().out
    assert told.count("chosen") == 1
    folders = sorted((x.name for x in (tmp_path / "t").iterdir() if x.is_dir()), key=lambda x: float(x[3:]))
    assert folders == ["lr-0.006", "lr-0.02", "lr-0.06", "lr-0.2"]  # the rate times 0.3, 1, 3 and 10
    assert f"run folder: {tmp_path / 't'}/lr-" in told
    assert main([*flags, "--tune"]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main([*flags, "--tune", "--resume"]) == 0
    assert capsys.readouterr().out == told


def test_rates_that_cannot_be_tried_are_refused(tiny, own, tmp_path):
    with pytest.raises(UserError, match="two or more different rates"):
        tune(settings(tiny, own, tmp_path / "a"), [1e-3])
    with pytest.raises(UserError, match="two or more different rates"):
        tune(settings(tiny, own, tmp_path / "a"), [1e-3, 1e-3])
    with pytest.raises(UserError, match="two or more different rates"):
        tune(settings(tiny, own, tmp_path / "a"), [1.00000001e-3, 1e-3])  # their folders would have one name
    with pytest.raises(UserError, match="--lr 0.01 with the rates of --tune"):
        tune(settings(tiny, own, tmp_path / "a", lr=0.01), [1e-3, 1e-2])
    with pytest.raises(UserError, match="held-out rows choose"):
        tune(settings(tiny, own, tmp_path / "a", selection="last"), [])
    with pytest.raises(UserError, match="no rate trained the task"):
        tune(settings(tiny, own, tmp_path / "b", epochs=1, lr=None), [1e-9, 1e-8])
    assert not Path(tmp_path / "a").exists()
