"""Runs that share passes: each comes to what it comes to alone, whatever runs beside it."""

import dataclasses
import json
import math
import re
from collections import defaultdict

import numpy as np
import pytest
import torch

from loralab import UserError
from loralab.active import Stream
from loralab.data.batches import epoch_batches
from loralab.fast import masks
from loralab.run import RunFailed, Settings, sharing, train, train_together
from loralab.run import loop as loop_module
from loralab.run.bar import Bar
from loralab.run.setup import prepare_together
from loralab.run.sharing import alone, grouped
from loralab.run.state import RunState


def settings(tiny, own, out, task="class", **given):
    usual = {"rank": 3, "epochs": 2, "lr": 2e-2, "batch_size": 20, "max_length": 32, "dtype": "float32"}
    column = {"text": ("sentence",), "label": "label"}
    return Settings(**{**usual, "task": str(own[task]), "model": str(tiny), "out": out, **column, **given})


def history(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def flat(value):
    """The numbers in nested tables."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    if isinstance(value, list):
        return [x for entry in value for x in flat(entry)]
    return [math.nan if value is None else float(value)]


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter/adapter.safetensors")


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Everything in float64, where rounding does not grow into another run."""
    prepare = loop_module.prepare_together

    def prepared(many):
        runs = prepare(many)
        runs[0].model.double()
        return runs

    monkeypatch.setattr(loop_module, "prepare_together", prepared)


def check_as_alone(many, tmp_path, tolerance=1e-7):
    """Trains `many` (settings without a folder) together and alone; what they come to."""
    made = [Settings(**{**given, "out": tmp_path / f"together-{i}"}) for i, given in enumerate(many)]
    outcomes = train_together(made)
    for i, (given, outcome) in enumerate(zip(many, outcomes, strict=True)):
        single = train(Settings(**{**given, "out": tmp_path / f"alone-{i}"}))
        assert outcome["time"].pop("together") == len(many)
        assert single["time"].pop("together") == 1
        told = {key: value for key, value in single.items() if key not in ("time", "memory", "metric", "metrics")}
        assert {key: outcome[key] for key in told} == told
        mine, theirs = outcome["memory"]["ledger"], single["memory"]["ledger"]
        assert mine.pop("weights") == pytest.approx(
            theirs.pop("weights"), rel=0.01
        )  # the head beneath has another size
        assert mine == theirs, given["method"]
        mine, theirs = history(tmp_path / f"together-{i}"), history(tmp_path / f"alone-{i}")
        np.testing.assert_allclose(flat(mine), flat(theirs), rtol=0, atol=tolerance, err_msg=str(given))
        a, b = tensors(tmp_path / f"together-{i}"), tensors(tmp_path / f"alone-{i}")
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance)
    return outcomes


def plain(tiny, own, task="class", **given):
    made = settings(tiny, own, None, task, **given)
    return {key: getattr(made, key) for key in made.__dataclass_fields__}


def test_runs_of_other_seeds_rates_tasks_and_sizes_come_to_what_they_come_to_alone(tiny, own, tmp_path):
    """Other seeds have other batches, so widths, heights and masks differ in a pass."""
    check_as_alone(
        [
            plain(tiny, own),
            plain(tiny, own, lr=5e-3),  # the same batches and masks as the first
            plain(tiny, own, seed=1, epochs=3, batch_size=13),
            plain(tiny, own, "value", seed=2, rank=5, schedule="cosine", clip=0.1),
            plain(tiny, own, seed=3, selection="validation", patience=1, head_lr=1e-3),
        ],
        tmp_path,
    )


@pytest.mark.parametrize("store", [None, *(pytest.param(s, marks=pytest.mark.slow) for s in ("int8", "nf4"))])
def test_methods_share_a_pass(tiny, own, tmp_path, store):
    methods = ["lora", "dora", "dylora", "frozen-dylora", "delta-lora", "lora+", "pissa", "lora-fa", "eva", "lora-drop"]
    rank = {"adalora": {}, "vera": {}}
    many = [plain(tiny, own, method=method, seed=i % 3, store=store) for i, method in enumerate(methods)]
    many += [plain(tiny, own, method=method, rank=None, store=store, **rank[method]) for method in rank]
    check_as_alone([m for m in many if not alone(Settings(**m))], tmp_path)


def test_a_start_that_looks_at_gradients_is_that_of_the_run_alone(tiny, own, tmp_path):
    """Gradients depend on the head, which is another one for each seed and task."""
    first = settings(tiny, own, tmp_path / "a")
    many = [first, *(dataclasses.replace(first, method="lora-ga", seed=seed) for seed in (0, 3))]
    many.append(settings(tiny, own, tmp_path / "b", "value", method="lora-ga", seed=3))
    assert [len(group.runs) for group in grouped(many)] == [len(many)]
    for run in prepare_together(many):
        single = prepare_together([run.settings])[0]
        expected = single.adapters.state(single.name)
        for key, t in run.adapters.state(run.name).items():
            torch.testing.assert_close(t, expected[key], rtol=0, atol=0, msg=key)


