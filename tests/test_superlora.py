"""SuperLoRA's special cases against slow loops and PEFT, and the dense sibling of the triple."""

import itertools
import math

import pytest
import torch
from archs import build, check_mixed, losses_by_heart, rows, shake
from literal import fastfood as literal_fastfood
from literal import projection, superlora
from torch import nn
from torch.nn import functional as F

import loralab
from loralab.methods.lora import LoRA
from loralab.methods.spread import fastfood, fastfood_constants, project, shuffle
from loralab.methods.superlora import SuperLoRA, balanced, kronecker_factors
from loralab.ranks.groups import groups
from loralab.recipe import NAMED, Recipe, recipe
from loralab.stores.float import Float
from loralab.update import Dense, Update, apply, merged, stack, take

N_OUT, N_IN, ROWS, TOKENS = 12, 10, 5, 7
ALPHA = 5.0
OWN = [name for name, (row, _) in NAMED.items() if isinstance(row.factors, SuperLoRA)]
# settings -> the matrices (o_k, i_k) of a 12 x 10 layer, and what each is folded to; written out by hand
CASES = [
    ({"split": 2, "rank": 1}, [(3, 2), (4, 5)], [(3, 2), (4, 5)]),
    ({"split": 2, "rank": 3}, [(3, 2), (4, 5)], [None, None]),
    ({"split": 2, "rank": 1, "core": True}, [(3, 2), (4, 5)], [None, (4, 5)]),
    ({"split": 3, "rank": 1}, [(2, 1), (2, 2), (3, 5)], [None, None, (3, 5)]),
    ({"fold": True, "rank": 3}, [(12, 10)], [(10, 12)]),
    ({"order": 3, "rank": 3}, [(12, 10)], [(4, 5, 6)]),
    ({"order": 3, "rank": 3, "core": True}, [(12, 10)], [(4, 5, 6)]),
    ({"order": 4, "rank": 3, "core": True}, [(12, 10)], [(3, 2, 4, 5)]),
    ({"order": 3, "split": 2, "rank": 1, "core": True}, [(3, 2), (4, 5)], [None, (2, 2, 5)]),
    ({"ratio": 0.25, "rank": 2}, [(6, 5)], [(6, 5)]),
    ({"ratio": 0.6, "rank": 2, "order": 3}, [(10, 8)], [(4, 4, 5)]),
    ({"ratio": 0.01, "rank": 2}, [(2, 1)], [None]),
]
# settings with several groups in the layer, the matrices of one group, and how many groups there are
GROUPED = [
    ({"split": 2, "rank": 1, "groups": 3}, [(2, 2), (2, 5)], 3),
    ({"rank": 2, "groups": 2}, [(6, 10)], 2),
    ({"rank": 2, "groups": 5}, [(3, 10)], 4),  # 5 does not divide the 12 rows; 4 is as near as 6
    ({"order": 3, "core": True, "rank": 2, "groups": 2}, [(6, 10)], 2),
    ({"ratio": 0.3, "rank": 1, "groups": 3}, [(3, 6)], 3),
    ({"ratio": 0.3, "rank": 1, "groups": 3, "projection": "fastfood"}, [(3, 6)], 3),
]
SPREAD = [
    ({"ratio": 0.25, "rank": 2, "projection": "fastfood"}, [(6, 5)], [(6, 5)]),
    ({"ratio": 0.6, "rank": 2, "order": 3, "projection": "fastfood"}, [(10, 8)], [(4, 4, 5)]),
    ({"ratio": 0.01, "rank": 2, "projection": "fastfood"}, [(2, 1)], [None]),
]
CASES = [*CASES[:-1], *SPREAD, CASES[-1]]
IDS = [" ".join(f"{key}={value}" for key, value in given.items()) for given, _, _ in CASES]


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def base():
    return Float(nn.Parameter(tensor(N_OUT, N_IN, seed=1), requires_grad=False), tensor(N_OUT, seed=2))


def shaken(factors, out=N_OUT, into=N_IN):
    """The roles of one layer off their start, and its constants."""
    p = factors.init(out, into, torch.Generator().manual_seed(3))
    p = {role: t.double() + 0.5 * tensor(*t.shape, seed=i) for i, (role, t) in enumerate(p.items())}
    return p, factors.local(factors.constants([factors.shape(out, into), (17, 3)]), out, into)


