"""SuperLoRA's groups that span layers: each layer has its rows of one update of the weights on top of each other."""

import json
from dataclasses import replace

import pytest
import torch
from archs import build, check_mixed, rows, shake
from literal import superlora
from safetensors.torch import load_file
from test_fast import double, pass_through, same
from test_superlora import ALPHA, CASES, IDS, N_IN, N_OUT, by_heart, shaken
from test_superlora import tensor as normal
from torch.func import functional_call

import loralab
from loralab import LayerRank, RankMap, UserError, analysis
from loralab.cli import main
from loralab.fast import prepare
from loralab.methods.lora import LoRA
from loralab.methods.superlora import SuperLoRA
from loralab.rankmap import own as own_factors
from loralab.ranks.groups import groups
from loralab.recipe import recipe
from loralab.update import Update

LABELS = torch.tensor([0, 1, 2, 1, 0])
RANK = 2
L = "bert.encoder.layer"
UP0, UP1 = (f"{L}.{i}.intermediate.dense" for i in range(2))  # 37 x 24
# settings -> of superlora; all ways to make the update, and the low-rank form with and without a core
FORMS = [
    {"split": 2, "ratio": 1.0},
    {"split": 3, "ratio": 1.0},
    {"order": 3, "core": True, "ratio": 1.0},
    {"fold": True, "ratio": 1.0},
    {"ratio": 0.3},
    {"order": 3, "split": 2, "ratio": 0.6},
    {"ratio": 1.0},
    {"core": True, "ratio": 1.0},
]
every_form = pytest.mark.parametrize(
    "given", FORMS, ids=lambda f: " ".join(f"{key}={value}" for key, value in f.items())
)


def adapted(given, gain=False, span=None, **more):
    """A group of each kind of layer, and one of all that are 24 x 24 at most `span` at a time."""
    model = build("bert")
    ranks = groups(model, rank=RANK, span=span, by=lambda path: "all") if span else groups(model, rank=RANK)
    settings = {"rank": RANK, "alpha": ALPHA, "ranks": ranks, "gain": gain, "head": True, **more}
    return model, loralab.attach(model, "superlora", name="a", **given, **settings)


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or rows())).logits


def whole(r, p, layer, count):
    """The update of `count` layers on top of each other, by the method without groups."""
    f, size = replace(r.factors, rank=RANK), (count * layer.out_features, layer.in_features)
    if f.low_rank:
        return f.alpha / f.rank * p["B"] @ (p["C"] @ p["A"] if f.core else p["A"])
    return f.dense({**p, **f.local(f.constants([size]), *size)}, *size)


