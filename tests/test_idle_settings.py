"""Every setting of a run changes it, or is refused with the reason, or a note says that it does nothing."""

import dataclasses

import pytest
from conftest import tiny_model
from safetensors.torch import load_file
from test_train import settings, tensors, train

from loralab import UserError
from loralab.fast.machine import fast_bfloat16
from loralab.rankmap import LayerRank, RankMap
from loralab.run.settings import BELONGS, NOT_RESULT, NOTED, SOURCE, Settings

LAYER = "bert.encoder.layer.0.attention.self.query"
CHANGES = {  # setting -> a value with which a short run comes to other bits
    "method": "dora", "rank": 2, "alpha": 3.0, "targets": "attention", "lr": 0.03, "lr_ratio": 3.0, "head_lr": 0.003,
    "dropout": 0.3, "set": ("stabilized=true",), "store": "int8", "policy": "groups", "seed": 3, "epochs": 2,
    "batch_size": 15, "max_length": 4, "weight_decay": 0.9, "schedule": "constant", "warmup": 0.4, "clip": 0.01,
    "train_rows": 50, "validation_rows": 20, "selection": "last", "speed": "off", "max_steps": 7,
    "checkpointing": True, "class_weights": "balanced",
    "dtype": "float32" if fast_bfloat16() else "bfloat16",
}  # fmt: skip
NO_BITS = {"accumulate", "generate_metric", "select_by"}  # the gradient is the same, or there is none any more
ELSEWHERE = {  # setting -> the tests that show what it does
    "held_out": "test_endpoints.py", "from_adapter": "test_begin.py", "pack": "test_objectives.py",
    "eval_every": "test_objectives.py", "max_time": "test_objectives.py",
}  # fmt: skip
WITH = {  # setting -> (where it does nothing, where it does something), each beside the setting
    "keep": ({"keep": 0.5}, [{}, {"policy": "alora"}, {"set": ("policy=groups",)}],
             [{"policy": "drop"}, {"method": "lora-drop"}]),
    "rounds": ({"rounds": 2}, [{}, {"policy": "drop"}, {"method": "lora-drop"}],
               [{"method": "alora"}, {"set": ("policy=alora",)}]),
    "span": ({"span": 3}, [{}, {"policy": "alora"}], [{"policy": "groups"}]),
    "policy": ({"policy": "drop"}, [{"ranks": True}], [{}]),
    "warmup": ({"warmup": 0.3}, [{"schedule": "constant"}], [{}, {"schedule": "cosine"}]),
    "patience": ({"patience": 2}, [{"selection": "last"}], [{}, {"selection": "validation"}]),
    "targets": ({"targets": "mlp"}, [{"method": "full", "rank": None}, {"method": "bitfit", "rank": None}],
                [{}, {"method": "vera"}]),
    "exclude": ({"exclude": ("output",)}, [{"method": "full", "rank": None}, {"method": "bitfit", "rank": None}],
                [{}, {"method": "vera"}]),
    "generate_rows": ({"generate_rows": 9}, [{}], [{"generate_metric": "exact"}]),
    "data": ({"data": "here"}, [{}, {"task": "minimal-pairs"}], [{"task": "CoLA"}, {"task": "sts-b"}]),
}  # fmt: skip


def test_the_table_names_settings_and_no_setting_is_forgotten():
    fields = {f.name for f in dataclasses.fields(Settings)}
    assert set(BELONGS) == set(WITH) <= fields
    assert fields == set(CHANGES) | NO_BITS | set(WITH) | NOT_RESULT | set(SOURCE) | {
        *ELSEWHERE,
        "model",
        "ranks",
        "attention",
    }


@pytest.fixture
def given(tmp_path):
    ranks = tmp_path / "ranks.json"
    RankMap({LAYER: LayerRank(3)}).save(ranks)

    def fill(values):
        return values | ({"ranks": ranks} if values.get("ranks") else {})

    return fill


@pytest.mark.parametrize("key", WITH)
def test_a_setting_that_belongs_to_what_is_not_chosen_is_refused_or_noted(key, given):
    own, idle, used = WITH[key]
    for others in idle:
        values = {"task": "t.csv", **given(others), **own}
        if key in NOTED:
            assert set(Settings(**values).idle()) == {key}
        else:
            with pytest.raises(UserError, match=f"{key}={own[key]} with ") as caught:
                Settings(**values)
            assert "leave" in str(caught.value) or "so none" in str(caught.value)
    for others in used:
        assert Settings(**{"task": "t.csv", **given(others), **own}).idle() == {}
    # at its default nothing is said, and what it is refused with may still be set alone
    for others in idle:
        assert Settings(**{"task": "t.csv", **given(others)}).idle() == {}


def test_a_run_notes_what_does_nothing(tiny, own, tmp_path):
    result = train(settings(tiny, own, tmp_path / "r", method="head", targets="attention", data=tmp_path, epochs=1))
    assert [note.partition(" with ")[0] for note in result["notes"] if " with " in note] == [
        "targets=attention",
        f"data={tmp_path}",
    ]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory, own):
    """The adapter and the predictions of a run that every setting can change: several batches, steps and layers."""
    model = tiny_model(tmp_path_factory.mktemp("model"))

    def run(folder, **values):
        usual = {"epochs": 3, "rank": 3, "selection": "held-out", "clip": 1.0}
        result = train(settings(model, own, folder, **usual | values))
        predictions = {f"predicted {key}": t for key, t in load_file(folder / "predictions.safetensors").items()}
        return tensors(folder) | predictions, result

    return run


def same(one, other):
    (a, first), (b, second) = one, other
    return (
        first["selected_epoch"] == second["selected_epoch"]
        and a.keys() == b.keys()
        and all(a[k].equal(b[k]) for k in a)
    )


@pytest.mark.slow
def test_every_other_setting_changes_the_run(plainly, tmp_path):
    usual = plainly(tmp_path / "usual")
    assert same(usual, plainly(tmp_path / "again"))
    alike = [key for key, value in CHANGES.items() if same(usual, plainly(tmp_path / key, **{key: value}))]
    assert alike == []


def test_attention_that_the_fast_path_computes_itself_is_noted(plainly, tmp_path):
    eager, other = plainly(tmp_path / "a", attention="eager", speed="off"), plainly(tmp_path / "b", speed="off")
    assert not same(eager, other)
    assert not any("attention" in note for note in eager[1]["notes"])
    _, result = plainly(tmp_path / "c", attention="eager", epochs=1)
    assert any("attention='eager' with speed='auto': " in note for note in result["notes"])


def test_a_batch_larger_than_the_data_is_said(tiny, own, tmp_path):
    """The usual batch over few rows means few steps, which is why such a run learns nothing."""
    result = train(settings(tiny, own, tmp_path / "r", batch_size=500, epochs=2))
    (note,) = [note for note in result["notes"] if note.startswith("batch_size=500 is more than the ")]
    assert "an epoch is one step of all of them, so the run has 2 steps" in note
    exactly = result["protocol"]["train"]
    assert not any("is more than" in n for n in train(settings(tiny, own, tmp_path / "s", batch_size=exactly))["notes"])