@pytest.mark.parametrize(("given", "matrices", "modes"), CASES, ids=IDS)
def test_the_update_is_the_formula_in_loops(base, given, matrices, modes):
    factors = SuperLoRA(alpha=ALPHA, projection_seed=6, **given)
    p, constants = shaken(factors)
    for k, (matrix, folded) in enumerate(zip(matrices, modes, strict=True), 1):
        if folded is None:
            assert p[f"C{k}"].shape == matrix
        else:
            assert sorted(folded) == sorted(len(p[f"A{k}{m}"]) for m in range(1, factors.order + 1))
    u = Recipe(factors=factors).lower(p | constants, base)
    assert isinstance(u, Dense)
    torch.testing.assert_close(u.D, superlora(p, factors, matrices, (N_OUT, N_IN)))
    x = tensor(ROWS, TOKENS, N_IN, seed=4)
    expected = F.linear(x, base.weight + u.D, base.bias)
    torch.testing.assert_close(apply(x, base, u), expected)
    torch.testing.assert_close(F.linear(x, merged(base.weight, u), base.bias), expected)


@pytest.mark.parametrize(("given", "matrices", "modes"), CASES, ids=IDS)
@pytest.mark.parametrize("gain", [False, True])
def test_gradients_through_the_lowering_are_finite_differences(base, given, matrices, modes, gain):
    factors = SuperLoRA(alpha=ALPHA, **given)
    p, constants = shaken(factors)
    p |= {"m": tensor(N_OUT, seed=8).abs() + 0.5} if gain else {}
    learned = [t.requires_grad_(True) for t in p.values()]
    x, r = tensor(2, 3, N_IN, seed=4), Recipe(factors=factors, gain=gain, exact_gain=gain)
    assert torch.autograd.gradcheck(
        lambda *ts: apply(x, base, r.lower(dict(zip(p, ts, strict=True)) | constants, base)), learned
    )


@pytest.mark.parametrize(("given", "matrices", "count"), GROUPED)
@pytest.mark.parametrize("gain", [False, True])
def test_groups_of_a_layer_are_the_formula_on_each_part_of_its_rows(base, given, matrices, count, gain):
    factors = SuperLoRA(alpha=ALPHA, projection_seed=6, **given)
    assert not factors.low_rank
    p, constants = shaken(factors)
    assert {len(t) for t in p.values()} == {count}
    assert {role: t.numel() for role, t in p.items()} == {
        role: size for role, size in factors.sizes(N_OUT, N_IN).items() if size
    }
    u = Recipe(factors=factors).lower(p | constants, base)
    torch.testing.assert_close(u.D, superlora(p, factors, matrices, (N_OUT, N_IN)))
    p |= {"m": tensor(N_OUT, seed=8).abs() + 0.5} if gain else {}
    learned = [t.requires_grad_(True) for t in p.values()]
    x, r = tensor(2, 3, N_IN, seed=4), Recipe(factors=factors, gain=gain, exact_gain=gain)
    assert torch.autograd.gradcheck(
        lambda *ts: apply(x, base, r.lower(dict(zip(p, ts, strict=True)) | constants, base)), learned
    )


def test_groups_of_a_layer_are_drawn_apart_and_save_and_load(tmp_path):
    model = build("bert")
    adapters = loralab.attach(model, "superlora", rank=2, groups=4, projection="fastfood", head=True)
    values = next(iter(adapters.layers.values())).roles("default")["A12"]  # (4, n, r)
    assert not torch.equal(values[0], values[1])
    assert torch.equal(model(**rows()).logits, build("bert")(**rows()).logits)
    shake(adapters, "default")
    adapters.save(tmp_path)
    again = build("bert")
    loralab.load(again, tmp_path)
    assert torch.equal(again(**rows()).logits, model(**rows()).logits)
    torch.testing.assert_close(adapters.merge()(**rows()).logits, model(**rows()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "count"), [(6, 24), (5, 30), (8, 8), (9, 7), (1, 5)])
def test_fastfood_is_its_matrix_and_keeps_the_size_of_numbers(n, count):
    made = fastfood_constants(3, n, count)
    F_ = torch.stack([fastfood(v, **{key: t.double() if key != "P" else t for key, t in made.items()})[:count]
                      for v in torch.eye(n, dtype=torch.float64)], 1)  # fmt: skip
    torch.testing.assert_close(F_, literal_fastfood(3, n, count))
    assert not torch.equal(made["S"], fastfood_constants(4, n, count)["S"]) or n == 1
    assert made["P"].sort(1).values.equal(torch.arange(made["P"].shape[1], dtype=torch.int32).expand_as(made["P"]))