# ---- what a group is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "matrices", "modes"), CASES, ids=IDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])  # layers of 12, 6, 4 and 3 rows, which Kronecker's rows divide or not
def test_the_layers_of_a_group_cut_up_the_formula_in_loops(given, matrices, modes, count):
    alone = SuperLoRA(alpha=ALPHA, projection_seed=6, **given)
    p, constants = shaken(alone)
    expected = superlora(p, alone, matrices, (N_OUT, N_IN)).split(N_OUT // count)
    for i in range(count):
        f = alone.placed(i, count)
        assert {role: t.shape for role, t in f.init(N_OUT // count, N_IN, torch.Generator()).items()} == {
            role: t.shape for role, t in p.items()
        }
        size = N_OUT // count, N_IN
        local = f.local(f.constants([f.shape(*size)]), *size)
        assert local.keys() == constants.keys()
        torch.testing.assert_close(f.dense(p | local, *size), expected[i])
        both = {role: torch.stack([t, 2 * t + 1]) for role, t in p.items()}  # an adapter per row
        one = f.dense({role: t[1] for role, t in both.items()} | local, *size)
        torch.testing.assert_close(f.dense(both | local, *size)[1], one)


@pytest.mark.parametrize(("given", "matrices", "modes"), CASES, ids=IDS)
def test_gradients_of_the_cut_are_finite_differences(given, matrices, modes):
    f = SuperLoRA(alpha=ALPHA, **given).placed(1, 3)
    p, _ = shaken(SuperLoRA(alpha=ALPHA, **given))
    local = f.local(f.constants([(N_OUT, N_IN)]), N_OUT // 3, N_IN)
    learned = [t.requires_grad_() for t in p.values()]
    assert torch.autograd.gradcheck(
        lambda *ts: f.dense(dict(zip(p, ts, strict=True)) | local, N_OUT // 3, N_IN), learned
    )


@every_form
@pytest.mark.parametrize("span", [None, 5])
def test_the_model_is_the_plain_one_with_the_big_update_cut_up_and_gradients_are_sums_over_layers(given, span):
    model, adapters = adapted(given, span=span)
    shake(adapters, "a")
    double(model, adapters)
    r, plain, batch = adapters.spec("a").recipe, build("bert").double(), rows()
    weights, copies = {}, {}
    for path, part in r.ranks.layers.items():
        layer, p = adapters.layers[path], adapters.layers[path].roles("a")
        paths = [path] if part.share is None else sorted(r.ranks.shares[part.share])
        copies[path] = {role: t.detach().clone().requires_grad_() for role, t in p.items()}
        D = whole(r, copies[path], layer, len(paths)).split(layer.out_features)[paths.index(path)]
        weights[f"{path}.weight"] = layer.base.dense() + D
        assert D.abs().max() > 0.01
    expected = functional_call(plain, weights, kwargs=batch).logits
    found = model(**batch).logits
    torch.testing.assert_close(found, expected)
    for out in (expected, found):
        torch.nn.functional.cross_entropy(out, LABELS).backward()
    for paths in r.ranks.shares.values():
        for role, t in adapters.layers[paths[0]].roles("a").items():
            assert all(adapters.layers[path].roles("a")[role] is t for path in paths)
            torch.testing.assert_close(t.grad, sum(copies[path][role].grad for path in paths))
            assert not torch.allclose(t.grad, copies[paths[0]][role].grad)
    assert max(map(len, r.ranks.shares.values())) == (span or 2)


@every_form
@pytest.mark.parametrize("gain", [False, True])
def test_a_fresh_group_changes_no_bit_and_its_values_are_the_closed_form(given, gain):
    model, adapters = adapted(given, gain)
    assert torch.equal(logits(model), logits(build("bert")))
    r = adapters.spec("a").recipe
    expected = 0
    for path, part in r.ranks.layers.items():
        layer = adapters.layers[path]
        out, into = layer.out_features, layer.in_features
        first = part.share is None or r.ranks.shares[part.share][0] == path
        count = 1 if part.share is None else len(r.ranks.shares[part.share])
        size = sum(SuperLoRA(rank=RANK, **given).sizes(count * out, into).values())
        assert r.at(path).count(out, into) == size + out * gain
        expected += size * first + out * gain  # a gain is each layer's own
    assert adapters.counts("a")["adapter"] == expected
    grouped = [p for group in adapters.parameter_groups(lr=1.0) for p in group["params"]]
    assert sum(p.numel() for p in grouped) == adapters.counts("a")["trainable"]
    torch.optim.AdamW(adapters.parameter_groups(lr=1.0))  # torch refuses a tensor that is there twice


@every_form
@pytest.mark.parametrize("gain", [False, True])
def test_save_load_merge_mixed_batches_and_detach(given, gain, tmp_path):
    model, adapters = adapted(given, gain)
    shake(adapters, "a")
    adapters.save(tmp_path)
    stored, state = load_file(tmp_path / "adapter.safetensors"), adapters.state("a")
    roles = adapters.layers[UP0].roles("a").keys() & recipe("superlora", **given).factors.roles
    assert roles
    assert {f"{UP0}.{role}" for role in roles} <= stored.keys()
    assert not {f"{UP1}.{role}" for role in roles} & stored.keys()  # once, under the first layer
    fresh = build("bert")
    loaded = loralab.load(fresh, tmp_path)
    assert loaded.spec("a").recipe == adapters.spec("a").recipe
    assert loaded.state("a").keys() == state.keys()
    assert all(torch.equal(loaded.state("a")[key], t) for key, t in state.items())
    assert all(loaded.layers[UP0].roles("a")[role] is loaded.layers[UP1].roles("a")[role] for role in roles)
    assert torch.equal(logits(fresh), logits(model))
    torch.testing.assert_close(logits(adapters.merge("a")), logits(model), rtol=0, atol=2e-5)
    assert (logits(model) - logits(build("bert"))).abs().max() > 0.01
    adapters.add("b", "dora", rank=3, head=True)
    shake(adapters, "b", seed=4)
    check_mixed(model, adapters, "ab", [1, 0, 0, 1, 0], 2e-5)
    adapters.detach()
    assert torch.equal(logits(model), logits(build("bert")))


@every_form
def test_a_group_of_one_layer_is_the_method_without_groups_bit_for_bit(given, tmp_path):
    results = []
    for shares in (False, True):
        paths = groups(build("bert")).layers
        ranks = RankMap({path: LayerRank(RANK, share=path) for path in paths}) if shares else None
        model, adapters = adapted(given, ranks=ranks)
        fresh = {key: t.clone() for key, t in adapters.state("a").items()}
        shake(adapters, "a")
        model(**rows(), labels=LABELS).loss.backward()
        grads = {key: t.grad for key, t in adapters.state("a").items()}
        adapters.save(tmp_path / str(shares))
        stored = load_file(tmp_path / str(shares) / "adapter.safetensors")
        results.append((fresh, grads, stored, {"logits": logits(model)}))
    for without, within in zip(*results, strict=True):
        assert without.keys() == within.keys()
        assert all(torch.equal(t, within[key]) for key, t in without.items())


def test_training_moves_groups_of_all_layers_of_a_shape_and_learns_five_rows_by_heart():
    model = build("bert").train()
    model.classifier.weight.data.mul_(20)  # large enough to tell the labels apart; the head stays frozen
    ranks = groups(model, rank=4, by=lambda path: "all")
    adapters = loralab.attach(model, "superlora", rank=4, ranks=ranks)
    assert {share: len(paths) for share, paths in ranks.shares.items()} == {
        "all 24x24": 9,
        "all 37x24": 2,
        "all 24x37": 2,
    }
    by_heart(model, adapters)


# ---- the low-rank form -------------------------------------------------------------------------------------------


def test_the_low_rank_form_is_lora_of_the_weights_on_top_of_each_other():
    count, out, into, rank = 3, 7, 11, 5
    whole_lora = LoRA(rank, ALPHA).init(count * out, into, torch.Generator().manual_seed(3))
    for i in range(count):
        f = SuperLoRA(rank=rank, alpha=ALPHA).placed(i, count)
        p = f.init(out, into, torch.Generator().manual_seed(3))
        assert all(torch.equal(p[role], t) for role, t in whole_lora.items())
        p["B"] = normal(count * out, rank, seed=4).float()
        A, B = f.lower(p)
        assert torch.equal(A, p["A"])
        assert torch.equal(B, ALPHA / rank * p["B"][i * out : (i + 1) * out])
        assert f.sizes(out, into) == {"A": rank * into, "B": rank * count * out}
    assert SuperLoRA(rank=8).placed(0, 2).misfit(7, 11) is None  # it is the stacked weight that bounds the rank
    assert "rank 12: a 14 x 11 weight" in SuperLoRA(rank=12).placed(0, 2).misfit(7, 11)


@pytest.mark.parametrize("given", FORMS[-2:])
@pytest.mark.parametrize("gain", [False, True])
def test_a_low_rank_group_is_exported_inspected_without_its_base_and_takes_the_fast_path(given, gain, tmp_path):
    model, adapters = adapted(given, gain)
    shake(adapters, "a")
    assert type(adapters.layers[UP0].lower("a")) is Update
    adapters.save(tmp_path / "ours")
    over = analysis.spectra(analysis.updates(tmp_path / "ours", build("bert")))
    alone = analysis.spectra(analysis.updates(tmp_path / "ours"))
    assert [s.path for s in over] == [s.path for s in alone]
    for a, b in zip(over, alone, strict=True):
        assert a.values == b.values
    adapters.export(tmp_path / "peft", name="a")
    plain = build("bert")
    loralab.load(plain, tmp_path / "peft")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    results = []
    for fast in (False, True):
        model, adapters = adapted(given, gain)
        shake(adapters, "a")
        double(model, adapters)
        if fast:
            assert any(choice.used for choice in prepare(model))
        results.append(pass_through(model, adapters, rows()))
    same(*results, 1e-9)


# ---- maps of groups ----------------------------------------------------------------------------------------------


def test_groups_are_layers_of_one_kind_and_shape_in_the_order_of_the_model():
    model = build("bert")
    made = groups(model, rank=3)
    assert all(part.rank == 3 for part in made.layers.values())
    assert made.shares[f"{L}.*.intermediate.dense 37x24"] == [UP0, UP1]
    assert made.shares[f"{L}.*.attention.self.query 24x24"] == [f"{L}.{i}.attention.self.query" for i in range(2)]
    assert [path for path, part in made.layers.items() if part.share is None] == ["bert.pooler.dense"]
    some = groups(model, "attention-qv", rank=2, span=3, by=lambda path: "qv")
    assert set(some.layers) == {f"{L}.{i}.attention.self.{what}" for i in range(2) for what in ("query", "value")}
    assert {share: len(paths) for share, paths in some.shares.items()} == {"qv 24x24 0": 3}  # the fourth is alone
    with pytest.raises(UserError, match="span=1: .* 2 or more"):
        groups(model, span=1)
    assert loralab.attach(model, "lora", rank=3, ranks=made).counts("default")["adapter"] > 0  # of any that shares


def test_the_place_of_a_layer_is_that_of_its_numbers_however_the_map_is_written():
    paths = [f"x.{i}.q" for i in (10, 2, 0)]
    for layers in (paths, paths[::-1]):
        ranks = RankMap({path: LayerRank(2, "s") for path in layers})
        places = {path: own_factors(SuperLoRA(rank=2), ranks, path) for path in paths}
        assert {path: (f.index, f.count) for path, f in places.items()} == {
            "x.0.q": (0, 3),
            "x.2.q": (1, 3),
            "x.10.q": (2, 3),
        }


def test_an_alpha_of_its_own_scales_the_rows_of_its_layer():
    f = SuperLoRA(rank=2, split=2)
    ranks = RankMap({"a": LayerRank(2, "s"), "b": LayerRank(2, "s", alpha=3.0)})
    p = {role: t + 1 for role, t in f.init(14, 11, torch.Generator()).items()}
    one, other = (own_factors(f, ranks, path).dense(p, 7, 11) for path in "ab")
    torch.testing.assert_close(
        other, 3 / 16 * own_factors(f, RankMap({"b": LayerRank(2, "s"), "a": LayerRank(2, "s")}), "b").dense(p, 7, 11)
    )
    assert own_factors(f, ranks, "a").scaling == 8
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("superlora", 2 * 8 * (24 + 12)),  # of the stacked (48, 24) half the sides: (24, 12) of rank 8
        ("lokr", 2 * (6 * 4 + 8 * 6)),  # (48, 24) is (6, 4) kron (8, 6), which rank 8 keeps whole
        ("lorta", 2 * (8 * (8 + 9 + 16) + 8**3)),  # modes of 8, 9 and 16, and a core
    ],
)
def test_a_run_with_groups_learns_repeats_and_keeps_one_tensor_a_group(tiny, own, tmp_path, method, values):
    argv = ["train", "--task", own["class"], "--model", tiny, "--text", "sentence", "--label", "label"]
    argv += ["--method", method, "--policy", "groups", "--targets", "attention-qv", "--max-length", "32"]
    argv += ["--epochs", "6", "--batch-size", "20", "--lr", "6e-2", "--out"]
    for name in "ab":
        assert main([str(part) for part in [*argv, tmp_path / name]]) == 0
    result, again = (json.loads((tmp_path / name / "result.json").read_text()) for name in "ab")
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    assert result["metric"]["selected"] > 0.9
    assert again["metrics"] == result["metrics"]
    assert result["counts"]["adapter"] == values
    assert (result["time"]["plan"]["name"], result["time"]["plan"]["steps"]) == ("groups", 0)
    one, other = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[key]) for key, t in one.items())
    assert {key.split(".")[3] for key in one if ".attention." in key} == {"0"}  # under the first layer alone
    ranks = loralab.files.read(tmp_path / "a/adapter").recipe.ranks
    assert [len(paths) for paths in ranks.shares.values()] == [2, 2]


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"ratio": 1.0, "start": "gaussian"}, ["start='gaussian' with superlora", "share"]),
        ({"ratio": 1.0, "start": "eva"}, ["start='eva'", "share"]),
        ({"rank": 3}, ["one rank, 3, not 2"]),
        (
            {"ranks": RankMap({UP0: LayerRank(2, "s", gates=(1.0, 0.5)), UP1: LayerRank(2, "s")})},
            ["gates with SuperLoRA"],
        ),
        (
            {"ranks": RankMap({UP0: LayerRank(2, "s"), f"{L}.0.output.dense": LayerRank(2, "s")})},
            ["one shape", "37 x 24", "24 x 37"],
        ),
        (
            {"ranks": RankMap({UP0: LayerRank(25, "s"), UP1: LayerRank(25, "s")}), "rank": 25, "ratio": 1.0},
            ["rank 25: a 74 x 24"],
        ),
    ],
)
def test_what_no_group_can_do_names_both(given, problem):
    model = build("bert")
    paths = given["ranks"].layers if "ranks" in given else [UP0, UP1]
    ranks = RankMap({UP0: LayerRank(2, "s"), UP1: LayerRank(2, "s")})
    with pytest.raises(UserError) as caught:
        loralab.attach(model, "superlora", targets=list(paths), **{"rank": 2, "ranks": ranks, **given})
    assert all(part in str(caught.value) for part in problem)


