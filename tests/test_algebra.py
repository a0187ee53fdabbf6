"""Algebra of adapters against sums of whole matrices, and against PEFT's own functions."""

import math

import pytest
import torch
import zoo
from archs import build, rows, shake

import loralab
from loralab import algebra, files
from loralab.adapted import base_tensor
from loralab.algebra import combine
from loralab.extract import extract

RANKS = {"a": 2, "b": 3, "c": 2}
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}


def adapted(method="lora", head=False, **given):
    """A model with three adapters in general position: other ranks, scalings not 1, B not zero."""
    model = build("bert")
    targets = {"a": ["query", "intermediate.dense"], "b": ["query", "value"], "c": ["query", "intermediate.dense"]}
    settings = {"targets": targets["a"], "rank": 2, "alpha": 5.0, "head": head, **given}
    adapters = loralab.attach(model, method, name="a", **settings)
    for name in "bc":
        adapters.add(name, "lora", **{**settings, "targets": targets[name], "rank": RANKS[name], "alpha": 3.0})
    for i, name in enumerate("abc"):
        shake(adapters, name, seed=i)
    return model, adapters


def deltas(adapters, name):
    """Path -> D (out, in) in float64, the slow way."""
    return {path: adapters.layers[path].lower(name).matrix().detach().double() for path in adapters.spec(name).paths}


def total(adapters, weights):
    out = {}
    for name, w in weights.items():
        for path, D in deltas(adapters, name).items():
            out[path] = out.get(path, 0) + w * D
    return out


@pytest.mark.parametrize("weights", [WEIGHTS, {"a": 1.0, "b": -1.0}, {"b": 2.5}])
def test_an_exact_combination_is_the_weighted_sum(weights):
    model, adapters = adapted()
    made = adapters.combine("sum", weights)
    assert made.error == 0
    right = total(adapters, weights)
    for path, D in deltas(adapters, "sum").items():
        torch.testing.assert_close(D, right.pop(path), rtol=0, atol=1e-5)
    assert not right
    ranks = {path: cut.rank for path, cut in made.layers.items()}
    per_layer = {p: sum(RANKS[n] for n in weights if p in adapters.spec(n).paths) for p in ranks}
    assert ranks == per_layer
    assert adapters.names == ["a", "b", "c", "sum"]
    with torch.no_grad():
        now = model(**rows()).logits
        plain = adapters.merge("sum")(**rows()).logits
    torch.testing.assert_close(now, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4, 24])
def test_a_rank_gives_the_best_cut_and_its_error(rank):
    _, adapters = adapted()
    made = adapters.combine("cut", WEIGHTS, rank=rank)
    lost = whole = 0.0
    for path, D in total(adapters, WEIGHTS).items():
        s = torch.linalg.svdvals(D)
        gone, size = float(s[rank:].square().sum()), float(s.square().sum())
        own = deltas(adapters, "cut")[path]
        assert float((D - own).norm()) == pytest.approx(math.sqrt(gone), abs=1e-4)
        assert made.layers[path].error == pytest.approx(math.sqrt(gone / size), abs=1e-5)
        assert made.layers[path].rank <= rank
        lost, whole = lost + gone, whole + size
    assert made.error == pytest.approx(math.sqrt(lost / whole), abs=1e-5)
    assert (made.error > 1e-3) == (rank < 7)  # that of the query: 2 + 3 + 2


@pytest.mark.parametrize("how", ["magnitude", "ties"])
def test_trimmed_merges_are_those_of_peft(how):
    utils = pytest.importorskip("peft.utils.merge_utils")
    _, adapters = adapted()
    adapters.combine("made", WEIGHTS, how, density=0.4)
    theirs = utils.magnitude_prune if how == "magnitude" else utils.ties
    for path, D in deltas(adapters, "made").items():
        there = [n for n in WEIGHTS if path in adapters.spec(n).paths]
        parts = [deltas(adapters, n)[path] for n in there]
        right = theirs(parts, torch.tensor([WEIGHTS[n] for n in there], dtype=torch.float64), 0.4)
        torch.testing.assert_close(D, right, rtol=0, atol=1e-5)