def test_fastfood_makes_normal_numbers_of_the_size_of_what_it_spreads():
    v = tensor(3000, seed=1)
    made = {key: t.double() if key != "P" else t for key, t in fastfood_constants(0, 3000, 20000).items()}
    out = fastfood(v, **made)[:20000]
    assert out.std().item() == pytest.approx(v.std().item(), rel=0.03)
    assert abs(out.mean().item()) < 0.03
    assert (out.abs() > 2 * out.std()).double().mean().item() == pytest.approx(0.0455, abs=0.006)  # as a normal


def test_groups_and_shares_do_not_go_together():
    with pytest.raises(loralab.UserError, match="groups=2 in layers of a share: a group is a part of a layer"):
        loralab.attach(build("bert"), "lokr", rank=2, groups=2, ranks=groups(build("bert"), rank=2))


def test_an_adapter_per_row_lowers_at_once():
    """A leading axis on the roles is one on the update."""
    for given, _, _ in [*CASES, *GROUPED]:
        factors = SuperLoRA(alpha=ALPHA, **given)
        p, constants = shaken(factors)
        both = {role: torch.stack([t, 2 * t + 1]) for role, t in p.items()}
        for i in range(2):
            one = factors.dense({role: t[i] for role, t in both.items()} | constants, N_OUT, N_IN)
            torch.testing.assert_close(factors.dense(both | constants, N_OUT, N_IN)[i], one)


@pytest.mark.parametrize("stabilized", [False, True])
def test_one_factor_of_order_two_is_lora_bit_for_bit(base, stabilized):
    ours, theirs = (kind(rank=3, alpha=ALPHA, stabilized=stabilized) for kind in (SuperLoRA, LoRA))
    p, q = (factors.init(N_OUT, N_IN, torch.Generator().manual_seed(5)) for factors in (ours, theirs))
    assert p.keys() == q.keys()
    assert all(torch.equal(p[role], q[role]) for role in p)
    p["B"] += 1
    a, b = Recipe(factors=ours).lower(p, base), Recipe(factors=theirs).lower(p, base)
    assert isinstance(a, Update)
    assert torch.equal(a.A, b.A)
    assert torch.equal(a.B, b.B)
    assert (ours.roles, ours.learn, ours.sizes(12, 10)) == (theirs.roles, theirs.learn, theirs.sizes(12, 10))
    assert ours.misfit(12, 2) == theirs.misfit(12, 2) is not None


