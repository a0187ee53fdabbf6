"""Rank maps: what a map says is what the model does, whoever wrote it; and each policy against its slow definition."""

import json
from dataclasses import replace

import pytest
import torch
from archs import build, check_mixed, labelled, rank_map, rows, shake
from safetensors.torch import load_file
from torch import nn

import loralab
from loralab import LayerRank, RankMap, UserError
from loralab.coverage import folded
from loralab.policies import POLICIES
from loralab.ranks.alora import alora, divide, reallocate, scores
from loralab.ranks.drop import drop_map, importance, parent, shapes
from loralab.ranks.spectrum import allocate, error_map, error_spectrum
from loralab.recipe import NAMED, from_json, recipe, to_json
from loralab.run import policies as making
from loralab.run import train
from loralab.stores import STORES, keep

L = "bert.encoder.layer"
Q0, Q1 = f"{L}.0.attention.self.query", f"{L}.1.attention.self.query"
V0, V1 = f"{L}.0.attention.self.value", f"{L}.1.attention.self.value"
UP0, UP1 = f"{L}.0.intermediate.dense", f"{L}.1.intermediate.dense"
TARGETS = ["attention.self.query", "attention.self.value", "intermediate.dense"]
# own ranks that differ, a pair shared by layers, gates on an own and on a shared layer, and a layer left out
MAP = RankMap(
    {
        Q0: LayerRank(3, share="q"),
        Q1: LayerRank(3, share="q", gates=(0.5, 0.0, 1.0)),
        V0: 2,
        V1: 0,
        UP0: LayerRank(5, gates=(1.0, 0.25, 0.0, 0.75, 0.5)),
        UP1: LayerRank(4),
    }
)
NO_GATES = RankMap({path: replace(part, gates=None) for path, part in MAP.layers.items()})
METHODS = {
    "lora": {"alpha": 5.0},
    "rslora": {"alpha": 5.0},
    "dora": {"alpha": 5.0},
    "lora-fa": {"alpha": 5.0},
    "lora+": {"alpha": 5.0},
}


def adapted(method="lora", ranks=MAP, **given):
    model = build("bert")
    settings = {"targets": TARGETS, "head": True, **METHODS.get(method, {}), **given}
    adapters = loralab.attach(model, method, name="a", ranks=ranks, **settings)
    return model, adapters


def move(adapters, name="a"):
    """Moves what learns off its start; gates stay what the map says."""
    shake(adapters, name)
    with torch.no_grad():
        for path, part in adapters.spec(name).recipe.ranks.adapted.items():
            if part.gates is not None:
                adapters.layers[path].roles(name)["gates"].copy_(torch.tensor(part.gates))


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or rows())).logits


# ---- what a map says is what the model does ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_layer_has_its_rank_its_share_its_gates_and_the_scaling_of_its_own_rank(method):
    model, adapters = adapted(method)
    assert torch.equal(logits(model), logits(build("bert")))  # a fresh adapter changes no bit
    move(adapters)
    assert set(adapters.spec("a").paths) == {Q0, Q1, V0, UP0, UP1}
    assert V1 in adapters.spec("a").coverage.left
    x = torch.randn(2, 7, 24)
    for path, part in MAP.adapted.items():
        layer = adapters.layers[path]
        p, u = layer.roles("a"), layer.lower("a")
        assert p["A"].shape == (part.rank, 24)
        scaling = 5.0 / (part.rank**0.5 if method == "rslora" else part.rank)
        gates = torch.tensor(part.gates or (1.0,) * part.rank)
        W = layer.base.dense() + scaling * p["B"] @ torch.diag(gates) @ p["A"]
        if method == "dora":
            W = p["m"][:, None] * W / W.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), rtol=1e-4, atol=1e-5)
        assert ("gates" in p) == (part.gates is not None)
        assert u.A.shape[0] == part.rank
    assert type(model.get_submodule(V1)) is nn.Linear


@pytest.mark.parametrize("method", METHODS)
def test_a_share_is_one_pair_of_parameters_that_learns_from_all_its_layers(method):
    model, adapters = adapted(method)
    move(adapters)
    first, second = adapters.layers[Q0].roles("a"), adapters.layers[Q1].roles("a")
    assert first["A"] is second["A"]
    assert first["B"] is second["B"]
    labels = torch.tensor([0, 1, 2, 1, 0])
    model(**rows(), labels=labels).loss.backward()
    apart, theirs = adapted(method, RankMap({p: replace(part, share=None) for p, part in MAP.layers.items()}))
    with torch.no_grad():
        for key, tensor in theirs.state("a").items():
            tensor.copy_(adapters.state("a")[key])
    torch.testing.assert_close(logits(model), logits(apart))
    apart(**rows(), labels=labels).loss.backward()
    one, two = theirs.layers[Q0].roles("a"), theirs.layers[Q1].roles("a")
    for role in adapters.spec("a").recipe.learn:
        if role == "m":  # the gain is each layer's own
            assert first["m"] is not second["m"]
            torch.testing.assert_close(first["m"].grad, one["m"].grad)
            torch.testing.assert_close(second["m"].grad, two["m"].grad)
        else:
            torch.testing.assert_close(first[role].grad, one[role].grad + two[role].grad)
            assert not torch.allclose(first[role].grad, one[role].grad)


