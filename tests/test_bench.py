"""The bench: its arithmetic, its count of products, that both sides do the same work, and the command end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from archs import build, rows
from test_objectives import bases  # noqa: F401  (fixture)
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import loralab
from loralab import models
from loralab.bench import Bench, Case, EpochCase, MixedCase, backends, measure, mixed, profile, roofline, tables
from loralab.bench.backends import BACKENDS, Built, batch, shorten, stepper, under_peft
from loralab.bench.cases import PEFT_METHODS, epochs, from_json, grid, growth, mixed_case
from loralab.bench.flops import Product, step_flops, step_products
from loralab.bench.measure import NAMES, quartiles, ratio, turn, workers
from loralab.cli import main
from loralab.errors import UserError
from loralab.fast import heap
from loralab.fast.machine import rate
from loralab.layer import Adapted
from loralab.objectives import OBJECTIVES
from loralab.run.estimate import EstimateSettings, estimate
from loralab.run.step import forward_loss

pytest.importorskip("peft")
RANK = 3
WITH_PEFT = [m for m in PEFT_METHODS if m != "qlora" or find_spec("bitsandbytes")]


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 50])
def test_quartiles_and_ratios_are_those_of_numpy(n):
    a, b = np.random.default_rng(n).uniform(0.5, 9, (2, n))
    for ours, values in ((quartiles(a.tolist()), a), (ratio(a.tolist(), b.tolist()), a / b)):
        assert (ours.low, ours.median, ours.high) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))
        assert ours.n == n


def test_turns_are_as_long_as_they_should_be():
    for step in (0.004, 0.07, 0.31, 0.6, 9.0):
        t = turn(step)
        assert t["timed"] == measure.MOST or t["timed"] * step >= min(measure.TURN, step)
        assert t["timed"] == 1 or (t["timed"] - 1) * step < measure.TURN


def test_growth_changes_one_thing_at_a_time():
    base = Case(max_length=17, rank=5)
    for axis, cases in growth(base, (1, 9), (1, 2), (4, 8)).items():
        assert [replace(case, **{axis: getattr(base, axis)}) for case in cases] == [base] * 2
        assert len({getattr(case, axis) for case in cases}) == 2


def test_a_case_survives_json():
    for case in (
        Case(model="a", method="dora", max_length=9, rank=3, layers=2),
        EpochCase(task="cola", together=4, train_rows=7),
        mixed_case(Case(max_length=9, batch_size=5), 11),
    ):
        assert from_json(type(case), json.loads(json.dumps(case.to_json()))) == case


def test_grids_are_every_combination(tiny):
    cases = grid([str(tiny)], ["lora", "full"], ["attention"], [8, 9], ["float32"], 5)
    assert {(c.method, c.max_length) for c in cases} == {(m, n) for m in ("lora", "full") for n in (8, 9)}
    assert all((c.model, c.targets, c.batch_size) == (str(tiny), "attention", 5) for c in cases)
    made = epochs(cases, ["cola", "rte"], None, 30, 48, (1, 4))
    assert len(made) == 2 * 2 * 2  # the length of a case is none of an epoch's
    assert {(e.task, e.method, e.together) for e in made} == {
        (task, method, count) for task in ("cola", "rte") for method in ("lora", "full") for count in (1, 4)
    }
    assert all((e.train_rows, e.max_length, e.epochs, e.selection) == (30, 48, 1, "last") for e in made)


FAULTS = """
import resource, sys, torch
from loralab.bench.backends import BACKENDS
from loralab.bench.cases import Case
backend, model, allocator = sys.argv[1:]
BACKENDS[backend](Case(model=model, rank=3, max_length=16, dtype="float32", allocator=allocator))
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(12):
    if i == 4: before = faults()  # the first find their places between small blocks
    torch.ones(20 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(heap.problem() is not None, reason=str(heap.problem()))
def test_both_sides_keep_freed_memory_unless_peft_has_its_own_allocator(tiny):
    def asked(backend, allocator):
        command = [sys.executable, "-c", FAULTS, backend, str(tiny), allocator]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    own = asked("peft", "own")
    assert asked("peft", "equal") * 4 < own
    assert asked("loralab", "equal") * 4 < own


@pytest.mark.parametrize("key", ["alpha", "lr_ratio", "dropout", "store"])
def test_a_case_has_only_settings_that_peft_takes_too(key):
    value = "int8" if key == "store" else 2.0
    with pytest.raises(UserError, match=f"{key}={value}: bench measures a method with its own {key}"):
        Case(**{key: value})


# ---- products --------------------------------------------------------------------------------------------------------


def pair(kind, method, targets):
    """(PEFT's model, loralab's adapters) on the same weights."""
    rank = RANK if PEFT_METHODS[method].config else None
    case = Case(method=method, targets=targets, dtype="float32", allocator="own", rank=rank)
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
@pytest.mark.parametrize("kind", ["bert", "mpnet", "llama"])
@pytest.mark.parametrize("method", WITH_PEFT)
def test_products_needed_are_those_that_torch_counts(kind, method, targets):
    theirs, adapters = pair(kind, method, targets)
    inputs = rows()
    needed = step_flops(adapters, inputs)
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
    assert planned.products == step_flops(adapters, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_the_rate_is_no_faster_than_the_clock():
    import time

    started = time.perf_counter()
    found = rate(torch.float32, 256)
    assert 0 < 2 * 256**3 / found < time.perf_counter() - started


# ---- the same work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_PEFT)
def test_both_sides_start_alike_and_train_as_many_values(method):
    theirs, adapters = pair("bert", method, "all-linear")
    inputs, model = rows(), adapters.model
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == adapters.counts()["trainable"]
    with torch.no_grad():
        a, b = (m.train()(**inputs).logits for m in (theirs, model))  # without dropout; Linear4bit packs in eval mode
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_batch_is_a_quarter_padded_and_the_same_each_time():
    case, config = Case(max_length=12, batch_size=8), SimpleNamespace(vocab_size=101, pad_token_id=1)
    (inputs, labels, weight), (again, *_) = batch(case, config), batch(case, config)
    assert weight == 8
    assert inputs["attention_mask"].sum(1).tolist() == [9, 9, *[12] * 6]
    assert ((inputs["input_ids"] == 1) == (inputs["attention_mask"] == 0)).all()
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert set(labels.tolist()) <= {0, 1}


@pytest.mark.parametrize("learns", ["tags", "text"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_sides_have_one_loss_of_tags_and_of_text(learns, method, tiny, bases):  # noqa: F811
    """That of a token that is learned, by hand; transformers' own for a decoder under PEFT."""
    model = bases["llama"] if learns == "text" else tiny
    case = Case(model=str(model), method=method, max_length=9, batch_size=5, dtype="float32", learns=learns)
    losses = []
    for build_one in BACKENDS.values():
        built = build_one(case)
        inputs, labels, weight = batch(case, built.model.config)
        built.model.eval()  # without dropout
        losses.append(forward_loss(built.model, built.objective, inputs, labels, weight).item())
        with torch.no_grad():
            logits = built.model(**{key: t for key, t in inputs.items() if key != "labels"}).logits
        wanted = inputs["labels"]
        if learns == "text":
            logits, wanted = logits[:, :-1], wanted[:, 1:]
        assert losses[-1] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).item(), rel=1e-4)
        before = {key: p.detach().clone() for key, p in built.model.named_parameters()}
        stepper(built, inputs, labels, weight)()
        assert any(not torch.equal(p, before[key]) for key, p in built.model.named_parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_learns_what_it_should_and_no_more():
    theirs, adapters = pair("bert", "lora-fa", "all-linear")
    case = Case(max_length=7, batch_size=4)
    for model in (theirs, adapters.model):
        built = Built(model, [p for p in model.parameters() if p.requires_grad], False, OBJECTIVES["classification"])
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


def test_a_mixed_batch_has_every_ratio_and_rows_that_are_those_alone(tiny):
    case = MixedCase(model=str(tiny), batch_size=3, max_length=6, dtype="float32", loaded=4)
    found = mixed.measure(case, repeats=1)
    assert set(found["seconds"]) == {
        "merged", "merged, plain layers", "1 loaded", "3 loaded", "4 loaded", "PEFT, one adapter",
        "PEFT, adapter_names",
    }  # fmt: skip
    assert found["largest_difference"] < 1e-5
    assert found["ratios"]["4 over 1 loaded"] == found["seconds"]["1 loaded"] / found["seconds"]["4 loaded"]
    title, columns, rows, _ = tables.tables({"mixed": {"case": case.to_json(), **found}})[0]
    assert "3 rows of an adapter each" in title
    assert {len(row) for row in rows} == {len(columns)} == {5}


def test_a_mixed_batch_lowers_an_adapter_once(tiny, monkeypatch):
    lower, calls = Adapted.lower, []
    monkeypatch.setattr(Adapted, "lower", lambda layer, *rest: calls.append(layer) or lower(layer, *rest))
    case = MixedCase(model=str(tiny), batch_size=3, max_length=6, dtype="float32", loaded=3)
    adapters = mixed.with_adapters(case, 3)
    mixed.prepared(adapters.model, case)
    ids = torch.full((3, 6), 7)
    run = mixed.mixed(adapters, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 3)
    with torch.no_grad():
        first, then = run(), len(calls)
        assert then >= 3 * len(adapters.layers)
        torch.testing.assert_close(run(), first)
    assert len(calls) == then


def test_a_profile_lists_the_operations_that_take_most(tiny, monkeypatch):
    monkeypatch.setattr(profile, "STEPS", 2)
    case = Case(model=str(tiny), batch_size=3, max_length=6, dtype="float32")
    backends = {name: profile.measure(name, case) for name in NAMES}
    for found in backends.values():
        shares = [operation["share"] for operation in found["operations"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
    ((_, columns, rows, _),) = tables.tables({"profile": {"case": case.to_json(), "backends": backends}})
    assert {len(row) for row in rows} == {len(columns)}
    names = {operation["name"] for found in backends.values() for operation in found["operations"]}
    assert {row[0] for row in rows} == names


@pytest.mark.slow
def test_the_library_of_the_bench_needs_no_command_line():
    code = "import sys, loralab.bench, loralab.bench.worker; assert 'cyclopts' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # it starts three processes
def test_a_bench_of_a_tiny_model(tiny, tmp_path, capsys):
    argv = ["bench", "--models", str(tiny), "--methods", "lora", "--lengths", "9", "--dtypes", "float32"]
    argv += ["--batch-size", "4", "--repeats", "2", "--threads", "1", "--out", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out/bench.json").read_text())
    (row,) = result["steps"]
    for name in NAMES:
        assert len(row["seconds"][name]["turns"]) == 2
        assert row["memory"][name]["peak"] >= row["memory"][name]["training"] > 0
        taken = row["seconds"][name]["median"] * row["rate"]
        assert row["fraction"][name] == pytest.approx(row["operations"] / taken)
    turns = [np.array(row["seconds"][name]["turns"]) for name in NAMES]
    assert row["faster"]["median"] == pytest.approx(float(np.median(turns[0] / turns[1])))
    assert len(set(row["trainable"].values())) == 1
    assert {"loralab", "peft", "torch", "transformers", "python"} <= set(result["versions"])
    assert result["machine"]["threads"] == 1
    (_, columns, cells, _), page = tables.tables(result)[0], (tmp_path / "out/bench.md").read_text()
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


@pytest.mark.parametrize("kind", ["bert", "mpnet", "distilbert"])
@pytest.mark.parametrize("method", ["lora", "dora", "full", "lora-fa"])
def test_the_products_of_a_step_add_up_to_its_operations_and_can_be_taken(kind, method):
    """Each is a product of its shape and of the memory layout that it says."""
    model = build(kind)
    adapters = loralab.attach(model, method, **({} if method == "full" else {"rank": RANK}), head=True)
    found = step_products(adapters, rows())
    assert sum(p.operations * count for p, count in found.items()) == step_flops(adapters, rows())
    assert {p.batch for p in found} == {1, 15}  # rows times heads
    for product in found:
        a, b, out = roofline.operands(product, torch.float32)
        assert a.shape == (product.batch, product.n, product.k)
        assert torch.bmm(a, b).shape == out.shape
        sides = ("t" if x.mT.is_contiguous() and not x.is_contiguous() else "n" for x in (a, b))
        if 1 not in product[:4]:
            assert "".join(sides) == product.form


def test_a_roofline_counts_every_product_beside_the_step(tiny, monkeypatch):
    monkeypatch.setattr(roofline, "TURNS", 2)
    case = Case(model=str(tiny), batch_size=3, max_length=6, dtype="float32")
    found = roofline.measure(case)
    adapters = backends.adapted(case)
    assert found["operations"] == step_flops(adapters, batch(case, adapters.model.config)[0])
    assert found["floor"] == pytest.approx(sum(p["count"] * p["seconds"] for p in found["products"]))
    ((_, columns, table, _),) = tables.tables({"roofline": {"case": case.to_json(), **found}})
    assert {len(row) for row in table} == {len(columns)}
    assert [row[0] for row in table[-2:]] == ["sum", "step"]
    assert len(table) == len(found["products"]) + 2
    assert table[-1][columns.index("of the step")] == "100%"
    assert all(("packed" in p) == (p["batch"] == 1) for p in found["products"])


@pytest.mark.parametrize("form", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_is_the_product(form, dtype, monkeypatch):
    """What the column `packed` times computes the same matrix."""
    seen = []
    monkeypatch.setattr(roofline, "seconds_of", lambda take: seen.append(take()) or 0.0)
    product = Product(1, 5, 48, 7, form)
    monkeypatch.setattr(roofline, "TRIES", 1)
    roofline.seconds(product, dtype, pack=True)
    a, b, _ = roofline.operands(product, dtype)
    assert seen[0].dtype == dtype
    near = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]  # of sums of 48 products, about 7
    torch.testing.assert_close(seen[0].float(), a[0].float() @ b[0].float(), rtol=near, atol=near)


@pytest.mark.slow
def test_mixed_and_profile_of_a_tiny_model(tiny, tmp_path, capsys):
    argv = [
        "bench",
        "--models",
        str(tiny),
        "--lengths",
        "9",
        "--batch-size",
        "4",
        "--dtypes",
        "float32",
        "--repeats",
        "2",
    ]
    argv += ["--methods", "lora", "--threads", "1", "--markdown", "--out", str(tmp_path / "out")]
    assert main([*argv, "--mixed", "--loaded", "6"]) == 0
    printed = capsys.readouterr().out
    assert "| 6 loaded |" in printed
    assert "| PEFT, adapter_names |" in printed
    assert main([*argv, "--roofline"]) == 0
    assert "| product | calls | GFLOP/s | time | of the step |" in capsys.readouterr().out
    assert main([*argv, "--profile"]) == 0
    assert "| operation | PEFT calls | share | loralab calls | share |" in capsys.readouterr().out


# ---- errors ----------------------------------------------------------------------------------------------------------

WRONG = {
    "method": (["--methods", "lorra"], "--methods 'lorra' (did you mean 'lora'?): bench knows lora, dora, vera"),
    "model": (["--models", "./nowhere"], "no folder './nowhere'"),
    "dtype": (["--dtypes", "float16"], "--dtypes 'float16'"),
    "length": (["--lengths", "0"], "--lengths 0: expected 4 or more"),
    "batch": (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
    "rows": (["--epoch", "--rows", "0"], "--rows 0: expected 1 or more"),
    "loaded": (["--mixed", "--loaded", "0"], "--loaded 0: expected 1 or more"),
    "repeats": (["--repeats", "0"], "--repeats 0: expected 1 or more"),
    "threads": (["--threads", "-1"], "--threads -1: expected 1 or more"),
    "idle": (
        ["--cost", "--tasks", "rte", "--rows", "9"],
        "--tasks, --rows would do nothing without --epoch",
    ),
    "idle in steps": (["--loaded", "5"], "--loaded would do nothing without --mixed: leave it out"),
    "lengths": (["--epoch", "--lengths", "16"], "--lengths would do nothing with --epoch"),
    "several": (
        ["--profile", "--methods", "lora", "dora"],
        "one case: give one value for --methods",
    ),
    "both": (["--epoch", "--cost"], "--epoch and --cost are different measurements: choose one"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line(what, tiny, tmp_path, capsys):
    flags, message = WRONG[what]
    models = [] if what == "model" else ["--models", str(tiny)]
    assert main(["bench", *models, *flags, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_nothing_but_a_bench_is_written_over(tiny, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["bench", "--models", str(tiny), "--out", str(tmp_path)]) == 2
    assert "choose an empty or a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_peft_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"PEFT, which is not installed: pip install 'peft==0\.21"):
        Bench()


@pytest.mark.slow
def test_a_worker_passes_on_a_users_error_and_serves_the_next_request(tiny):
    with workers("loralab", threads=1) as (worker,):
        with pytest.raises(UserError, match="--layers 9: BertForSequenceClassification has 2"):
            worker.ask("build", case=Case(model=str(tiny), layers=9).to_json())
        assert worker.ask("facts")["machine"]["threads"] == 1
        worker.process.kill()
        with pytest.raises(UserError, match="the process of loralab ended at 'facts'"):
            worker.ask("facts")