def test_dare_keeps_a_share_of_the_values_and_their_mean():
    _, adapters = adapted()
    D = next(iter(deltas(adapters, "a").values()))
    drawn = torch.zeros_like(D)
    for seed in range(400):
        one = algebra.MERGES["dare"]([D], [1.0], 0.25, torch.Generator().manual_seed(seed))
        assert set((one / D).round(decimals=6).unique().tolist()) <= {0.0, 4.0}
        drawn += one / 400
    assert abs(float((one != 0).double().mean()) - 0.25) < 0.05
    assert float((drawn - D).norm() / D.norm()) < 3 * math.sqrt(3 / 400)
    first, again = (adapters.combine(n, {"a": 1.0}, "dare", density=0.5, seed=7).file.tensors for n in ("x", "y"))
    assert all(torch.equal(t, again[key]) for key, t in first.items())


def test_the_cross_terms_of_linear_are_said():
    peft = pytest.importorskip("peft")
    _, adapters = adapted()
    folders = {}
    weights = {"a": 0.7, "c": 1.3}
    made = adapters.combine("made", weights)
    for name in weights:
        config = {"r": 2, "lora_alpha": adapters.spec(name).recipe.factors.alpha}
        folders[name] = peft.LoraConfig(**config, target_modules=["query", "intermediate.dense"])
    theirs = peft.get_peft_model(build("bert"), folders["a"], adapter_name="a")
    theirs.add_adapter("c", folders["c"])
    modules = dict(theirs.base_model.model.named_modules())
    for name in weights:
        for path in adapters.spec(name).paths:
            p = adapters.layers[path].roles(name)
            modules[path].lora_A[name].weight.data.copy_(p["A"])
            modules[path].lora_B[name].weight.data.copy_(p["B"])
    theirs.add_weighted_adapter(list(weights), list(weights.values()), "linear", combination_type="linear")
    for path, D in total(adapters, weights).items():
        off = D - modules[path].get_delta_weight("linear").double()
        assert made.layers[path].linear == pytest.approx(float(off.norm() / D.norm()), abs=1e-5)
        assert made.layers[path].linear > 0.1
    assert all(cut.linear is None for cut in adapters.combine("other", {"a": 1.0, "b": 1.0}).layers.values())


def test_heads_are_averaged_and_folders_combine_as_live_adapters_do(tmp_path):
    _, adapters = adapted(head=True)
    with torch.no_grad():
        for i, name in enumerate("ab"):
            for key, t in adapters.state(name).items():
                if key.startswith("classifier"):
                    t.add_(i + 1.0)
    weights = {"a": 0.3, "b": 0.7}
    read = [files.read(adapters.save(tmp_path / name, name)) for name in weights]
    made = combine(read, list(weights.values()))
    files.write(made.file, tmp_path / "both")
    live = adapters.combine("live", weights).file.tensors
    fresh = loralab.load(build("bert"), tmp_path / "both")
    for key, t in fresh.state().items():
        assert torch.equal(t, live[key])
    mean = 0.3 * adapters.state("a")["classifier.weight"] + 0.7 * adapters.state("b")["classifier.weight"]
    torch.testing.assert_close(fresh.state()["classifier.weight"], mean)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"weights": {"a": 0.5, "b": 0.6}, "head": True}, "add up to 1.1"),
        ({"weights": {"a": 1.0}, "method": "dora"}, "has a gain (DoRA)"),
        ({"weights": {"a": 1.0}, "method": "vera"}, "give --model"),
        ({"weights": {"a": 1.0}, "how": "mean"}, "choose one of exact, magnitude, dare, ties"),
        ({"weights": {"a": 1.0}, "density": 0.5}, "drops nothing"),
        ({"weights": {"a": 1.0}, "how": "ties", "density": 0.0}, "above 0, at most 1"),
        ({"weights": {"a": math.nan}}, "one number for each"),
        ({"weights": {}}, "one number for each"),
        ({"weights": {"a": 1.0}, "rank": 0}, "rank=0"),
        ({"weights": {"z": 1.0}}, "no adapter 'z'"),
    ],
)
def test_what_cannot_be_combined_is_refused(given, told):
    given = dict(given)
    method = given.pop("method", "lora")
    more = {} if method != "vera" else {"alpha": None}
    model, adapters = adapted(method, head=given.pop("head", False)) if not more else (None, None)
    if more:
        model = build("bert")
        adapters = loralab.attach(model, "vera", name="a", rank=3)
        shake(adapters, "a")
    before = adapters.names
    with pytest.raises(loralab.UserError) as caught:
        adapters.combine("made", given.pop("weights"), **given)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert adapters.names == before


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"seed": 1}, "of different bases"),
        ({"head": ["classifier"]}, "different heads"),
        ({"head": True, "labels": ["x", "y", "z"]}, "different labels"),
    ],
)
def test_adapters_of_other_bases_heads_and_labels_are_refused(other, told, tmp_path):
    given = {"head": told == "different labels", **{k: v for k, v in other.items() if k != "seed"}}
    one = loralab.attach(build("bert"), "lora", rank=2, head=given["head"] if told == "different labels" else False)
    two = loralab.attach(build("bert", other.get("seed", 0)), "lora", rank=2, **given)
    read = [files.read(each.save(tmp_path / str(i))) for i, each in enumerate((one, two))]
    with pytest.raises(loralab.UserError, match=told):
        combine(read, [0.5, 0.5])