@pytest.mark.parametrize("method", METHODS)
def test_counts_and_optimizer_groups_hold_each_tensor_once(method):
    _, adapters = adapted(method)
    r = adapters.spec("a").recipe
    expected = 0
    for path, part in MAP.adapted.items():
        out_features = {"query": 24, "value": 24, "dense": 37}[path.rpartition(".")[2]]
        if path != Q1:  # Q1 has the pair of Q0
            expected += (part.rank * 24 if "A" in r.learn else 0) + part.rank * out_features
            assert r.at(path).count(out_features, 24) >= part.rank * out_features
        expected += out_features if "m" in r.learn else 0
    assert adapters.counts("a")["adapter"] == expected
    grouped = [p for group in adapters.parameter_groups(lr=1.0) for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert sum(p.numel() for p in grouped) == adapters.counts("a")["trainable"]
    torch.optim.AdamW(adapters.parameter_groups(lr=1.0))  # torch refuses a tensor that is there twice
    assert not any(t.requires_grad for role, t in adapters.tensors("a").values() if role == "gates")


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_keep_every_bit_and_the_sharing(method, tmp_path):
    model, adapters = adapted(method)
    move(adapters)
    adapters.save(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert f"{Q0}.A" in stored
    assert f"{Q1}.A" not in stored  # a shared tensor is stored once
    fresh = build("bert")
    loaded = loralab.load(fresh, tmp_path)
    assert loaded.spec("a").recipe == adapters.spec("a").recipe
    assert loaded.spec("a").recipe.ranks == MAP
    assert loaded.state("a").keys() == adapters.state("a").keys()
    assert all(torch.equal(loaded.state("a")[key], t) for key, t in adapters.state("a").items())
    assert loaded.layers[Q0].roles("a")["A"] is loaded.layers[Q1].roles("a")["A"]
    assert torch.equal(logits(fresh), logits(model))
    scaling = json.loads((tmp_path / "adapter.json").read_text())["scaling"]
    assert scaling[V0] == pytest.approx(5.0 / (2**0.5 if method == "rslora" else 2))
    from loralab.cli import main

    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_merge_mixed_batches_and_detach_work_with_a_map(method):
    model, adapters = adapted(method)
    move(adapters)
    torch.testing.assert_close(logits(adapters.merge("a")), logits(model), rtol=0, atol=1e-5)
    assert adapters.layers[Q0].roles("a")["A"] is adapters.layers[Q1].roles("a")["A"]
    adapters.add("b", "dora", rank=2, head=True)  # on all layers, at another rank
    shake(adapters, "b", seed=4)
    check_mixed(model, adapters, "ab", [1, 0, 0, 1, 0])
    adapters.detach()
    assert torch.equal(logits(model), logits(build("bert")))


def test_training_keeps_the_pair_shared_and_the_gates_still():
    model, adapters = adapted("dora")
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-2, weight_decay=0.1))
    before = {key: t.detach().clone() for key, t in adapters.state("a").items()}
    for _ in range(3):
        model(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = adapters.state("a")
    assert torch.equal(now[f"{Q0}.A"], now[f"{Q1}.A"])
    assert not torch.equal(now[f"{Q0}.m"], now[f"{Q1}.m"])
    assert {key for key, t in now.items() if torch.equal(t, before[key])} == {f"{Q1}.gates", f"{UP0}.gates"}


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lora-fa"])
def test_export_to_peft_is_the_same_function(method, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapters = adapted(method)
    move(adapters)
    adapters.export(tmp_path, name="a")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern == {Q0: 3, Q1: 3, V0: 2, UP1: 4}
    theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_the_scaling_is_that_of_pefts_rank_pattern():
    peft = pytest.importorskip("peft")
    _, adapters = adapted(ranks=NO_GATES)
    for stabilized in (False, True):
        config = peft.LoraConfig(
            r=8, lora_alpha=5, target_modules=[Q0, V0], rank_pattern={Q0: 3, V0: 2}, use_rslora=stabilized
        )
        theirs = dict(peft.get_peft_model(build("bert"), config).base_model.model.named_modules())
        adapters = adapted("rslora" if stabilized else "lora", NO_GATES)[1]
        for path in (Q0, V0):
            ours = adapters.layers[path].recipes["a"].factors.scaling
            assert theirs[path].scaling["default"] == pytest.approx(ours)


@pytest.mark.parametrize("method", ["delta-lora", "lora-fa-precond", "dylora", "frozen-dylora"])
def test_methods_with_work_in_each_step_take_shares(method):
    """A step on a shared B was scaled once for each of its layers, when it should be once."""
    same = RankMap({Q0: LayerRank(3, share="q"), Q1: LayerRank(3, share="q"), V0: 3, V1: 0, UP0: 0, UP1: 0})
    more = {"wait": 2} if method == "delta-lora" else {}
    model, adapters = adapted(method, same, rank=3, alpha=5.0, **more)
    assert torch.equal(logits(model), logits(build("bert")))
    move(adapters)
    B = adapters.layers[Q0].roles("a")["B"]
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=0.1))
    model.train()(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
    before, grad = B.detach().clone(), B.grad.clone()
    optimizer.step()
    assert B is adapters.layers[Q1].roles("a")["B"]
    if method == "lora-fa-precond":
        A = adapters.layers[Q0].roles("a")["A"].detach()
        expected = grad @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(3)) / (5 / 3) ** 2
        torch.testing.assert_close(B.detach(), before - 0.1 * expected, rtol=1e-3, atol=1e-4)
    if method == "delta-lora":
        for path in (Q0, Q1):
            p = adapters.layers[path].roles("a")
            assert torch.equal(p["Bk"], p["B"])  # during the wait the snapshot follows