def test_heads_share_passes(tiny, own, tmp_path):
    check_as_alone([plain(tiny, own, method="head", rank=None, seed=i) for i in range(3)], tmp_path)


def test_every_line_of_a_group_names_its_run(tiny, own, tmp_path, capsys):
    train_together([settings(tiny, own, tmp_path / f"run-{i}", method="head", rank=None) for i in range(2)], Bar())
    lines = [line for line in capsys.readouterr().err.splitlines() if " epoch " in line]
    assert [line.partition(":")[0] for line in lines] == ["run-0", "run-1"] * 2
    train(settings(tiny, own, tmp_path / "alone", method="head", rank=None), Bar())
    assert "alone:" not in capsys.readouterr().err


def test_with_little_memory_for_a_pass_there_are_more_passes_and_the_same_steps(tiny, own, tmp_path, monkeypatch):
    monkeypatch.setitem(sharing.PASS_BYTES, "cpu", 1e6)  # about two of these batches
    check_as_alone(
        [plain(tiny, own, seed=i, method=m) for i, m in enumerate(("lora", "dora", "lora", "pissa"))], tmp_path
    )


def test_passes_take_runs_of_similar_width_up_to_their_memory(tiny, own, tmp_path, monkeypatch):
    taken, order = [], defaultdict(list)
    forward = loop_module.Loop._forward

    def counted(self, states, parts):
        taken.append([state.run.name for state in states])
        for state, (rows, chosen) in zip(states, parts, strict=True):
            if rows is state.run.train:
                order[state.run.name].append(chosen)
        return forward(self, states, parts)

    monkeypatch.setattr(loop_module.Loop, "_forward", counted)
    train_together([settings(tiny, own, tmp_path / str(i), seed=i, epochs=1) for i in range(3)])
    assert sorted(taken[:3]) == [["run-0"], ["run-1"], ["run-2"]]  # each is measured alone
    assert all(len(names) == 3 for names in taken[3:])
    lengths = [0] * 173  # rows of train; batches of like length do not matter here
    for i in range(3):
        batches = epoch_batches(lengths, 20, i, 0)
        assert sorted(map(len, order[f"run-{i}"])) == sorted(map(len, batches))
        assert sorted(row for batch in order[f"run-{i}"] for row in batch) == list(range(173))
    assert order["run-0"] != order["run-1"]


def test_a_group_that_was_cut_off_goes_on_together_or_alone_to_the_same(tiny, own, tmp_path, cut_off):
    many = [{"seed": 0, "method": "dylora"}, {"seed": 1, "method": "adalora", "rank": None}, {"seed": 2, "epochs": 3}]

    def group(kind, resume=False):
        return [settings(tiny, own, tmp_path / f"{kind}-{i}", resume=resume, **m) for i, m in enumerate(many)]

    whole = train_together(group("whole"))
    with cut_off(14), pytest.raises(KeyboardInterrupt):
        train_together(group("cut"))
    first, *rest = group("cut", resume=True)
    gone_on = [train(first), *train_together(rest)]
    for i, (a, b) in enumerate(zip(whole, gone_on, strict=True)):
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-7)
        mine, theirs = tensors(tmp_path / f"whole-{i}"), tensors(tmp_path / f"cut-{i}")
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-7)


def test_a_run_that_diverges_ends_and_the_others_go_on(tiny, own, tmp_path):
    first, second = train_together(
        [settings(tiny, own, tmp_path / "a", lr=1e30, clip=0.0), settings(tiny, own, tmp_path / "b")]
    )
    assert isinstance(first, UserError)
    assert "loss is nan" in str(first)
    assert not (tmp_path / "a/result.json").exists()
    assert second["metric"] == train(settings(tiny, own, tmp_path / "alone"))["metric"]


def boom(states, name):
    if any(state.settings.folder.name == name for state in states):
        raise MemoryError("no more")


