"""Each literal algorithm of a paper, written slowly, agrees with its lowering, gradients and steps included."""

import json
from dataclasses import replace

import measure
import pytest
import torch
from archs import build, check_mixed, losses_by_heart, rows, shake
from literal import UPDATES, tensor
from shapes import made
from torch import nn

import loralab
from loralab.methods.dylora import DyLoRA
from loralab.methods.starts import looks_at
from loralab.methods.vera import VeRA
from loralab.rankmap import RankMap
from loralab.recipe import NAMED, Recipe, recipe
from loralab.stores.float import Float
from loralab.update import apply

N_OUT, N_IN, RANK, ROWS, TOKENS = 13, 11, 3, 5, 7
TOLERANCE = {"qdora": 1e-5}  # the lengths of rows kept in few bits are float32


@pytest.fixture
def base():
    return Float(nn.Parameter(tensor(N_OUT, N_IN, seed=0), requires_grad=False), tensor(N_OUT, seed=1))


@pytest.mark.parametrize("name", measure.EQUATIONS)
def test_the_lowering_is_the_literal_equation(name):
    """Output and gradients, with dropout; every named method whose layers are adapted is in the table."""
    assert measure.EQUATIONS[name]() < TOLERANCE.get(name, 1e-11)


def test_every_named_method_is_measured():
    assert {*measure.EQUATIONS, *measure.WITHOUT} == set(NAMED)


@pytest.mark.parametrize("name", ["dora", "qdora"])
def test_the_norm_of_a_gain_can_learn_too(name):
    assert measure.equation(name, exact=True) < TOLERANCE.get(name, 1e-11)


@pytest.mark.parametrize("name", [name for name in UPDATES if hasattr(recipe(name).factors, "stabilized")])
def test_every_method_with_alpha_takes_rsloras_scale(name):
    """DyLoRA ignored `stabilized`."""
    given, size = measure.named(name)
    r = recipe(given, stabilized=True)
    p, constants = measure.parameters(name, r, size)
    for drawn in (2, None) if isinstance(r.factors, DyLoRA) else (None,):
        base = Float(tensor(*size, seed=0), None)
        update = replace(r, gain=False).lower(p | constants, base, drawn).matrix()
        torch.testing.assert_close(update, UPDATES[name](p | constants, r.factors, drawn), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", measure.STEPS)
def test_steps_are_those_of_the_literal_algorithm(name):
    assert measure.STEPS[name]() < 1e-10


@pytest.mark.parametrize("name", measure.STARTS)
def test_starts_are_those_of_the_literal_rule(name):
    assert measure.STARTS[name]() < 1e-5


def test_doras_fresh_magnitude_is_the_norm_of_the_weight():
    adapters = loralab.attach(build("bert"), "dora", rank=2)
    for layer in adapters.layers.values():
        torch.testing.assert_close(layer.roles("default")["m"], layer.weight.norm(dim=1))
        assert torch.equal(layer.lower("default").gain, torch.ones(layer.out_features))


@pytest.mark.parametrize("source", ["philox-1", "peft"])
def test_veras_projection_is_uniform_and_sized_for_the_largest_layer(source):
    factors = VeRA(rank=17, projection_seed=4, source=source)
    constants = factors.constants([(N_OUT, 29), (31, N_IN)])
    assert (constants["A"].shape, constants["B"].shape) == ((17, 29), (31, 17))
    bound_a, bound_b = (6 / 29) ** 0.5, (6 / 17) ** 0.5
    assert bound_a * 0.95 < constants["A"].abs().max() <= bound_a
    assert bound_b * 0.95 < constants["B"].abs().max() <= bound_b
    assert abs(constants["A"].mean()) < 0.1 * bound_a
    assert not torch.equal(factors.constants([(31, 29)])["A"], VeRA(17, projection_seed=5).constants([(31, 29)])["A"])


def test_veras_generator_is_defined_by_numbers_not_by_a_library_version():
    """The first values of Philox with key 0, worked out from its raw 64-bit words; they must never change."""
    import numpy as np

    words = np.random.Philox(key=0).random_raw(3)
    expected = [((int(word) >> 40) / 2**23 - 1) * (6 / 5) ** 0.5 for word in words]
    got = VeRA(rank=2).constants([(4, 5)])["A"][0, :3].tolist()
    assert got == pytest.approx(expected, abs=1e-6)


def test_two_adapters_with_different_vera_seeds_share_a_model():
    model = build("bert")
    adapters = loralab.attach(model, "vera", name="a", rank=5, head=True)
    adapters.add("b", "vera", rank=7, projection_seed=3, head=True)
    shake(adapters, "a"), shake(adapters, "b", seed=6)
    check_mixed(model, adapters, "ab", [0, 1, 1, 0, 1])


@pytest.mark.parametrize("method", ["vera", "superlora"])
def test_a_file_holds_the_hash_of_what_its_seed_draws(tmp_path, method, monkeypatch):
    """A generator that drew something else would make the same vectors another function."""
    loralab.attach(build("bert"), method, rank=2).save(tmp_path)
    assert len(json.loads((tmp_path / "adapter.json").read_text())["constants"]) == 64
    loralab.load(build("bert"), tmp_path)
    factors = type(recipe(method).factors)
    draw = factors.constants
    monkeypatch.setattr(factors, "constants", lambda self, shapes: draw(replace(self, projection_seed=1), shapes))
    model = build("bert")
    with pytest.raises(loralab.UserError, match="what its seed draws here is not what it was trained with"):
        loralab.load(model, tmp_path)
    assert not hasattr(model, "_loralab")


def test_vera_keeps_its_projection_out_of_the_file():
    adapters = loralab.attach(build("bert"), "vera", rank=5)
    assert {role for role, _ in adapters.tensors().values()} == {"d", "b"}
    layers = list(adapters.layers.values())
    assert len({layer.constants["default"]["A"].untyped_storage().data_ptr() for layer in layers}) == 1


def test_lora_fa_keeps_no_x(base):
    """Only A x (rows, rank) is kept for the backward pass; plain LoRA keeps x (rows, in)."""
    for name, kept_x in (("lora-fa", False), ("lora", True)):
        model = nn.Sequential(nn.Linear(N_IN, N_OUT))
        loralab.attach(model, name, rank=RANK, targets=["0"])
        x, shapes = torch.randn(ROWS * TOKENS, N_IN), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=shapes: seen.append(t.shape) or t, lambda t: t):
            model(x).sum().backward()
        assert (x.shape in shapes) == kept_x
        assert torch.Size([ROWS * TOKENS, RANK]) in shapes