def test_a_step_divides_by_the_scaling_of_the_layer_and_a_share_has_one():
    ranks = RankMap({Q0: LayerRank(3, alpha=4.0), Q1: LayerRank(3, alpha=64.0), V0: 3, V1: 0, UP0: 0, UP1: 0})
    model, adapters = adapted("lora-fa-precond", ranks, rank=3, alpha=5.0)
    move(adapters)
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=1e3))
    model.train()(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
    layers = {path: adapters.layers[path].roles("a") for path in (Q0, Q1, V0)}
    before = {path: (p["B"].detach().clone(), p["B"].grad.clone()) for path, p in layers.items()}
    optimizer.step()
    for path, alpha in ((Q0, 4.0), (Q1, 64.0), (V0, 5.0)):
        (B, grad), A = before[path], layers[path]["A"].detach()
        expected = -1e3 * grad @ torch.linalg.inv(A @ A.T) / (alpha / 3) ** 2
        moved = layers[path]["B"].detach() - B
        assert (moved - expected).abs().max() < 1e-2 * expected.abs().max()
    shared = {path: LayerRank(3, share="q", alpha=alpha) for path, alpha in ((Q0, 4.0), (Q1, 64.0))}
    with pytest.raises(UserError, match=r"share 'q' with PreconditionedLoRA: alpha 4.0 and 64.0"):
        adapted("lora-fa-precond", RankMap({**shared, V0: 0, V1: 0, UP0: 0, UP1: 0}), rank=3)


OWN = RankMap({Q0: 4, Q1: 2, V0: 2, V1: 6, UP0: 0, UP1: 4})  # even, as an orthogonal start wants it


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal", "eva"])
def test_a_start_gives_each_layer_its_own_rank(start):
    model, adapters = adapted("lora", OWN, start=start, batches=[labelled()])
    assert {path: len(adapters.layers[path].roles("a")["A"]) for path in OWN.adapted} == {
        path: part.rank for path, part in OWN.adapted.items()
    }
    if start != "orthogonal":  # which begins off zero, by design
        torch.testing.assert_close(logits(model), logits(build("bert")), rtol=0, atol=1e-5)
    shared = RankMap({**OWN.layers, Q0: LayerRank(2, "q"), Q1: LayerRank(2, "q")})
    if start in ("pissa", "olora", "eva"):  # made from each layer's own weight or inputs
        with pytest.raises(UserError, match="share"):
            adapted("lora", shared, start=start, batches=[labelled()])


# ---- files and mistakes ------------------------------------------------------------------------------------------


def test_a_map_survives_json_a_file_and_the_recipe(tmp_path):
    assert RankMap.from_json(json.loads(json.dumps(MAP.to_json()))) == MAP
    assert RankMap.load(MAP.save(tmp_path / "map.json")) == MAP
    assert RankMap.from_json({"a.b": 3}) == RankMap({"a.b": 3}) == RankMap({"a.b": LayerRank(3)})
    assert str(MAP) == "5 of 6 layers, ranks 2 to 5, 2 of them in 1 share"
    assert hash(RankMap({"a": 1, "b": 2})) == hash(RankMap({"b": 2, "a": 1}))
    r = recipe("dora", ranks=MAP)
    assert from_json(json.loads(json.dumps(to_json(r)))) == r
    old = to_json(recipe("dora"))
    del old["ranks"], old["policy"]  # a file from before there were maps
    assert from_json(old) == recipe("dora")
    (tmp_path / "other.json").write_text("{}")
    for file in ("other.json", "missing.json"):
        with pytest.raises(UserError, match="rank map"):
            RankMap.load(tmp_path / file)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({"a": -1}, ["rank=-1 for a"]),
        ({"a": 2.5}, ["rank=2.5 for a"]),
        ({"a": True}, ["rank=True"]),
        ({"a": 0}, ["no layer"]),
        ({}, ["no layer"]),
        ({"a": LayerRank(2, gates=(1.0,))}, ["1 gates for a: expected one for each of its 2 ranks"]),
        ({"a": LayerRank(1, gates=(1.5,))}, ["gates out of range for a: 1.5"]),
        ({"a": LayerRank(1, gates=(-0.1,))}, ["gates out of range"]),
        ({"a": LayerRank(1, gates=(float("nan"),))}, ["gates out of range"]),
        ({"a": LayerRank(2, "s"), "b": LayerRank(3, "s")}, ["b has rank 3, a has rank 2"]),
        ({"a": -1, "b": LayerRank(1, gates=(2.0,))}, ["rank=-1 for a", "out of range for b"]),  # all at once
    ],
)
def test_what_no_map_can_say_is_refused(layers, problem):
    with pytest.raises(UserError) as caught:
        RankMap(layers)
    assert all(part in str(caught.value) for part in problem)
    assert "\n" not in str(caught.value)