def test_a_core_of_order_two_stays_low_rank_and_is_exported(tmp_path):
    model, batch = build("bert"), rows()
    adapters = loralab.attach(model, "superlora", rank=3, alpha=ALPHA, ratio=1.0, core=True)
    shake(adapters, "default")
    layer = next(iter(adapters.layers.values()))
    p, u = layer.roles("default"), layer.lower("default")
    assert isinstance(u, Update)
    torch.testing.assert_close(u.matrix(), ALPHA / 3 * p["B"] @ p["C"] @ p["A"])
    adapters.export(tmp_path / "peft")
    plain = build("bert")
    loralab.load(plain, tmp_path / "peft")
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("out", "into", "rank"), [(77, 65, 2), (77, 65, 4), (48, 36, 3), (13, 36, 7), (13, 11, 2)])
def test_lokr_is_pefts(out, into, rank):
    peft = pytest.importorskip("peft")
    x = torch.randn(ROWS, into, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Sequential(nn.Linear(into, out)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    adapters = loralab.attach(ours, "lokr", rank=rank, alpha=ALPHA, targets=["0"])
    shake(adapters, "default")
    config = peft.LoKrConfig(r=rank, alpha=ALPHA, target_modules=["0"], decompose_both=True)
    theirs = peft.get_peft_model(theirs, config)
    layer, p = theirs.base_model.model[0], adapters.layers["0"].roles("default")
    with torch.no_grad():
        for k in (1, 2):
            if f"C{k}" in p:
                getattr(layer, f"lokr_w{k}")["default"].copy_(p[f"C{k}"])
            else:
                getattr(layer, f"lokr_w{k}_a")["default"].copy_(p[f"A{k}1"])
                getattr(layer, f"lokr_w{k}_b")["default"].copy_(p[f"A{k}2"].T)
    assert (ours(x) - adapters.layers["0"].base(x)).abs().max() > 0.1
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    weight = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(adapters.merge()[0].weight, weight, rtol=1e-4, atol=1e-4)


def test_pairs_are_those_of_peft_and_any_number_splits():
    lokr = pytest.importorskip("peft.tuners.lokr.layer")
    for number in [*range(1, 1200), 2304, 3072, 4096, 11008, 50257]:
        assert balanced(number, 2) == lokr.factorization(number)
        for count in (3, 4):
            made = balanced(number, count)
            assert math.prod(made) == number
            assert list(made) == sorted(made)
    assert balanced(768, 3) == (8, 8, 12)
    assert balanced(37, 3) == (1, 1, 37)


def test_a_projected_update_is_factored_at_sides_of_the_root_of_the_ratio():
    assert kronecker_factors(SuperLoRA(ratio=0.25), 768, 3072)[0].matrix == (384, 1536)
    assert kronecker_factors(SuperLoRA(ratio=0.25, split=2), 768, 3072)[1].matrix == (24, 48)
    assert kronecker_factors(SuperLoRA(ratio=1e-9), 7, 5)[0].matrix == (1, 1)


@pytest.mark.parametrize(("n", "count"), [(6, 24), (6, 30), (10, 12), (1, 7)])
def test_the_projection_gives_every_number_as_many_places_and_both_signs(n, count):
    P = shuffle(4, count)
    F_ = torch.stack([project(column, P, len(P)) for column in torch.eye(n, dtype=torch.float64)], 1)
    assert torch.equal(F_, projection(4, n, count))
    used = F_.abs().sum(0)
    assert used.max() - used.min() <= 1
    assert F_.sum(0).abs().max() <= 1
    assert not torch.equal(P, shuffle(5, count))
    v, w = tensor(n, seed=1), tensor(n, seed=2)
    torch.testing.assert_close(project(2 * v - w, P, len(P)), 2 * project(v, P, len(P)) - project(w, P, len(P)))


def test_the_projection_is_one_for_layers_of_one_size_and_not_in_the_file():
    adapters = loralab.attach(build("bert"), "superlora", rank=3)
    assert {role for role, _ in adapters.tensors().values()} == {"A11", "A12"}
    held = [(layer.weight.numel(), layer.constants["default"]["P"].data_ptr()) for layer in adapters.layers.values()]
    assert len(set(held)) == len({size for size, _ in held}) == 2


@pytest.mark.parametrize(
    "given", [*(given for given, _, _ in CASES[:-1]), {}, {"core": True}, {"split": 2, "rank": 40}, {"groups": 3}]
)
def test_one_tensor_starts_at_zero_and_its_step_is_as_large_as_that_of_loras_b(given):
    """The same step of the tensor that is zero moves the weight about as far, so learning rates carry over."""
    out, into = 48, 36

    def moved(factors):
        squares = []
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            p = factors.init(out, into, generator)
            (zero,) = [role for role, t in p.items() if not t.any()]
            constants = factors.local(factors.constants([(out, into)]), out, into)
            base = Float(nn.Parameter(torch.zeros(out, into)), None)
            assert not Recipe(factors=factors).lower(p | constants, base).matrix().any()
            terms = 1 if zero.startswith("C") else p[zero].shape[-1]  # a weight is a sum of so many
            p[zero] = torch.randn(p[zero].shape, generator=generator) / terms**0.5
            squares.append(Recipe(factors=factors).lower(p | constants, base).matrix().square().mean())
        return torch.stack(squares).mean().sqrt().item() / factors.scaling

    assert 0.5 < moved(SuperLoRA(**given)) / moved(LoRA()) < 2


def by_heart(model, adapters):
    """Trains on five rows and their labels, and asserts that they are learned."""
    losses = losses_by_heart(model, adapters, lr=1e-2, steps=60)
    assert losses[0] > 1
    assert losses[-1] < 0.05


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("more", [{}, {"gain": True}], ids=["", "gain"])
def test_the_adapter_alone_learns_five_rows_by_heart(name, more):
    """The head stays random and frozen, so what falls is due to the update."""
    model = build("bert").train()
    model.classifier.weight.data.mul_(20)  # large enough to tell the labels apart
    adapters = loralab.attach(model, name, rank=4, **more)
    by_heart(model, adapters)


def test_a_fresh_gain_over_a_dense_update_changes_no_bit_and_merges():
    for name in OWN:
        model, batch = build("bert"), rows()
        adapters = loralab.attach(model, name, rank=4, gain=True)
        assert torch.equal(model(**batch).logits, build("bert")(**batch).logits)
        shake(adapters, "default")
        for layer in adapters.layers.values():
            u, m = layer.lower("default"), layer.roles("default")["m"]
            V = layer.weight + u.matrix()
            torch.testing.assert_close(merged(layer.weight, u), m[:, None] * V / V.norm(dim=1, keepdim=True))
        torch.testing.assert_close(adapters.merge()(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


# ---- the dense sibling ---------------------------------------------------------------------------------------------


def dense(gain, seed):
    return Dense(tensor(N_OUT, N_IN, seed=seed), 1 + 0.3 * tensor(N_OUT, seed=seed + 1) if gain else None)


def low_rank(gain, seed):
    g = 1 + 0.3 * tensor(N_OUT, seed=seed + 2) if gain else None
    return Update(tensor(3, N_IN, seed=seed), tensor(N_OUT, 3, seed=seed + 1), g)


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, TOKENS), (ROWS,)])
def test_apply_and_merged_of_a_dense_update_are_the_dense_product(base, gain, shape):
    x, u = tensor(*shape, N_IN, seed=3), dense(gain, 5)
    V = base.weight + u.D
    V = V if u.gain is None else torch.diag(u.gain) @ V
    expected = torch.stack([V @ row + base.bias for row in x.reshape(-1, N_IN)]).reshape(*shape, N_OUT)
    torch.testing.assert_close(apply(x, base, u), expected)
    torch.testing.assert_close(F.linear(x, merged(base.weight, u), base.bias), expected)
    torch.testing.assert_close(apply(x, base, u, torch.zeros_like), apply(x, base, u._replace(D=0 * u.D)))


@pytest.mark.parametrize("gains", list(itertools.product([True, False], repeat=3)))
def test_a_row_of_low_rank_and_dense_updates_is_the_row_alone(base, gains):
    x, ids = tensor(ROWS, TOKENS, N_IN, seed=3), torch.tensor([2, 0, 1, 2, 2])
    updates = [make(gain, 10 * i) for i, (make, gain) in enumerate(zip((dense, low_rank, dense), gains, strict=True))]
    mixed = apply(x, base, take(stack(updates), ids))
    for row, i in enumerate(ids.tolist()):
        torch.testing.assert_close(mixed[row], apply(x[row : row + 1], base, updates[i])[0])
    assert isinstance(stack([low_rank(gains[0], 1), low_rank(gains[1], 4)]), Update)  # no dense one among them


def test_rows_of_many_methods_in_one_batch_also_where_one_has_no_part_in_a_layer():
    model = build("bert")
    adapters = loralab.attach(model, "lokr", name="a", rank=3, head=True)
    adapters.add("b", "dora", rank=2, head=True)
    adapters.add("c", "superlora", rank=2, targets="attention-v", head=True)
    for i, name in enumerate("abc"):
        shake(adapters, name, seed=i)
    check_mixed(model, adapters, "abc", [2, 0, 1, 1, 2])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"split": 0}, "split=0: expected a whole number, 1 to 9"),
        ({"split": 1.5}, "split=1.5"),
        ({"order": 1}, "order=1: expected a whole number, 2 to 9"),
        ({"ratio": 0}, "ratio=0: expected above 0, at most 1"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"source": "peft"}, "source='peft': expected 'philox-1'"),
        ({"rank": 0}, "rank=0"),
        ({"order": 3, "fold": True}, "fold=True with order=3: orders above 2 are always folded"),
        ({"ratio": 1.0, "projection_seed": 3}, "projection_seed=3 with ratio=1: there is no projection F to seed"),
        ({"train": ("A",)}, "its roles are A11, A12|its roles are C1, A11, A12"),
        ({"start": "pissa"}, "it has no A and B of its own"),
    ],
)
def test_mistakes_are_named(given, problem):
    with pytest.raises(loralab.UserError, match=problem):
        recipe("superlora", **given)