NOT_STORED = [name for name in measure.EQUATIONS if NAMED[name][0].low_rank and not NAMED[name][0].store]
STARTS_STORED = ["loftq"]  # the one whose store may be another


@pytest.mark.parametrize("name", NOT_STORED + STARTS_STORED)  # few bits become dense
@pytest.mark.parametrize("given", [{}, {"gain": True}, {"gain": True, "exact_gain": True}])
def test_nothing_of_the_size_of_the_weight_is_made(name, given):
    """Neither B A, nor an identity to make it with, nor the weight's own gradient, in forward and backward."""
    model = nn.Sequential(nn.Linear(N_IN, N_OUT)).train()
    more = {"ranks": RankMap({"0": RANK}), "policy": None} if NAMED[name][0].policy else {}
    more |= {"total_steps": 9} if name == "adalora" else {}
    looked = {"batches": [{"input": torch.randn(9, N_IN)}], "loss": lambda model, batch: model(**batch).square().sum()}
    more |= looked if looks_at(NAMED[name][0].start) else {}
    more |= {"store": "float32", "start": "kaiming"} if name in STARTS_STORED else {}
    adapters = loralab.attach(model, name, rank=RANK, targets=["0"], **more, **given)
    shake(adapters, "default")
    shapes = made(model, torch.randn(ROWS, N_IN))
    assert (ROWS, N_OUT) in shapes
    assert shapes.isdisjoint({(N_OUT, N_IN), (N_IN, N_OUT), (N_IN, N_IN), (N_OUT, N_OUT)})


def test_lora_plus_steps_b_faster_by_the_ratio():
    adapters = loralab.attach(build("bert"), "lora+", rank=2, head=True)
    shake(adapters, "default")
    before = {key: t.detach().clone() for key, t in adapters.state().items()}
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=0.01, head_lr=0.03))
    for _, t in adapters.tensors().values():
        t.grad = torch.ones_like(t)
    optimizer.step()
    for key, (role, t) in adapters.tensors().items():
        moved = {"A": 0.01, "B": 0.16, "head": 0.03}[role]
        torch.testing.assert_close(before[key] - t.detach(), torch.full_like(t, moved))


def test_frozen_dylora_has_the_same_forward_and_gradient_in_one_row_alone(base):
    x, A, B = (
        tensor(*shape, seed=i).requires_grad_(i > 0)
        for i, shape in enumerate(((ROWS, TOKENS, N_IN), (4, N_IN), (N_OUT, 4)))
    )
    p = {"A": A, "B": B}
    y = [apply(x, base, Recipe(factors=DyLoRA(4, 5.0, frozen=f)).lower(p, base, drawn=3)) for f in (True, False)]
    assert torch.equal(*y)
    gA, gB = measure.weighted(y[0], [A, B])
    fA, fB = measure.weighted(y[1], [A, B])
    torch.testing.assert_close(gA[2], fA[2])
    torch.testing.assert_close(gB[:, 2], fB[:, 2])
    assert gA[[0, 1, 3]].abs().max() == 0
    assert gB[:, [0, 1, 3]].abs().max() == 0