def test_a_map_for_other_layers_is_refused_with_all_problems_at_once():
    layers = {path: part for path, part in MAP.layers.items() if path not in (V0, UP1)}
    wrong = RankMap({**layers, "bert.nothing": 2, UP0: LayerRank(3, share="q")})
    model = build("bert")
    with pytest.raises(UserError) as caught:
        loralab.attach(model, "lora", targets=TARGETS, ranks=wrong)
    problem = str(caught.value)
    for part in (V0, UP1, "targets do not match bert.nothing", "one shape", f"{UP0} (37 x 24)", f"{Q0} (24 x 24)"):
        assert part in problem
    assert not hasattr(model, "_loralab")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "given", "problem"),
    [
        ("vera", {"ranks": RankMap({Q0: LayerRank(256, "s"), Q1: LayerRank(256, "s")})}, "no A and B of its own"),
        ("vera", {"ranks": RankMap({Q0: 3, Q1: 4})}, "one rank, 256, not 3"),
        ("dylora", {"rank": 4, "ranks": RankMap({Q0: 3, Q1: 4})}, "one rank, 4, not 3"),
        ("delta-lora", {"rank": 2, "ranks": RankMap({Q0: LayerRank(2, gates=(0.5, 1.0))})}, "gates"),
        ("pissa", {"ranks": RankMap({Q0: LayerRank(2, gates=(0.5, 1.0))})}, "gates"),
        ("full", {"ranks": MAP}, "no layer is adapted"),
        ("lora", {"ranks": {Q0: 2}}, "expected a RankMap"),
        ("lora", {"policy": "dropp"}, "choose one of drop"),
        ("lora", {"policy": "error-spectrum"}, "store=None"),
        ("vera", {"policy": "drop"}, "no A and B of its own"),
        ("dylora", {"policy": "error-spectrum", "store": "bfloat16"}, "one rank"),
        ("lora-drop", {}, "there is none"),
        ("alora", {}, "there is none"),
        ("lora", {"ranks": RankMap({**MAP.layers, V0: 25})}, "rank 25"),
    ],
)
def test_a_method_that_cannot_take_a_map_says_why(method, given, problem):
    with pytest.raises(UserError) as caught:
        loralab.attach(build("bert"), method, targets=TARGETS, **given)
    assert problem in str(caught.value)


def test_vera_takes_a_map_that_leaves_layers_out():
    layers = {Q0: 6, Q1: 0, V0: 6, V1: 6, UP0: 0, UP1: 0}
    _, adapters = adapted("vera", RankMap(layers), rank=6)
    assert adapters.spec("a").paths == [Q0, V0, V1]


