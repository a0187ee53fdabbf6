"""Starts against slow literal oracles and against PEFT, and what must hold around them: portable, saved, composed."""

import dataclasses
import warnings

import pytest
import torch
import zoo
from archs import build, labelled, rows, shake
from torch import Generator, nn

import loralab
from loralab import UserError
from loralab.adapters import read
from loralab.gradients import weight_gradients
from loralab.inputs import each_input, observe
from loralab.methods import starts
from loralab.methods.lora import LoRA
from loralab.methods.starts import STARTS, begin, blank
from loralab.recipe import FACTORS, Recipe, recipe
from loralab.stores import keep

N_OUT, N_IN, RANK = 13, 17, 4
PLAIN = LoRA(rank=RANK, alpha=10.0)  # scaling 2.5
AWAY = [name for name, start in STARTS.items() if start.subtracted]
QUERY = "bert.encoder.layer.1.attention.self.query"
DENSE = "bert.encoder.layer.0.output.dense"  # 24 x 37


def linear(seed=0, out=N_OUT, wide=N_IN):
    torch.manual_seed(seed)
    layer = nn.Linear(wide, out)
    nn.init.normal_(layer.weight, std=0.4), nn.init.normal_(layer.bias)
    return layer


def begun(start, layer, store=None, seed=0, factors=PLAIN, seen=None):
    generator = Generator().manual_seed(seed)
    W = keep(layer).dense()
    base = keep(layer, store)
    p = blank(start, factors, base.out_features, base.in_features, generator)
    return p | begin(start, factors, W, base, generator, seen)


def needed(start):
    """What a recipe of this start needs beside a rank."""
    return {"eva": {"batches": [labelled()]}, "lora-ga": {"batches": [labelled()]}, "loftq": {"store": "nf4"}}.get(
        start, {}
    )


def attached(start, kind="bert", **given):
    model = build(kind)
    return model, loralab.attach(
        model, "lora", name="a", start=start, head=True, **{"rank": 4, "alpha": 10.0} | needed(start) | given
    )


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or rows())).logits


# ---- each rule against a literal one --------------------------------------------------------------------------------


def by_eigenvectors(M, rank):
    """The best rank-r part of M (fp64): M times the projector on the eigenvectors of M^T M with the largest values."""
    _, V = torch.linalg.eigh(M.double().T @ M.double())
    top = V[:, -rank:]
    return M.double() @ top @ top.T


@pytest.mark.parametrize("shape", [(N_OUT, N_IN), (N_IN, N_OUT)])
@pytest.mark.parametrize("start", ["pissa", "pissa-fast"])
def test_pissa_is_the_best_part_of_the_weight_in_equal_halves(start, shape):
    layer = linear(out=shape[0], wide=shape[1])
    p = begun(start, layer)
    A, B, W = p["A"].double(), p["B"].double(), layer.weight.detach()
    torch.testing.assert_close(PLAIN.scaling * B @ A, by_eigenvectors(W, RANK), rtol=0, atol=1e-5)
    S = torch.linalg.svdvals(W.double())[:RANK] / PLAIN.scaling
    torch.testing.assert_close(A @ A.T, S.diag(), rtol=0, atol=1e-5)  # both halves carry sqrt(S / s)
    torch.testing.assert_close(B.T @ B, S.diag(), rtol=0, atol=1e-5)


def test_the_fast_pissa_is_close_on_a_real_spectrum():
    """A weight whose singular values fall slowly, wider than the directions that are kept."""
    torch.manual_seed(1)
    W = (
        torch.linalg.qr(torch.randn(90, 70)).Q
        * torch.arange(1, 71).pow(-0.3)
        @ torch.linalg.qr(torch.randn(80, 70)).Q.T
    )
    layer = nn.Linear(80, 90)
    layer.weight.data = W
    p = begun("pissa-fast", layer)
    best = (W - by_eigenvectors(W, RANK)).norm()
    assert best <= (W - PLAIN.scaling * p["B"] @ p["A"]).double().norm() < 1.001 * best
    assert not torch.equal(begun("pissa-fast", layer, seed=1)["A"], p["A"])  # its draw comes from the seed