def test_frozen_dylora_leaves_other_rows_their_bits_under_adamw():
    model, batch = build("bert").train(), rows()
    adapters = loralab.attach(model, "frozen-dylora", rank=4, head=True)
    shake(adapters, "default")
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=0.1, weight_decay=0.1))
    for _ in range(6):
        before = {key: t.detach().clone() for key, t in adapters.state().items()}
        model(**batch, labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        drawn = adapters.active.drawn["default"]
        optimizer.step()
        optimizer.zero_grad()
        for key, (role, t) in adapters.tensors().items():
            if role in "AB":
                changed = (t != before[key]).any(1 if role == "A" else 0)
                assert changed.nonzero().flatten().tolist() == [drawn - 1]


def test_grouping_is_by_role_or_pefts():
    """The other side, PEFT's groups, is in test_peft.py."""
    adapters = loralab.attach(build("bert"), "lora+", rank=2, head=True)
    for given, problem in (
        ({"grouping": "role"}, "grouping='role': choose one of roles, peft"),
        ({"grouping": "peft", "head_lr": 1.0}, "head_lr=1.0 with grouping='peft'"),
    ):
        with pytest.raises(loralab.UserError, match=problem):
            adapters.parameter_groups(**given)
    groups = {(g["role"], g["lr"], g["weight_decay"]) for g in adapters.parameter_groups(1.0, 0.1, head_lr=2.0)}
    assert groups == {("A", 1.0, 0.1), ("B", 16.0, 0.1), ("head", 2.0, 0.1), ("head", 2.0, 0.0)}
    groups = {(g["role"], g["lr"], g["weight_decay"]) for g in adapters.parameter_groups(1.0, 0.1, grouping="peft")}
    assert groups == {("A", 1.0, 0.1), ("B", 16.0, 0.1), ("head", 1.0, 0.1), ("head", 16.0, 0.0)}


def test_one_dylora_is_evaluated_and_exported_at_every_rank(tmp_path):
    model, batch = build("bert"), rows()
    adapters = loralab.attach(model, "dylora", rank=4, alpha=5.0, minimum=2)
    shake(adapters, "default")
    outputs = []
    for rank in (2, 3, 4):
        with adapters.use("default", rank=rank):
            outputs.append(model(**batch).logits)
            adapters.export(tmp_path / str(rank))
        plain = build("bert")
        assert loralab.load(plain, tmp_path / str(rank)).spec(None).recipe.factors.rank == rank
        torch.testing.assert_close(plain(**batch).logits, outputs[-1], rtol=0, atol=1e-5)
    assert torch.equal(outputs[-1], model(**batch).logits)  # the full rank is what evaluation uses
    for rank in (1, 5):
        problem = f"rank={rank}: this adapter was trained for ranks 2 to 4, choose one of them"
        with pytest.raises(loralab.UserError, match=problem), adapters.use("default", rank=rank):
            pass


def test_bitfit_trains_every_bias_and_gives_them_back():
    model, batch = build("bert"), rows()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    adapters = loralab.attach(model, "bitfit", head=True)
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=0.1))
    model(**batch, labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
    optimizer.step()
    moved = {key for key in adapters.state() if not torch.equal(adapters.state()[key], before[key])}
    assert moved >= {key for key in before if key.endswith("bias") and "key" not in key}  # a key's bias has no gradient
    assert all(key.endswith("bias") or key.startswith("classifier") for key in moved)
    adapters.detach()
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_bitfit_of_a_model_without_biases_says_what_it_looked_for():
    """It trained the head alone, or nothing, and called that bitfit."""
    for head in (True, False):
        model = build("llama")
        with pytest.raises(loralab.UserError, match="LlamaForSequenceClassification has no parameter called bias"):
            loralab.attach(model, "bitfit", head=head)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "given", "lr"),
    [
        ("ia3", {"inputs": ["output.dense"]}, 0.1),
        ("oft", {"block": 6}, 3e-2),
        ("oft", {"block": 6, "terms": 5}, 3e-2),
        ("lora-xs", {"rank": 8}, 1e-2),
        ("lora-ga", {"rank": 4}, 3e-3),
    ],
)
def test_a_method_that_sees_w_learns_five_rows_by_heart_and_the_base_stays(method, given, lr):
    """The head stays random and frozen, so what falls is due to the adapter."""
    model, batch, labels = build("bert").train(), rows(), torch.tensor([0, 1, 2, 1, 0])
    for key, p in model.named_parameters():  # a rotation keeps lengths, so weights must be large to begin with
        if p.ndim == 2 and "embeddings" not in key:
            p.data.mul_(20 if "classifier" in key else 10)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    adapters = loralab.attach(model, method, batches=[{**batch, "labels": labels}], **given)
    start = {key: t.detach().clone() for key, t in adapters.state().items()}
    losses = losses_by_heart(model, adapters, lr, steps=100)
    assert losses[0] > 1
    assert losses[-1] < 0.1
    assert all(torch.equal(t, start[key]) != t.requires_grad for key, t in adapters.state().items())
    adapters.detach()
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