# ---- LoRA-drop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_importance_is_the_mean_square_of_the_update_over_real_tokens(method):
    given = {"rank": 3, **({"alpha": 5.0, "dropout": 0.5} if method != "vera" else {})}
    model = build("bert")
    adapters = loralab.attach(model, method, name="a", head=True, **given)
    shake(adapters, "a")
    model.train()
    batches = [rows(seed=3), rows(count=2, tokens=4, seed=4)]
    found = importance(adapters, "a", batches)
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in adapters.layers.values())
    model.eval()
    inputs = {path: [] for path in adapters.spec("a").paths}
    hooks = [
        adapters.layers[path].register_forward_pre_hook(lambda m, args, path=path: inputs[path].append(args[0]))
        for path in inputs
    ]
    for batch in batches:
        logits(model, batch)
    for hook in hooks:
        hook.remove()
    g = {}
    for path, seen in inputs.items():
        layer = adapters.layers[path]
        W, own = layer.base.dense().double(), layer.plain("a").weight.double()
        total, count = 0.0, 0
        for batch, x in zip(batches, seen, strict=True):
            for row in range(len(x)):
                if x.ndim == 2:  # the pooler sees one vector a row
                    total, count = total + float(((own - W) @ x[row].double()).square().sum()), count + 1
                    continue
                for token in range(x.shape[1]):
                    if batch["attention_mask"][row, token]:
                        total += float(((own - W) @ x[row, token].double()).square().sum())
                        count += 1
        g[path] = total / count
    expected = {path: value / sum(g.values()) for path, value in g.items()}
    assert found == pytest.approx(expected, rel=1e-3)
    assert sum(found.values()) == pytest.approx(1)


def test_inputs_that_are_no_tokens_of_the_batch_do_not_count():
    model = build("deberta-v2")  # its q and k also see relative positions, (1, positions, in)
    adapters = loralab.attach(model, "lora", name="a", rank=3, targets="attention-q")
    shake(adapters, "a")
    path, seen = adapters.spec("a").paths[0], []
    hook = adapters.layers[path].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    found = importance(adapters, "a", [rows()])
    hook.remove()
    assert 1 in seen
    counted = {}
    for p in adapters.spec("a").paths:
        layer = adapters.layers[p]

        def first(module, args, p=p):
            counted.setdefault(p, args[0])

        hook = layer.register_forward_pre_hook(first)
        logits(model)
        hook.remove()
        D = layer.lower("a").matrix()
        counted[p] = float((counted[p][rows()["attention_mask"].bool()] @ D.T).square().sum(1).mean())
    assert found == pytest.approx({p: v / sum(counted.values()) for p, v in counted.items()}, rel=1e-4)


def test_an_update_of_zero_has_no_importance():
    model = build("bert")
    adapters = loralab.attach(model, "lora", name="a")
    with pytest.raises(UserError, match="train it before"):
        importance(adapters, "a", [rows()])
    with pytest.raises(UserError, match="no token"):
        importance(adapters, "a", [])


def test_the_smallest_prefix_keeps_its_own_and_the_rest_shares_by_kind():
    names = [f"x.{i}.{what}" for i in range(4) for what in ("q", "v", "up.dense")]
    sizes = {name: (7, 5) if "dense" in name else (5, 5) for name in names}
    block = [0.25, 0.05, 0.4, 0.1]  # q and v of a block together
    values = {f"x.{i}.q": 0.4 * g for i, g in enumerate(block)} | {f"x.{i}.v": 0.6 * g for i, g in enumerate(block)}
    values |= {f"x.{i}.up.dense": 0.05 for i in range(4)}
    made = drop_map({name: values[name] for name in names}, sizes, rank=3, keep=0.64)
    owners = {path for path, part in made.layers.items() if part.share is None}
    assert owners == {"x.0.q", "x.0.v", "x.2.q", "x.2.v"}  # 0.4 + 0.25 >= 0.64 of 1, and 0.4 is not
    assert {share: len(paths) for share, paths in made.shares.items()} == {
        "x.*.q 5x5": 2,
        "x.*.v 5x5": 2,
        "x.*.up.dense 7x5": 4,
    }
    assert {part.rank for part in made.layers.values()} == {3}
    assert not drop_map(values, sizes, keep=1.0).shares
    alone = drop_map(values, sizes, keep=0.0)
    assert all(part.share for part in alone.layers.values())
    with pytest.raises(UserError, match="keep=1.5"):
        drop_map(values, sizes, keep=1.5)
    assert (parent(Q0), folded(Q0)) == (f"{L}.0.attention.self", f"{L}.*.attention.self.query")


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama"])
def test_a_map_of_drop_fits_the_model_it_came_from(arch):
    model = build(arch)
    adapters = loralab.attach(model, "lora", name="a", rank=3)
    shake(adapters, "a")
    made = drop_map(importance(adapters, "a", [rows()]), shapes(adapters, "a"), 2, keep=0.5)
    full = adapters.counts("a")["adapter"] * 2 / 3
    adapters.detach()
    again = loralab.attach(model, "lora-drop", name="a", ranks=made)
    assert again.counts("a")["adapter"] < full
    assert made.shares