def test_olora_is_gram_schmidt_on_the_columns_of_the_weight():
    layer = linear()
    p, W = begun("olora", layer), layer.weight.detach().double()
    Q = []
    for column in W.T[:RANK]:
        rest = column - sum((q @ column) * q for q in Q)
        Q.append(rest / rest.norm())
    for i, q in enumerate(Q):
        sign = torch.sign(q @ p["B"][:, i].double())
        torch.testing.assert_close(sign * p["B"][:, i].double(), q, rtol=0, atol=1e-5)
        torch.testing.assert_close(sign * p["A"][i].double(), q @ W, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", AWAY)
def test_a_start_off_zero_is_taken_away(start):
    layer = linear()
    p = begun(start, layer, seen=torch.randn(N_OUT, N_IN))  # a gradient, for a start that looks at it
    assert torch.equal(p["A0"], p["A"])
    assert torch.equal(p["B0"], PLAIN.scaling * p["B"])
    assert p["A0"].data_ptr() != p["A"].data_ptr()
    assert (p["B0"] @ p["A0"]).abs().max() > 0.1


@pytest.mark.parametrize("store", ["int8", "nf4"])
def test_loftq_is_the_best_part_of_what_the_store_rounds_away(store):
    layer = linear(out=64, wide=96)
    Q = keep(layer, store).dense()
    p, lost = begun("loftq", layer, store), layer.weight.detach() - Q
    torch.testing.assert_close(
        PLAIN.scaling * p["B"].double() @ p["A"].double(), by_eigenvectors(lost, RANK), rtol=0, atol=1e-5
    )
    assert (lost - PLAIN.scaling * p["B"] @ p["A"]).norm() < lost.norm()


def test_orthogonal_cancels_although_no_factor_is_zero():
    layer = linear(out=130, wide=170)
    p = begun("orthogonal", layer)
    assert (p["B"] @ p["A"]).abs().max() < 1e-6
    assert min(p["A"].norm(), p["B"].norm()) > 1


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_random_starts_have_the_spread_of_peft(start):
    peft = pytest.importorskip("peft")
    ours = begun(start, linear(out=300, wide=400))
    theirs = peft.get_peft_model(
        nn.Sequential(linear(out=300, wide=400)),
        peft.LoraConfig(r=RANK, lora_alpha=10, target_modules=["0"], init_lora_weights=start),
    ).base_model.model[0]
    for role, tensor in (("A", theirs.lora_A.default.weight), ("B", theirs.lora_B.default.weight)):
        assert ours[role].shape == tensor.shape
        assert ours[role].std().item() == pytest.approx(tensor.std().item(), rel=0.15)
        assert abs(ours[role].mean().item()) < 0.02
    if start == "gaussian":
        assert ours["A"].std().item() == pytest.approx(1 / RANK, rel=0.1)


@pytest.mark.parametrize("start", STARTS)
def test_every_start_has_the_same_head_and_the_seed_alone_decides(start):
    """A comparison of starts is paired: what is drawn after A and B must not depend on the start."""
    labels = ["x", "y"]  # another number of labels, so that the head's output is drawn
    _, first = attached(start, labels=labels)
    _, again = attached(start, labels=labels)
    _, plain = attached("kaiming", labels=labels)
    assert all(torch.equal(first.state("a")[key], again.state("a")[key]) for key in first.state("a"))
    head = [key for key, (role, _) in plain.tensors("a").items() if role == "head"]
    assert head
    assert all(torch.equal(first.state("a")[key], plain.state("a")[key]) for key in head)
    assert (start == "kaiming") == all(
        torch.equal(first.state("a")[f"{QUERY}.{role}"], plain.state("a")[f"{QUERY}.{role}"]) for role in "AB"
    )


# ---- eva: what the inputs span --------------------------------------------------------------------------------------


def inputs_of(model, path, batches):
    """The inputs of a layer, one row a token, padding left out, by a loop."""
    out = []
    layer = model.get_submodule(path)
    for batch in batches:
        caught = []
        handle = layer.register_forward_pre_hook(lambda _, x, caught=caught: caught.append(x[0].detach()))
        logits(model, batch)
        handle.remove()
        for row, mask in zip(caught[0], batch["attention_mask"], strict=True):
            out += [token for token, real in zip(row, mask, strict=True) if real]
    return torch.stack(out).double()


@pytest.mark.parametrize("path", [QUERY, DENSE])
def test_eva_is_the_right_singular_vectors_of_the_inputs_without_padding(path):
    batches = [rows(6, 9, seed=3), rows(4, 5, seed=4)]
    X = inputs_of(build("bert"), path, batches)
    assert len(X) == 6 * 9 - 3 * 2 + 4 * 5 - 2 * 2
    Vh, S = torch.linalg.svd(X).Vh, torch.linalg.svdvals(X)
    model, adapters = attached("eva", batches=batches)
    p = adapters.layers[path].roles("a")
    assert not p["B"].any()
    cosines = (p["A"].double() * Vh[:4]).sum(1)
    torch.testing.assert_close(cosines.abs(), torch.ones(4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(p["A"] @ p["A"].T, torch.eye(4), rtol=0, atol=1e-5)
    seen = observe(build("bert"), batches, {path: 4})[path]
    assert torch.equal(seen.directions, p["A"])
    torch.testing.assert_close(seen.shares[: len(S)].double(), S.square() / S.square().sum(), rtol=0, atol=1e-6)
    assert logits(model).isfinite().all()


def test_padding_would_have_changed_eva():
    """The padded rows are many and far from the others, so a start that takes them in cannot pass the test above."""
    batches = [rows(6, 9, seed=3)]
    plain = observe(build("bert"), batches, {QUERY: 4})[QUERY]
    unmasked = [{"input_ids": batches[0]["input_ids"]}]
    assert (observe(build("bert"), unmasked, {QUERY: 4})[QUERY].shares - plain.shares).abs().max() > 1e-3


def test_looking_changes_nothing_and_sees_the_base():
    model, batches = build("bert").train(), [rows(seed=3)]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    first = observe(model, batches, {QUERY: 4})[QUERY]
    assert model.training
    assert all(m.training for m in model.modules())
    assert not model.get_submodule(QUERY)._forward_pre_hooks
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    adapters = loralab.attach(model, "lora", name="other", rank=3, alpha=5)
    shake(adapters, "other")
    adapters.add("b", "eva", rank=4, batches=batches)  # the other adapter is live, yet it is the base that is seen
    assert torch.equal(adapters.layers[QUERY].roles("b")["A"], first.directions)
    assert adapters.active.names == ("other",)


def test_a_pooler_and_a_decoder_are_seen_too():
    seen = observe(build("bert"), [rows()], {"bert.pooler.dense": 2, QUERY: 4})
    assert {path: tuple(s.directions.shape) for path, s in seen.items()} == {
        "bert.pooler.dense": (2, 24),
        QUERY: (4, 24),
    }
    _, adapters = attached("eva", "gpt2", targets="all-linear")
    assert all(layer.roles("a")["A"].norm(dim=1).allclose(torch.ones(4)) for layer in adapters.layers.values())


def seen_tokens(model, batch, path):
    """Which tokens of a layer's input count as real, as the layer gets them: True or False for each vector."""
    seen, inputs, layer = [], [], model.get_submodule(path)
    with torch.no_grad():
        each_input(model, [batch], {path: layer}, lambda _, x: seen.append(x))
        handle = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        model(**batch)
        handle.remove()
    vectors = torch.cat(seen)
    return [(x.unsqueeze(-2) == vectors).all(-1).any(-1) for x in inputs]


def masked(count, tokens, real):
    """Random ids and a mask (count, tokens) with so many real tokens in each row."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.stack([torch.arange(tokens) < n for n in real])
    return torch.randint(3, 90, (count, tokens), generator=generator), mask


def test_an_encoder_and_a_decoder_have_a_mask_each():
    """The sizes are equal, so that no shape tells the two masks apart; keys and values of the encoder have its mask."""
    model = zoo.build("t5").eval()
    (ids, source), (labels, target) = masked(3, 6, (2, 6, 4)), masked(3, 6, (6, 3, 1))
    batch = {"input_ids": ids, "attention_mask": source, "labels": labels.where(target, -100)}
    attention = "decoder.block.0.layer.{}.{}.{}"
    for path, mask in (
        ("encoder.block.1.layer.0.SelfAttention.q", source),
        (attention.format(0, "SelfAttention", "q"), target),
        (attention.format(1, "EncDecAttention", "q"), target),
        (attention.format(1, "EncDecAttention", "k"), source),
    ):
        assert torch.equal(seen_tokens(model, batch, path)[0], mask), path
    given = {**batch, "labels": labels, "decoder_attention_mask": target.long()}
    path = attention.format(0, "SelfAttention", "v")
    assert torch.equal(seen_tokens(model, given, path)[0], target)


@pytest.mark.parametrize("size", [5, 4])
def test_tokens_first_and_rows_first_are_told_apart(size):
    """XLNet's layers get inputs (t, rows, in), also where both sizes are equal."""
    model = zoo.build("xlnet").eval()
    ids, mask = masked(4, size, (3, 4, 1, 4))
    batch = {"input_ids": ids, "attention_mask": mask.float()}
    assert torch.equal(seen_tokens(model, batch, "transformer.layer.0.ff.layer_1")[0], mask.mT)


def test_relative_positions_are_no_tokens():
    """As many as tokens in all: shared projections of DeBERTa get 16 of them."""
    ids, mask = masked(4, 4, (3, 4, 1, 4))
    tokens, positions = seen_tokens(
        build("deberta-v2"),
        {"input_ids": ids, "attention_mask": mask},
        "deberta.encoder.layer.0.attention.self.query_proj",
    )
    assert torch.equal(tokens, mask)
    assert positions.numel() == mask.numel()
    assert not positions.any()


def test_eva_needs_data_and_enough_of_it():
    model = build("bert")
    with pytest.raises(UserError, match="pass batches"):
        loralab.attach(model, "eva")
    with pytest.raises(UserError, match="pooler.dense needs as many tokens to look at, it saw 5"):
        loralab.attach(model, "eva", rank=8, batches=[rows(5)])
    assert not any(type(m).__name__ == "Adapted" for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# ---- lora-ga: what the loss wants of the weight ----------------------------------------------------------------------

BATCHES = [labelled(3), {**rows(4, 5, seed=4), "labels": torch.tensor([2, 0, 0, 1])}]


def gradient_of(model, path, batches):
    """The gradient of the summed losses by the weight (out, in) of a layer, by autograd."""
    W = model.get_submodule(path).weight.requires_grad_()
    return sum(torch.autograd.grad(model(**batch).loss, W)[0] for batch in batches)


@pytest.mark.parametrize("path", [QUERY, DENSE])
@pytest.mark.parametrize("store", [None, "int8"])
def test_lora_ga_begins_with_singular_vectors_of_the_gradient(path, store):
    model, adapters = attached("lora-ga", batches=BATCHES, store=store)
    p, layer = adapters.layers[path].roles("a"), adapters.layers[path]
    plain = build("bert")
    if store is not None:  # the gradient is that of the first adapter's model, whose weights are whole
        assert not torch.equal(layer.base.dense(), plain.get_submodule(path).weight)
    G = gradient_of(plain, path, BATCHES).double()
    size = (len(G) ** 0.5 / 16) ** 0.5
    right, left = (torch.linalg.eigh(M).eigenvectors.flip(1) for M in (G.T @ G, G @ G.T))
    for found, expected in ((p["A"].double(), right[:, :4].T), (p["B"].double().T, left[:, 4:8].T)):
        torch.testing.assert_close(found @ found.T, size**2 * torch.eye(4).double(), rtol=0, atol=1e-5)
        cosines = (found * expected).sum(1).abs() / size
        torch.testing.assert_close(cosines, torch.ones(4).double(), rtol=0, atol=1e-4)
    assert torch.equal(p["A0"], p["A"])
    assert torch.equal(p["B0"], 2.5 * p["B"])
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_gradient_is_that_of_autograd_and_looking_changes_nothing(kind):
    model = build(kind).train()
    paths = [
        path for path, m in model.named_modules() if keep_able(m) and "classifier" not in path and "score" not in path
    ]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    learned = {key: p.requires_grad for key, p in model.named_parameters()}
    found = weight_gradients(model, BATCHES, paths)
    assert model.training
    assert {key: p.requires_grad for key, p in model.named_parameters()} == learned
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    for path in paths:
        G = gradient_of(build(kind), path, BATCHES)
        torch.testing.assert_close(found[path], G.T if kind == "gpt2" else G, rtol=1e-4, atol=1e-6)


def keep_able(module):
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def test_lora_ga_sees_the_base_beside_another_adapter():
    _, first = attached("lora-ga", batches=BATCHES)
    expected = {key: t.clone() for key, t in first.state("a").items()}
    other = build("bert")
    adapters = loralab.attach(other, "lora", name="other", rank=3, alpha=5)
    shake(adapters, "other")
    before = {key: t.clone() for key, t in adapters.state("other").items()}
    adapters.add("a", "lora-ga", rank=4, alpha=10.0, batches=BATCHES)
    assert all(torch.equal(adapters.state("a")[f"{QUERY}.{role}"], expected[f"{QUERY}.{role}"]) for role in "AB")
    assert all(torch.equal(t, before[key]) and t.grad is None for key, t in adapters.state("other").items())


def test_lora_ga_says_what_it_needs():
    for given, told in (
        ({}, "pass batches"),
        ({"batches": [rows()]}, "put labels into them, or pass loss="),
        ({"batches": [labelled()], "rank": 13}, "rank 13 for .*: the start takes 26 directions of its gradient"),
        (
            {"batches": [labelled()], "loss": lambda m, b: m.bert(b["input_ids"])[0].sum()},
            "pooler.dense has no gradient",
        ),
    ):
        model = build("bert")
        with pytest.raises(UserError, match=told):
            loralab.attach(model, "lora-ga", **{"rank": 4} | given)
        assert not any(type(m).__name__ == "Adapted" for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())


def test_the_first_step_of_lora_ga_goes_where_full_fine_tuning_goes():
    """The aim of the paper: the change of s B A is along the gradient, far more than with LoRA."""
    cosines = {}
    for start in ("kaiming", "lora-ga"):
        model, adapters = attached(start, batches=BATCHES)
        G = gradient_of(build("bert"), DENSE, BATCHES)
        layer = adapters.layers[DENSE]
        sum(model(**batch).loss for batch in BATCHES).backward()
        before = layer.lower("a").matrix().detach()
        p = layer.roles("a")
        with torch.no_grad():
            for role in "AB":
                p[role] -= 1e-2 * p[role].grad
        change = (layer.lower("a").matrix() - before).detach()
        cosines[start] = float(-(change * G).sum() / change.norm() / G.norm())
    assert cosines["lora-ga"] > 0.95
    assert cosines["lora-ga"] > cosines["kaiming"] + 0.1


# ---- what must hold around a start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [name for name in STARTS if name != "loftq"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_start_changes_nothing_and_leaves_the_base_alone(start, kind):
    model, adapters = attached(start, kind)
    plain = build(kind)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    if STARTS[start].zero:
        assert torch.equal(logits(model), logits(plain))
    before = dict(plain.named_parameters())
    for path, layer in adapters.layers.items():
        W = before[f"{path}.weight"]
        assert torch.equal(layer.weight, W.T if kind == "gpt2" else W)


def test_loftq_is_nearer_to_the_weights_than_its_store():
    expected = logits(build("bert"))
    off = {}
    for start in ("kaiming", "loftq"):
        model, adapters = attached(start, store="nf4", rank=8)
        off[start] = (logits(model) - expected).norm().item()
        layer = adapters.layers[QUERY]
        off[f"{start} W"] = (build("bert").get_submodule(QUERY).weight - layer.plain("a").weight).norm().item()
    assert off["loftq"] < 0.8 * off["kaiming"]
    assert off["loftq W"] < 0.8 * off["kaiming W"]


def test_loftq_comes_first_on_a_base():
    model, adapters = attached("loftq")
    before = logits(model)
    with pytest.raises(UserError, match="its own weight is gone; attach loftq before the others"):
        adapters.add("b", "loftq", rank=2)
    adapters.add("b", "pissa", rank=2, store="nf4")  # made from what the store keeps
    assert torch.equal(logits(model), before)
    with adapters.use("b"):
        fresh = logits(model)
    with adapters.use(None):
        torch.testing.assert_close(fresh, logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_save_load_merge_and_export(start, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model, adapters = attached(start)
    roles = {role for role, _ in adapters.tensors("a").values()} - {"head"}
    assert roles == set(adapters.spec("a").recipe.roles) == {"A", "B", *starts.added(start)}
    learned = {role for role, t in adapters.tensors("a").values() if t.requires_grad}
    assert learned == {"A", "B", "head"}
    assert adapters.counts("a")["adapter"] == sum(
        4 * (layer.in_features + layer.out_features) for layer in adapters.layers.values()
    )
    shake(adapters, "a")
    expected = logits(model)
    torch.testing.assert_close(logits(adapters.merge("a")), expected, rtol=0, atol=2e-5)

    adapters.save(tmp_path / "own")
    assert read(tmp_path / "own").recipe.start == start
    adapters.export(tmp_path / "peft")
    adapters.detach()  # the base as it was, or as the store rounded it

    def refuse(*_, **__):
        raise AssertionError("a file gives the tensors: nothing is computed")

    monkeypatch.setattr(starts, "begin", refuse)  # and eva gets no batches here
    fresh = build("bert")
    loaded = loralab.load(fresh, tmp_path / "own")
    assert torch.equal(logits(fresh), expected)
    assert loaded.spec("a").recipe.start == start
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("start", [name for name in STARTS if name not in ("kaiming", "loftq")])
def test_with_a_gain_it_begins_at_one(start):
    model, adapters = attached(start, gain=True)
    for path in adapters.layers:
        u = adapters.layers[path].lower("a")
        assert torch.equal(u.gain, torch.ones_like(u.gain))
        torch.testing.assert_close(adapters.layers[path].roles("a")["m"], adapters.layers[path].weight.norm(dim=1))
    torch.testing.assert_close(logits(model), logits(build("bert")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["gaussian", "eva"])
@pytest.mark.parametrize("method", ["dylora", "delta-lora", "lora-fa", "lora-fa-precond"])
def test_a_start_with_B_zero_goes_with_every_A_and_B(start, method):
    model = build("bert")
    adapters = loralab.attach(model, method, rank=4, start=start, head=True, **needed(start))
    assert torch.equal(logits(model), logits(build("bert")))
    expected = begun("gaussian", nn.Linear(24, 24))["A"].std().item()
    if start == "gaussian":
        assert adapters.layers[QUERY].roles("default")["A"].std().item() == pytest.approx(expected, rel=0.5)
    before = adapters.state()[f"{QUERY}.B"].clone()
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-2))
    model.train()(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
    optimizer.step()
    assert not torch.equal(before, adapters.state()[f"{QUERY}.B"])


@pytest.mark.parametrize("start", [name for name, start in STARTS.items() if not start.zero])
@pytest.mark.parametrize("method", ["dylora", "delta-lora"])
def test_a_start_with_B_off_zero_is_refused_where_the_update_is_not_all_of_B_A(start, method):
    """A truncated B A does not cancel what was taken away, so DyLoRA would begin with another function."""
    with pytest.raises(UserError, match=f"start='{start}' with {method}: a B that is not zero"):
        recipe(method, rank=4, start=start, **({"store": "nf4"} if start == "loftq" else {}))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"method": "lora", "start": "pisa"}, "start='pisa': choose one of kaiming"),
        ({"method": "vera", "start": "gaussian"}, "start='gaussian' with vera: it has no A and B of its own"),
        (
            {"method": "adalora", "start": "gaussian", "total_steps": 9},
            "start='gaussian' with adalora: its own B is not zero at the start",
        ),
        ({"method": "bitfit", "start": "gaussian"}, "start='gaussian' with factors=None"),
        ({"method": "lora", "start": "orthogonal", "rank": 3}, "start='orthogonal' with rank=3: expected an even"),
        ({"method": "lora", "start": "loftq"}, "start='loftq' with store=None"),
        ({"method": "loftq", "store": "float32"}, "start='loftq' with store='float32'"),
        ({"method": "pissa", "train": ("A", "A0")}, "its roles are A, B, not A0"),
        ({"method": "lora-drop", "start": "pissa"}, "start='pissa' with layers that share A and B"),
    ],
)
def test_nonsense_is_refused_with_both_fields(given, problem):
    given = dict(given)
    with pytest.raises(UserError) as caught:
        recipe(given.pop("method"), **given)
    assert problem in str(caught.value)


def test_a_pair_beside_A_and_B_never_learns_and_stays_as_it_was():
    model, adapters = attached("pissa", train=("B",))
    before = {key: t.clone() for key, t in adapters.state("a").items()}
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-2, weight_decay=0.1))
    for _ in range(2):
        model.train()(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        optimizer.step()
    for key, (role, t) in adapters.tensors("a").items():
        assert torch.equal(t, before[key]) == (role in ("A", "A0", "B0")), key


# ---- PEFT changes the base, we do not: the same function, and the same after steps -----------------------------------


@pytest.mark.parametrize(("start", "kind"), [("pissa", "bert"), ("pissa", "gpt2"), ("olora", "bert")])
def test_five_steps_give_the_losses_of_peft(start, kind):
    """PEFT's olora takes a Conv1D's (in, out) weight for (out, in), so gpt2 is compared for pissa alone."""
    peft = pytest.importorskip("peft")
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"]}[kind]
    plain = build(kind)
    ours, adapters = attached(start, kind, targets="attention-qv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=4, lora_alpha=10, target_modules=targets, modules_to_save=list(adapters.heads), init_lora_weights=start
        )
        theirs = peft.get_peft_model(plain, config)
    modules = dict(theirs.base_model.model.named_modules())
    for path, layer in adapters.layers.items():
        module, p = modules[path], layer.roles("a")
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        torch.testing.assert_close(p["B"] @ p["A"], B @ A, rtol=0, atol=1e-5)  # each by its own code
        assert not torch.equal(module.base_layer.weight, build(kind).get_submodule(path).weight)  # theirs moved
        with torch.no_grad():  # a sign is free in both: take ours, so that roundings are alike
            A.copy_(p["A"]), B.copy_(p["B"])
    torch.testing.assert_close(logits(theirs.eval()), logits(ours), rtol=0, atol=1e-5)
    losses = [[], []]
    for model, seen in zip((ours, theirs), losses, strict=True):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(5):
            labels = torch.randint(0, 3, (5,), generator=Generator().manual_seed(step))
            loss = model.train()(**rows(seed=step), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(set(losses[0])) == 5


def test_a_setting_has_one_home():
    """Delta-LoRA once had a `start` of its own, and `recipe("delta-lora", start=7)` set both."""
    own = {f.name for f in dataclasses.fields(Recipe)}
    for kind in FACTORS.values():
        assert not own & {f.name for f in dataclasses.fields(kind)}, kind


def test_an_old_file_without_a_start_is_kaiming():
    from loralab.recipe import from_json, to_json

    data = to_json(Recipe())
    del data["start"]
    assert from_json(data).start == "kaiming"