@pytest.mark.parametrize("rank", [3, 24])
def test_a_tuned_model_minus_its_base_is_a_lora_with_its_error(rank):
    base, tuned = build("gpt2"), build("gpt2")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "c_" in key or "score" in key or key == "transformer.ln_f.bias":
                p.add_(torch.empty(p.shape).normal_(0, 0.1, generator=generator))
    right, before = tuned(**rows()).logits.detach(), {k: p.detach().clone() for k, p in tuned.named_parameters()}
    made = extract(base, tuned, rank)
    for path, error in made.layers.items():
        D = (tuned.get_submodule(path).weight - build("gpt2").get_submodule(path).weight).double().T
        s = torch.linalg.svdvals(D)
        assert error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-5)
    biases = [key for key in before if "c_" in key and key.endswith("bias")]
    assert sorted(made.left) == sorted([*biases, "transformer.ln_f.bias"])
    assert all(torch.equal(p, before[key]) for key, p in tuned.named_parameters())
    assert made.adapters.spec(None).heads == ("score",)
    with torch.no_grad():
        for key in made.left:
            base_tensor(base, key).copy_(before[key])
        off = (base(**rows()).logits - right).abs().max()
    assert off < 1e-4 if rank == 24 else off > 1e-2


def test_models_of_other_shapes_are_no_difference():
    with pytest.raises(loralab.UserError, match="not of one base"):
        extract(build("bert"), build("gpt2"), 2)


# ---- stacks of experts -----------------------------------------------------------------------------------------------


def mixture():
    """A mixture of experts with three adapters on its stacks and on linear layers, in general position."""
    model = zoo.build("mixtral")
    given = {"targets": ["experts", "q_proj"], "alpha": 5.0}
    adapters = loralab.attach(model, "lora", name="a", rank=2, **given)
    adapters.add("b", "lora", rank=3, **given)
    adapters.add("c", "lora", rank=2, stabilized=True, **given)
    for i, name in enumerate("abc"):
        shake(adapters, name, seed=i)
    return model, adapters


def stacks(adapters):
    return [path for path in adapters.spec("a").paths if "experts" in path]