# ---- the command line --------------------------------------------------------------------------------------------


def test_every_policy_of_the_table_can_run():
    assert making.MAKERS.keys() == POLICIES.keys()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "more",
    [
        {"method": "lora-drop", "keep": 0.5},
        {"method": "alora"},
        {"policy": "error-spectrum", "store": "bfloat16"},
        {"policy": "groups", "span": 2},
    ],
)
def test_train_makes_the_map_counts_its_cost_and_goes_on_with_the_same_one(tiny, own, tmp_path, more, monkeypatch):
    from test_train import metrics, settings

    s = settings(tiny, own, tmp_path / "r", lr=1e-2, **more)
    result = train(s)
    cost = result["time"]["plan"]
    assert cost["name"] == (more.get("policy") or NAMED[more["method"]][0].policy)
    seconds = sum(row["seconds"] for row in metrics(tmp_path / "r"))
    assert result["time"]["train_s"] == pytest.approx(cost["seconds"] + seconds, abs=1e-3)
    assert result["time"]["train_s"] > cost["seconds"] > 0
    assert (cost["steps"] > 0) == ("method" in more)
    assert any(note.startswith(f"policy {cost['name']} gave") for note in result["notes"])
    run = json.loads((tmp_path / "r/run.json").read_text())
    ranks = RankMap.from_json(run["recipe"]["ranks"])
    assert bool(ranks.shares) == POLICIES[cost["name"]].shares
    assert loralab.files.read(tmp_path / "r/adapter").recipe.ranks == ranks
    again = train(settings(tiny, own, tmp_path / "s", lr=1e-2, **more))
    assert again["metrics"] == result["metrics"]

    # a resumed run takes its map from run.json, and ends as the other
    from loralab.run import loop

    real, calls = loop.Loop._evaluate, []

    def once(self, ended):
        real(self, ended)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_evaluate", once)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny, own, tmp_path / "t", lr=1e-2, **more))
    monkeypatch.setattr(making, "MAKERS", {})
    resumed = train(settings(tiny, own, tmp_path / "t", lr=1e-2, resume=True, **more))
    assert resumed["metrics"] == result["metrics"]
    assert resumed["counts"] == result["counts"]


def test_alora_by_name_moves_ranks_and_keeps_the_budget(tiny, own, tmp_path):
    from test_train import settings

    given = {"method": "alora", "rank": 3, "epochs": 1, "rounds": 2, "lr": 1e-2}
    result = train(settings(tiny, own, tmp_path / "r", **given))
    ranks = loralab.files.read(tmp_path / "r/adapter").recipe.ranks
    each = [part.rank for part in ranks.layers.values()]
    assert sum(each) == 3 * len(each)
    assert len(set(each)) > 1
    once = train(settings(tiny, own, tmp_path / "s", **given | {"rounds": 1}))
    assert result["time"]["plan"]["steps"] == 2 * once["time"]["plan"]["steps"] > 0


def test_a_policy_that_changes_nothing_says_so(tiny, own, tmp_path):
    """LoRA-drop that keeps every layer, and ALoRA that moves no rank, are plain LoRA."""
    from test_train import settings

    note = "policy drop gave 3 of 3 layers, rank 4: no layer differs from another, as without a policy"
    targets = r".*layer\.0\.(attention\.self\.query|intermediate\.dense|output\.dense)"
    given = {"targets": targets, "rank": 4, "epochs": 1, "lr": 1e-2}
    result = train(settings(tiny, own, tmp_path / "r", method="lora-drop", keep=1.0, **given))
    assert note in result["notes"]
    with pytest.raises(UserError, match="ALoRA with one adapted layer: ranks move between layers"):
        train(settings(tiny, own, tmp_path / "s", method="alora", **given | {"targets": r".*layer\.0\..*query"}))
    assert not RankMap({Q0: 4, Q1: 3}).even
    assert not RankMap({Q0: LayerRank(4, "q"), Q1: LayerRank(4, "q")}).even
    assert not RankMap({Q0: 4, Q1: 0}).even
    assert not RankMap({Q0: LayerRank(1, gates=(0.5,))}).even


def test_train_takes_a_map_from_a_file(tiny, own, tmp_path):
    from test_train import settings

    paths = [f"encoder.layer.{i}.attention.self.{what}" for i in range(2) for what in ("query", "value")]
    ranks = RankMap({f"bert.{path}": LayerRank(3, share=path.rpartition(".")[2]) for path in paths})
    file = ranks.save(tmp_path / "map.json")
    result = train(settings(tiny, own, tmp_path / "r", epochs=1, targets="attention-qv", ranks=file))
    assert result["counts"]["adapter"] == 2 * 3 * (24 + 24)
    assert "plan" not in result["time"]