def check_that_only_b_failed(tiny, own, tmp_path, outcomes):
    first, failed, third = outcomes
    assert isinstance(failed, RunFailed)
    assert re.fullmatch(
        r".*b failed: MemoryError: no more; it needs .*; its traceback is in .*b/traceback.txt", str(failed)
    )
    assert "boom" in failed.traceback == (tmp_path / "b/traceback.txt").read_text()
    assert not (tmp_path / "b/result.json").exists()
    for outcome, name, seed in ((first, "a", 0), (third, "c", 2)):
        alone = train(settings(tiny, own, tmp_path / f"alone-{name}", seed=seed))
        assert outcome["metric"] == alone["metric"]
        a, b = tensors(tmp_path / name), tensors(tmp_path / f"alone-{name}")
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize(("where", "step"), [("pass", 1), ("pass", 13), ("step", 4), ("checkpoint", 9)])
def test_an_exception_ends_its_run_keeps_its_traceback_and_the_others_go_on(
    tiny, own, tmp_path, monkeypatch, where, step
):
    """In a pass that several share nobody knows whose it was, so they go on alone; else the others are not touched."""
    owner, name = {
        "pass": (loop_module.Loop, "_backward"),
        "step": (RunState, "step"),
        "checkpoint": (RunState, "save_checkpoint"),
    }[where]
    real = getattr(owner, name)

    def broken(self, *given):
        states = given[0] if where == "pass" else [self]
        if max(state.progress.step for state in states) + 1 >= step:
            boom(states, "b")
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        outcomes = train_together([settings(tiny, own, tmp_path / name, seed=i) for i, name in enumerate("abc")])
    check_that_only_b_failed(tiny, own, tmp_path, outcomes)
    train(settings(tiny, own, tmp_path / "b", seed=1, resume=True))  # what was wrong is mended
    assert not (tmp_path / "b/traceback.txt").exists()


def test_a_run_that_cannot_be_prepared_does_not_keep_the_others_from_training(tiny, own, tmp_path):
    many = [settings(tiny, own, tmp_path / name, seed=i) for i, name in enumerate("abc")]
    many[1] = dataclasses.replace(many[1], rank=99)
    first, refused, third = train_together(many)
    assert "rank 99" in str(refused)
    assert not (tmp_path / "b").exists()
    assert first["time"]["together"] == third["time"]["together"] == 1


def test_what_a_reporter_raises_ends_the_training(tiny, own, tmp_path):
    """A search gives up a run this way, and later goes on with it."""

    class Stop(Bar):
        def epoch(self, *_):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(settings(tiny, own, tmp_path / "a"), Stop())
    assert (tmp_path / "a/checkpoint/progress.json").is_file()
    assert not (tmp_path / "a/.lock").exists()


def test_finished_runs_of_a_group_are_read_and_not_run_again(tiny, own, tmp_path):
    done = train(settings(tiny, own, tmp_path / "a"))
    again, fresh = train_together(
        [settings(tiny, own, tmp_path / "a", resume=True), settings(tiny, own, tmp_path / "b", seed=1)]
    )
    assert again == done
    assert fresh["time"]["together"] == 1


def test_runs_that_cannot_share_say_why(tiny, own, tmp_path):
    given = {"bitfit": {}, "full": {}, "loftq": {}, "lora": {"dropout": 0.1}, "lokr": {}, "dora": {"speed": "off"}}
    groups = grouped([settings(tiny, own, None, method=m, rank=None, **g) for m, g in given.items()])
    assert {g.runs[0].method: g.why for g in groups} == {
        "bitfit": "bitfit trains the base itself",
        "full": "full trains the base itself",
        "loftq": "start loftq looks at the weight that nf4 rounds away",
        "lokr": "lokr adds no low-rank products, so its layers take the plain path",
        "lora": "dropout=0.1 on the adapter's input has no stream of its own",
        "dora": "speed is off",
    }


def test_groups_are_of_one_base_and_like_ranks_with_like_batches_side_by_side(tiny, own):
    made = [settings(tiny, own, None, seed=i % 2, lr=10.0**-i, method=m) for i in range(4) for m in ("lora", "dora")]
    made += [settings(tiny, own, None, rank=9), settings(tiny, own, None, method="qlora")]
    sizes = [[(s.method, s.seed, s.rank) for s in g.runs] for g in grouped(made, most=5)]
    assert sorted(map(len, sizes)) == [1, 1, 4, 4]
    assert [seed for seeds in sizes[:2] for _, seed, _ in seeds] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(12, 7), (12, 5, 7), (12, 3, 5, 5)])
def test_each_stream_gets_the_mask_it_gets_alone(shape):
    def streams():
        sizes = [(3, 5), (4, 4), (4, 5)]
        return [Stream(torch.Generator().manual_seed(7 + i), *size) for i, size in enumerate(sizes)]

    whole = masks.mask(torch.empty(shape), 0.4, streams()).view(3, 4, *shape[1:])
    if len(shape) > 2:  # the last run's part is whole; in the first and second one what pads is kept, not dropped
        outside = whole.clone()
        outside[0, :3, ..., :5, : 7 if len(shape) == 3 else 5] = 1
        assert torch.equal(outside[0], torch.ones_like(outside[0]))
    for stream, part in zip(streams(), whole, strict=True):
        tokens = {2: [7], 3: [stream.tokens, 7], 4: [3, stream.tokens, stream.tokens]}[len(shape)]
        alone = masks.mask(torch.empty(stream.rows, *tokens), 0.4, [stream])
        assert torch.equal(part[tuple(map(slice, alone.shape))], alone)