def test_stacks_of_experts_are_summed_saved_and_loaded(tmp_path):
    model, adapters = mixture()
    right = total(adapters, WEIGHTS)
    made = adapters.combine("sum", WEIGHTS)
    assert len(stacks(adapters)) == 2 * len(model.model.layers)
    assert {made.layers[path].rank for path in stacks(adapters)} == {7}
    for path, D in deltas(adapters, "sum").items():
        torch.testing.assert_close(D, right[path], rtol=0, atol=1e-5)
    assert right[stacks(adapters)[0]].ndim == 3
    fresh = loralab.load(zoo.build("mixtral"), adapters.save(tmp_path / "sum", "sum"))
    for path, D in deltas(fresh, "sum").items():
        torch.testing.assert_close(D, right[path], rtol=0, atol=1e-5)
    read = [files.read(adapters.save(tmp_path / name, name)) for name in WEIGHTS]
    of_folders = combine(read, list(WEIGHTS.values())).file.tensors
    assert all(torch.equal(t, of_folders[key]) for key, t in made.file.tensors.items())


@pytest.mark.parametrize("rank", [2, 5])
def test_each_expert_is_cut_to_its_own_best_rank(rank):
    _, adapters = mixture()
    right = total(adapters, WEIGHTS)
    made = adapters.combine("cut", WEIGHTS, rank=rank)
    for path, D in deltas(adapters, "cut").items():
        s = torch.linalg.svdvals(right[path])  # (experts, side)
        left = float(s[..., rank:].norm())
        assert float((D - right[path]).norm()) == pytest.approx(left, abs=1e-5)
        assert made.layers[path].error == pytest.approx(left / float(s.norm()), abs=1e-6)


def test_the_cross_terms_of_linear_are_said_of_experts():
    _, adapters = mixture()
    made = adapters.combine("two", {"a": 0.6, "c": 0.4})
    path, w = stacks(adapters)[0], {"a": 0.6, "c": 0.4}
    scaling = {"a": 5 / 2, "c": 5 / 2**0.5}
    p = {name: adapters.layers[path].roles(name) for name in w}
    root = {name: (w[name] * scaling[name]) ** 0.5 for name in w}
    A, B = (sum(root[name] * p[name][role].double() for name in w) for role in "AB")
    crossed, right = B @ A, total(adapters, w)[path]
    assert made.layers[path].linear == pytest.approx(float((crossed - right).norm() / right.norm()), rel=1e-5)


@pytest.mark.parametrize("how", ["magnitude", "ties", "dare"])
def test_each_expert_is_trimmed_by_itself(how):
    _, adapters = mixture()
    weights, density = {"a": 0.7, "b": 0.6}, 0.4
    adapters.combine("made", weights, how=how, density=density)
    for path in stacks(adapters):
        of = {n: deltas(adapters, n)[path] for n in weights}  # (experts, out, in) each
        found = deltas(adapters, "made")[path]
        for e in range(len(found)):
            kept = {}
            for n, D in of.items():
                border = D[e].abs().flatten().sort(descending=True).values[int(density * D[e].numel()) - 1]
                kept[n] = torch.where(D[e].abs() >= border, D[e], 0.0)
            if how == "magnitude":
                torch.testing.assert_close(found[e], sum(w * kept[n] for n, w in weights.items()), rtol=0, atol=1e-5)
            elif how == "ties":
                sign = torch.where(kept["a"] + kept["b"] >= 0, 1.0, -1.0)
                agree = {n: (D.sign() == sign).double() for n, D in kept.items()}
                right = sum(w * kept[n] * agree[n] for n, w in weights.items()) / (agree["a"] + agree["b"]).clamp_min(1)
                torch.testing.assert_close(found[e], right, rtol=0, atol=1e-5)
            else:
                share = float((found[e].abs() > 1e-6).double().mean())
                assert share == pytest.approx(1 - (1 - density) ** 2, abs=0.1)


def test_a_tuned_mixture_minus_its_base_has_the_experts_too():
    base, tuned = zoo.build("mixtral"), zoo.build("mixtral")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            if "experts" in key or "q_proj" in key:
                p.add_(torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.1, generator=generator))
    made = extract(base, tuned, 3, targets=["experts", "q_proj"])
    for path, error in made.layers.items():
        name = path if "experts" in path else f"{path}.weight"
        D = (tuned.get_parameter(name) - zoo.build("mixtral").get_parameter(name)).double()
        s = torch.linalg.svdvals(D)
        assert error == pytest.approx(float(s[..., 3:].norm() / s.norm()), abs=1e-5)
    assert not made.left