# ---- ALoRA -------------------------------------------------------------------------------------------------------


def scored_batch():
    return {**rows(seed=7), "labels": torch.tensor([0, 1, 2, 1, 0])}


def test_scores_are_those_of_models_with_ranks_zeroed_by_hand():
    model = build("bert")
    adapters = loralab.attach(model, "lora", name="a", rank=2, alpha=5.0, targets="attention-qv")
    shake(adapters, "a")
    found = scores(adapters, "a", scored_batch())
    state = {key: t.detach().clone() for key, t in adapters.state("a").items()}

    def S(live):
        """minus the loss with B zero but in the columns (path, i) of `live`."""
        fresh = build("bert")
        other = loralab.attach(fresh, "lora", name="a", rank=2, alpha=5.0, targets="attention-qv")
        with torch.no_grad():
            for key, t in other.state("a").items():
                t.copy_(state[key])
                path, role = key.rsplit(".", 1)
                if role == "B":
                    for i in range(2):
                        if (path, i) not in live:
                            t[:, i] = 0
            return -fresh(**scored_batch()).loss.item()

    every = {(path, i) for path in found for i in range(2)}
    for path, row in found.items():
        for i, score in enumerate(row):
            assert score == pytest.approx(-S(every - {(path, i)}) + S({(path, i)}), abs=1e-5)
    assert all("gates" not in layer.roles("a") for layer in adapters.layers.values())
    assert all(torch.equal(t, state[key]) for key, t in adapters.state("a").items())


def test_divide_moves_the_lowest_to_those_that_lost_none():
    scored = {"a": [0.1, 0.2, 0.9], "b": [0.5, 0.3, 0.8], "c": [0.7, 0.6], "d": [0.55, 0.95]}
    ranks, most = {path: len(row) for path, row in scored.items()}, dict.fromkeys(scored, 9)
    lost, given = divide(scored, ranks, most)
    assert lost == {"a": [0, 1], "b": [1, 0]}
    assert given == {"c": 2, "d": 2}
    lost, given = divide({"a": [0.1], "b": [0.5, 0.6], "c": [0.9]}, {"a": 1, "b": 2, "c": 1}, most)
    assert (lost, given) == ({"a": [0], "b": [0, 1]}, {"c": 3})
    scored = {"a": [0.1, 0.2, 0.3], "b": [0.7, 0.8], "c": [0.5, 0.9]}
    assert divide(scored, {"a": 3, "b": 2, "c": 2}, most)[1] == {"b": 2, "c": 1}  # b has the higher mean
    full = {"a": 3, "b": 2, "c": 3}
    assert divide(scored, {"a": 3, "b": 2, "c": 2}, full)[1] == {"c": 1}  # b is full and c has room for one: one moves
    assert divide(scored, {"a": 3, "b": 2, "c": 2}, {"a": 3, "b": 2, "c": 2}) == ({}, {})
    each = {"a": [0.1, 0.5], "b": [0.2, 0.6]}  # two would lose one each and none be left to win: so one rank moves
    assert divide(each, {"a": 2, "b": 2}, {"a": 9, "b": 9}) == ({"a": [0]}, {"b": 1})
    lost, given = divide({"a": [0.1], "b": [0.5]}, {"a": 1, "b": 1, "z": 0}, {"a": 9, "b": 9, "z": 9})
    assert (lost, given) == ({"a": [0], "b": [0]}, {"z": 2})  # one that has none left may come back


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_reallocating_keeps_what_the_kept_ranks_do(method):
    model = build("bert")
    adapters = loralab.attach(model, method, name="a", rank=2, alpha=5.0, targets="attention-qv")
    shake(adapters, "a")
    paths = adapters.spec("a").paths
    invented = {path: [0.1 * i, 0.1 * i + 0.01] for i, path in enumerate(paths)}  # layers 0 and 1 lose all
    before = {path: adapters.layers[path].lower("a").matrix().detach() for path in paths}
    made = reallocate(adapters, "a", invented, torch.Generator().manual_seed(3))
    assert [made.layers[path].rank for path in paths] == [0, 0, 4, 4]
    assert adapters.spec("a").paths == paths[2:]
    for path in paths[2:]:
        layer = adapters.layers[path]
        torch.testing.assert_close(layer.lower("a").matrix(), before[path])
        assert layer.roles("a")["A"][2:].abs().min() > 0
        assert not layer.roles("a")["B"][:, 2:].any()
        assert layer.roles("a")["A"].requires_grad
    assert adapters.spec("a").recipe.ranks == made
    assert adapters.counts("a")["adapter"] == 8 * (24 + 24)
    invented = {paths[2]: [0.1, 0.2, 0.3, 0.4], paths[3]: [0.5, 0.6, 0.7, 0.8]}  # the next round: two come back
    before = adapters.layers[paths[3]].lower("a").matrix().detach()
    made = reallocate(adapters, "a", invented, torch.Generator().manual_seed(4))
    assert [made.layers[path].rank for path in paths] == [1, 1, 0, 6]
    torch.testing.assert_close(adapters.layers[paths[3]].lower("a").matrix(), before)
    assert set(adapters.spec("a").paths) == {paths[0], paths[1], paths[3]}


