"""The bench: its arithmetic, its count of products, that both sides do the same work, and the command end to end."""

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from archs import build, rows
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import loralab
from loralab import models
from loralab.bench import conduct, products, told
from loralab.bench.cases import Case, growth
from loralab.bench.conduct import Bench, turn, workers
from loralab.bench.sides import METHODS, batch, shorten, stepper, under_peft
from loralab.bench.spread import ratio, spread
from loralab.cli import main
from loralab.errors import UserError
from loralab.fast.machine import rate
from loralab.run.estimate import EstimateSettings, estimate

pytest.importorskip("peft")
RANK = 3
WITH_PEFT = [m for m in METHODS if m != "qlora" or find_spec("bitsandbytes")]


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 50])
def test_spreads_and_ratios_are_those_of_numpy(n):
    a, b = np.random.default_rng(n).uniform(0.5, 9, (2, n))
    for ours, values in ((spread(a.tolist()), a), (ratio(a.tolist(), b.tolist()), a / b)):
        assert (ours.low, ours.median, ours.high) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))
        assert ours.n == n


def test_turns_are_as_long_as_they_should_be():
    for step in (0.004, 0.07, 0.31, 0.6, 9.0):
        t = turn(step)
        assert t["timed"] == conduct.MOST or t["timed"] * step >= min(conduct.TURN, step)
        assert t["timed"] == 1 or (t["timed"] - 1) * step < conduct.TURN


def test_growth_changes_one_thing_at_a_time():
    base = Case(length=17, rank=5)
    for axis, cases in growth(base, (1, 9), (1, 2), (4, 8)).items():
        assert [replace(case, **{axis: getattr(base, axis)}) for case in cases] == [base] * 2
        assert len({getattr(case, axis) for case in cases}) == 2


# ---- products --------------------------------------------------------------------------------------------------------


def sides(kind, method, targets):
    """(PEFT's model, loralab's adapters) on the same weights."""
    case = SimpleNamespace(
        method=method, targets=targets, dtype="float32", rank=RANK if METHODS[method].config else None
    )
    plain, theirs = build(kind), build(kind)
    for model in (plain, theirs):
        model.config._attn_implementation = "eager"  # its products are then seen one by one
    extra = {} if case.rank is None else {"rank": RANK}
    return under_peft(theirs, case).model, loralab.attach(plain, method, targets=targets, head=True, **extra)


def executed(model, inputs):
    """Operations that torch counts in a step, what the optimizer does left out."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model.train()(**inputs).logits, torch.zeros(len(inputs["input_ids"]), dtype=int)).backward()
    return counter.get_total_flops()


def extra_of_dora_in_peft(adapters):
    """PEFT makes B A of a layer from a square matrix of ones on the diagonal, where the norm needs its rows alone."""
    return sum(
        2 * RANK * i * (i + o) - 2 * (RANK * i * o + RANK * RANK * (i + o))
        for i, o in ((m.in_features, m.out_features) for m in adapters.layers.values())
    )


def calls(adapters, inputs):
    """(rows of its input, layer) of every adapted layer; a pooler sees one token of a row."""
    tokens, one = inputs["input_ids"].numel(), len(inputs["input_ids"])
    return [(one if "pooler" in path else tokens, m) for path, m in adapters.layers.items()]


def extra_of_vera(adapters, inputs):
    """The gradients of d and b here go through those of d A and b B, (r, in) and (out, r)."""
    return sum(2 * n * RANK * (m.in_features + m.out_features) for n, m in calls(adapters, inputs))


def hidden_in_bitsandbytes(adapters, inputs):
    """W x of a 4 bit weight is one operator of its own, into which torch's counter does not see."""
    return sum(2 * n * m.in_features * m.out_features for n, m in calls(adapters, inputs))


@pytest.mark.parametrize("targets", ["all-linear", "attention-qv"])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize("method", WITH_PEFT)
def test_products_needed_are_those_that_torch_counts(kind, method, targets):
    theirs, adapters = sides(kind, method, targets)
    inputs = rows()
    needed = products.needed(adapters, inputs)
    more_theirs = extra_of_dora_in_peft(adapters) if method == "dora" else 0
    more_theirs -= hidden_in_bitsandbytes(adapters, inputs) if method == "qlora" else 0
    more_ours = extra_of_vera(adapters, inputs) if method == "vera" else 0
    assert executed(theirs, inputs) == needed + more_theirs
    assert executed(adapters.model, inputs) == needed + more_ours