@pytest.mark.parametrize("method", ["vera", "adalora", "head", "full", "bitfit"])
def test_a_method_without_factors_to_share_is_refused_with_the_plan(method):
    with pytest.raises(UserError) as caught:
        recipe(method, policy="groups")
    assert "policy='groups'" in str(caught.value)
    assert ("shares with" in str(caught.value)) == (method in ("vera", "adalora")), caught.value


@pytest.mark.parametrize(("plan", "span"), [("groups", 1), ("groups", 0), ("drop", 2), (None, 2)])
def test_a_span_needs_groups_and_two_layers(tiny, own, tmp_path, plan, span):
    from test_train import settings

    with pytest.raises(UserError) as caught:
        settings(tiny, own, tmp_path, policy=plan, span=span)
    assert f"span={span} with policy={plan!r}: " in str(caught.value)


def test_a_projection_of_more_numbers_than_it_can_count_is_refused():
    f = SuperLoRA(ratio=0.25)
    assert f.misfit(2**15, 2**15) is None
    assert f.placed(0, 2).misfit(2**15, 2**15) == (
        "ratio=0.25: F counts to 2147483647, fewer than the 65536 x 32768 numbers; take fewer layers a group"
    )
    assert SuperLoRA().placed(0, 2).misfit(2**15, 2**15) is None