def train_with(adapters, steps=3):
    def epoch(number):
        optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=2e-2))
        for step in range(steps):
            adapters.model(**rows(seed=step), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def test_the_budget_holds_in_every_round_and_the_adapter_can_be_saved(tmp_path):
    model = build("bert")
    adapters = loralab.attach(model, "lora", name="a", rank=2, alpha=5.0, head=True, targets="attention-qv")
    maps = alora(adapters, "a", train_with(adapters), scored_batch(), rounds=3, train_more=train_with(adapters, 1))
    for made in maps:
        assert sum(part.rank for part in made.layers.values()) == 4 * 2
        assert set(made.layers) == set(maps[0].layers)
    assert len({tuple(part.rank for part in made.layers.values()) for made in maps}) > 1
    assert adapters.counts("a")["adapter"] == 8 * (24 + 24)
    adapters.save(tmp_path)
    fresh = build("bert")
    loralab.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_an_optimizer_from_before_the_round_is_noticed():
    model = build("bert")
    adapters = loralab.attach(model, "lora", name="a", rank=2, targets="attention-qv")
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=2e-2))

    def epoch(number):
        for step in range(3):
            model(**rows(seed=step), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
            optimizer.step()

    with pytest.raises(UserError, match="make the optimizer anew"):
        alora(adapters, "a", epoch, scored_batch(), rounds=3)


@pytest.mark.parametrize(("method", "given"), [("dora", {}), ("vera", {}), ("dylora", {}), ("lora", {"ranks": MAP})])
def test_alora_is_for_plain_factors_of_their_own(method, given):
    adapters = loralab.attach(build("bert"), method, name="a", targets=TARGETS, **given)
    with pytest.raises(UserError, match="ALoRA"):
        scores(adapters, "a", scored_batch())


# ---- error-spectrum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [name for name in STORES if name != "float32"])
def test_ranks_go_where_the_largest_errors_are(store):
    model = build("bert")
    with torch.no_grad():
        model.get_submodule(V1).weight.mul_(5)  # a larger weight errs more
    layers = {path: model.get_submodule(path) for path in (Q0, V0, V1, UP0)}
    made = error_map(layers, store, rank=3)
    assert sum(part.rank for part in made.layers.values()) == 12
    values = []
    for path, layer in layers.items():
        E = layer.weight.detach().double() - keep(layer, store).dense().double()
        values += [(float(v), path) for v in torch.linalg.svd(E).S]
        torch.testing.assert_close(error_spectrum(layer, store), torch.linalg.svd(E).S)
    top = [path for _, path in sorted(values, reverse=True)[:12]]
    assert {path: part.rank for path, part in made.layers.items()} == {path: top.count(path) for path in layers}
    assert made.layers[V1].rank > 3


def test_no_other_division_of_the_budget_leaves_less_error():
    spectra = {
        "a": torch.tensor([5.0, 3.0, 1.0]),
        "b": torch.tensor([4.0, 0.5]),
        "c": torch.tensor([2.0, 1.5, 1.2, 0.1]),
    }
    made = allocate(spectra, 5)

    def left(ranks):
        return sum(float(spectra[path][k:].square().sum()) for path, k in ranks.items())

    ways = [
        {"a": a, "b": b, "c": 5 - a - b} for a in range(4) for b in range(3) if 0 <= 5 - a - b <= 4
    ]  # every division of 5 ranks
    assert left({path: part.rank for path, part in made.layers.items()}) == min(map(left, ways))
    assert {path: part.rank for path, part in allocate(spectra, 5, least=1).layers.items()} == {"a": 2, "b": 1, "c": 2}
    with pytest.raises(UserError, match="0 to 9"):
        allocate(spectra, 10)
    with pytest.raises(UserError, match="keeps every bit"):
        error_map({"a": nn.Linear(5, 3)}, "float32")


def test_the_map_of_the_test_architectures_shares():
    assert rank_map(build("bert")).shares  # what the laws run lora-drop with