@pytest.mark.parametrize("method", ["lora", "dora", "head"])
def test_a_plan_counts_the_products_that_a_step_needs(tiny, method):
    made = EstimateSettings(model=str(tiny), method=method, batch_size=5, max_length=11, speed="off", dtype="float32")
    planned = estimate(made)
    model, _ = models.classifier(str(tiny), 2, False, torch.float32, seed=0)
    adapters = loralab.attach(model, method, head=True)
    ids = torch.ones(5, 11, dtype=torch.long)
    assert planned.products == products.needed(adapters, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_the_rate_is_no_faster_than_the_clock():
    import time

    started = time.perf_counter()
    found = rate(torch.float32, 256)
    assert 0 < 2 * 256**3 / found < time.perf_counter() - started


# ---- the same work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_PEFT)
def test_both_sides_start_alike_and_train_as_many_values(method):
    theirs, adapters = sides("bert", method, "all-linear")
    inputs, model = rows(), adapters.model
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == adapters.counts()["trainable"]
    with torch.no_grad():
        a, b = (m.train()(**inputs).logits for m in (theirs, model))  # without dropout; Linear4bit packs in eval mode
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_batch_is_a_quarter_padded_and_the_same_each_time():
    case, config = Case(length=12, batch_size=8), SimpleNamespace(vocab_size=101, pad_token_id=1)
    (inputs, labels), (again, _) = batch(case, config), batch(case, config)
    assert inputs["attention_mask"].sum(1).tolist() == [9, 9, *[12] * 6]
    assert ((inputs["input_ids"] == 1) == (inputs["attention_mask"] == 0)).all()
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert set(labels.tolist()) <= {0, 1}


def test_a_step_learns_what_it_should_and_no_more():
    theirs, adapters = sides("bert", "lora-fa", "all-linear")
    case = Case(length=7, batch_size=4)
    for model in (theirs, adapters.model):
        built = SimpleNamespace(model=model, learned=[p for p in model.parameters() if p.requires_grad], autocast=False)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        stepper(built, *batch(case, model.config))()
        moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
        assert moved
        assert moved <= {key for key, p in model.named_parameters() if p.requires_grad}


def test_an_encoder_is_cut_to_its_first_layers():
    model = build("mpnet")
    first = model.mpnet.encoder.layer[0]
    shorten(model, 1)
    assert list(model.mpnet.encoder.layer) == [first]
    assert model(**rows()).logits.isfinite().all()
    with pytest.raises(UserError, match="--layers 5: MPNetForSequenceClassification has 1"):
        shorten(model, 5)


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # it starts three processes
def test_a_bench_of_a_tiny_model(tiny, tmp_path, capsys):
    argv = ["bench", "--models", str(tiny), "--methods", "lora", "--lengths", "9", "--dtypes", "float32"]
    argv += ["--batch-size", "4", "--repeats", "2", "--threads", "1", "--out", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out/bench.json").read_text())
    (row,) = result["steps"]
    for side in told.SIDES:
        assert len(row["seconds"][side]["turns"]) == 2
        assert row["memory"][side]["peak"] >= row["memory"][side]["training"] > 0
        taken = row["seconds"][side]["median"] * row["rate"]
        assert row["fraction"][side] == pytest.approx(row["operations"] / taken)
    turns = [np.array(row["seconds"][side]["turns"]) for side in told.SIDES]
    assert row["faster"]["median"] == pytest.approx(float(np.median(turns[0] / turns[1])))
    assert len(set(row["trainable"].values())) == 1
    assert {"loralab", "peft", "torch", "transformers", "python"} <= set(result["versions"])
    assert result["machine"]["threads"] == 1
    (_, columns, cells, _), page = told.tables(result)[0], (tmp_path / "out/bench.md").read_text()
    assert f"| {' | '.join(cells[0])} |" in page
    assert len(columns) == len(cells[0])
    assert str(tmp_path) not in page
    assert find_spec("matplotlib") is None or (tmp_path / "out/steps.png").stat().st_size > 0


@pytest.mark.slow
def test_an_epoch_of_a_tiny_model(tiny, own, tmp_path, capsys):
    argv = ["bench", "--epoch", "--tasks", "minimal-pairs", "--rows", "20", "--models", str(tiny), "--methods", "lora"]
    argv += ["--batch-size", "8", "--dtypes", "float32", "--repeats", "1", "--threads", "1", "--markdown"]
    argv += ["--max-length", "38"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "| minimal-pairs | lora |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out/bench.json").read_text())["epochs"]
    assert row["rows"] == {"peft": 20, "loralab": 20}


# ---- errors ----------------------------------------------------------------------------------------------------------

WRONG = {
    "method": (["--methods", "lorra"], "--methods 'lorra' (did you mean 'lora'?): bench knows lora, dora, vera"),
    "model": (["--models", "./nowhere"], "no folder './nowhere'"),
    "dtype": (["--dtypes", "float16"], "--dtypes 'float16'"),
    "length": (["--lengths", "0"], "--lengths 0: expected 1 or more"),
    "repeats": (["--repeats", "0"], "--repeats 0: expected 1 or more"),
    "both": (["--epoch", "--cost"], "--epoch and --cost are two benches"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line(what, tiny, tmp_path, capsys):
    flags, told_line = WRONG[what]
    models = [] if what == "model" else ["--models", str(tiny)]
    assert main(["bench", *models, *flags, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert told_line in err
    assert err.count("\n") == 1


def test_nothing_but_a_bench_is_written_over(tiny, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["bench", "--models", str(tiny), "--out", str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_peft_the_install_line_is_told(monkeypatch):
    monkeypatch.setattr(conduct, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"PEFT, which is not installed: pip install 'peft==0\.21"):
        Bench()


def test_a_side_tells_a_users_error_and_goes_on(tiny):
    with workers("loralab", threads=1) as (worker,):
        with pytest.raises(UserError, match="--layers 9: BertForSequenceClassification has 2"):
            worker.ask("build", case=vars(Case(model=str(tiny), layers=9)))
        assert worker.ask("facts")["machine"]["threads"] == 1
        worker.process.kill()
        with pytest.raises(UserError, match="the process of loralab ended at 'facts'"):
            worker.ask("facts")
