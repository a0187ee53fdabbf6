"""A run within a given memory: what is chosen fits, the step stays the step, and what cannot be is refused."""

import json
import shutil
from dataclasses import replace

import pytest

from loralab.cli import main
from loralab.run import Settings, train
from loralab.run import estimate as estimate_module
from loralab.run.estimate import EstimateSettings
from loralab.run.fit import WAYS, fit, ladder
from loralab.run.records import read_facts


@pytest.fixture(scope="module")
def calm(tiny, tmp_path_factory):
    """The tiny model without dropout, whose masks would differ from part to part."""
    folder = tmp_path_factory.mktemp("calm") / "tiny"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {key: 0.0 for key in config if "dropout_prob" in key}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def tensors_alone():
    """Estimates are of the tensors alone: what this machine's malloc adds takes a process each, and varies a little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate_module.heap, "resident", lambda *_: None)
        yield


def step(calm, **given):
    return EstimateSettings(**{"model": str(calm), "batch_size": 12, "max_length": 32, "dtype": "float32", **given})


def settings(calm, own, out, **given):
    usual = {"rank": 3, "epochs": 1, "lr": 2e-2, "batch_size": 40, "max_length": 32, "dtype": "float32"}
    column = {"text": ("sentence",), "label": "label", "task": str(own["class"])}
    return Settings(**{**usual, "model": str(calm), "out": out, **column, **given})


def test_the_ladder_goes_from_what_costs_least_and_keeps_the_batch(calm):
    """Nothing fits in a byte: each way is tried with the whole batch and with a row at a time, and no more."""
    everything = list(ladder(step(calm), 1))
    assert everything[0].settings == {"accumulate": 1}
    ways = list(dict.fromkeys(json.dumps(rung.changes) for rung in everything))
    assert ways == [json.dumps(way) for way in WAYS if json.dumps(way) in ways]
    assert ways[:2] == ["{}", '{"checkpointing": true}']
    assert [(rung.parts, rung.rows) for rung in everything] == [(1, 12), (12, 1)] * len(ways)


@pytest.mark.parametrize(("rows", "way"), [(12, 0), (3, 0), (1, 1)])
def test_what_is_chosen_is_the_first_that_fits(calm, monkeypatch, rows, way):
    monkeypatch.setattr("loralab.run.fit.WAYS", WAYS[way : way + 1])
    room = estimate_module.estimate(step(calm, **WAYS[way], batch_size=rows)).peak
    tried = list(ladder(step(calm), room))
    assert tried[-1].fits
    assert tried[-1].estimate.peak <= room
    assert not any(rung.fits for rung in tried[:-1])
    assert [rung.rows for rung in tried] == [n for n in (12, 6, 3, 2, 1) if n >= rows]
    for rung in tried:
        largest = max(len(range(12)[i :: rung.parts]) for i in range(rung.parts))  # as a run takes them
        assert rung.rows == rung.estimate.settings.batch_size == largest


@pytest.mark.slow
def test_what_is_given_stays_and_parts_begin_with_what_is_given(calm):
    given = list(ladder(step(calm, store="int8", batch_size=6), 1, parts=4))
    assert [json.dumps(rung.changes) for rung in given] == ["{}"] * 2 + ['{"checkpointing": true}'] * 2
    assert [rung.parts for rung in given] == [4, 6] * 2
    whole = list(ladder(step(calm, checkpointing=True, batch_size=6), 1, divisible=False))
    assert {rung.parts for rung in whole} == {1}
    assert not any("checkpointing" in rung.changes for rung in whole)
    choices = list(ladder(step(calm, batch_size=6), 1, sequences=4))
    assert [rung.estimate.settings.batch_size for rung in choices[:2]] == [24, 4]


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_within_memory_is_the_run_itself(calm, own, tmp_path, monkeypatch, checkpointing):
    """It takes the numbers of the plain run to rounding, with parts alone and with activations that are recomputed."""
    if checkpointing:
        monkeypatch.setattr("loralab.run.fit.WAYS", WAYS[1:2])
    s = settings(calm, own, tmp_path / "plain")
    first = fit(s, 10**12)
    assert len(first) == 1
    *_, chosen = fit(s, first[0].estimate.peak - 1)
    assert chosen.parts > 1
    assert chosen.changes == ({"checkpointing": True} if checkpointing else {})
    train(s)
    train(replace(s, out=tmp_path / "fit", **chosen.settings))
    plain, other = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("plain", "fit"))
    assert other["step"] == plain["step"]
    assert other["train_loss"] == pytest.approx(plain["train_loss"], abs=2e-6)
    assert other["validation"] == plain["validation"]


def flags(calm, own, out, *more):
    columns = [
        "--text",
        "sentence",
        "--label",
        "label",
        "--rank",
        "3",
        "--epochs",
        "1",
        "--batch-size",
        "40",
        "--max-length",
        "32",
    ]
    return ["train", "--task", str(own["class"]), "--model", str(calm), *columns, "--out", str(out), *more]


def test_the_command_says_what_it_chose_and_goes_on_with_it(calm, own, tmp_path, capsys, cut_off):
    room = fit(settings(calm, own, tmp_path / "x", dtype="auto"), 10**12)[0].estimate.peak - 1
    out = tmp_path / "run"
    with cut_off(3):
        assert main(flags(calm, own, out, "--memory", f"{room}B", "--checkpoint-every", "1")) == 130
    err = capsys.readouterr().err
    assert "memory: --accumulate" in err
    assert "rows at a time: a step takes about" in err
    accumulate = read_facts(out)["settings"]["accumulate"]
    assert accumulate > 1
    assert main(flags(calm, own, out, "--memory", "900GB", "--resume", "--json")) == 0
    assert read_facts(out)["settings"]["accumulate"] == accumulate


def test_what_cannot_fit_is_refused_with_the_least(calm, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loralab.run.fit.WAYS", WAYS[:1])
    assert main(flags(calm, own, tmp_path / "a", "--memory", "1MB")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("--memory 1 MB is too little", "a step of 40 rows of up to", "at least (", "give it that"):
        assert part in line
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_plan_shows_the_ladder(calm, capsys):
    given = ["plan", "--model", str(calm), "--batch-size", "12", "--max-length", "32", "--dtype", "float32"]
    assert main([*given, "--memory", "30MB", "--json"]) == 0
    (rung,) = json.loads(capsys.readouterr().out)["ladder"]
    assert (rung["accumulate"], rung["fits"]) == (1, True)
    assert main([*given, "--memory", f"{rung['peak'] - 1}B"]) == 0
    out = capsys.readouterr().out
    assert "`loralab train --memory" in out
    assert "--accumulate 2, 6 rows at a time" in out
