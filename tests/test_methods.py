"""Each literal algorithm of a paper, written slowly, agrees with its lowering, gradients and steps included."""

import pytest
import torch
from archs import build, rows, shake
from torch import nn
from torch.nn import functional as F

import loralab
from loralab.bases.float import Float
from loralab.factors.delta import DeltaLoRA
from loralab.factors.dylora import DyLoRA
from loralab.factors.lora import LoRA
from loralab.factors.precond import PreconditionedLoRA
from loralab.factors.vera import VeRA
from loralab.lower import lower
from loralab.recipe import Recipe
from loralab.update import apply

N_OUT, N_IN, RANK, ROWS, TOKENS = 13, 11, 3, 5, 7


def tensor(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def base():
    return Float(nn.Parameter(tensor(N_OUT, N_IN, seed=0), requires_grad=False), tensor(N_OUT, seed=1))


@pytest.fixture
def x():
    return tensor(ROWS, TOKENS, N_IN, seed=2)


def learn(*tensors):
    return [t.clone().requires_grad_(True) for t in tensors]


def gradients(y, learned):
    weights = tensor(*y.shape, seed=9)  # a scalar in generic position
    return torch.autograd.grad((y * weights).sum(), learned)


@pytest.mark.parametrize("exact", [False, True])
def test_dora_is_the_dense_formula_with_the_norm_held_or_not(base, x, exact):
    A, B, m = tensor(RANK, N_IN, seed=3), tensor(N_OUT, RANK, seed=4), tensor(N_OUT, seed=5).abs() + 0.5
    recipe = Recipe(factors=LoRA(rank=RANK, alpha=5.0), gain=True, exact_gain=exact)
    ours = learn(A, B, m)
    y = apply(x, base, lower(recipe, dict(zip("ABm", ours, strict=True)), base))
    theirs = learn(A, B, m)
    V = base.weight + 5 / RANK * theirs[1] @ theirs[0]
    norm = V.norm(dim=1, keepdim=True)
    expected = F.linear(x, theirs[2][:, None] * V / (norm if exact else norm.detach()), base.bias)
    torch.testing.assert_close(y, expected)
    for mine, slow in zip(gradients(y, ours), gradients(expected, theirs), strict=True):
        torch.testing.assert_close(mine, slow)


def test_doras_fresh_magnitude_is_the_norm_of_the_weight():
    adapters = loralab.attach(build("bert"), "dora", rank=2)
    for layer in adapters.layers.values():
        torch.testing.assert_close(layer.roles("default")["m"], layer.weight.norm(dim=1))
        assert torch.equal(layer.lower("default").gain, torch.ones(layer.out_features))


@pytest.mark.parametrize("source", ["philox-1", "peft"])
def test_vera_is_two_vectors_around_one_projection_cut_to_the_layer(base, x, source):
    factors = VeRA(rank=17, projection_seed=4, source=source)
    constants = factors.constants([(N_OUT, 29), (31, N_IN)])
    assert (constants["A"].shape, constants["B"].shape) == ((17, 29), (31, 17))
    d, b = tensor(17, seed=3), tensor(N_OUT, seed=4)
    local = {key: t.double() for key, t in factors.local(constants, N_OUT, N_IN).items()}
    y = apply(x, base, lower(Recipe(factors=factors), {"d": d, "b": b, **local}, base))
    A, B = constants["A"].double()[:, :N_IN], constants["B"].double()[:N_OUT]
    expected = F.linear(x, base.weight, base.bias) + (((x @ A.T) * d) @ B.T) * b
    torch.testing.assert_close(y, expected)
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
    model, batch = build("bert"), rows()
    adapters = loralab.attach(model, "vera", name="a", rank=5, head=True)
    adapters.add("b", "vera", rank=7, projection_seed=3, head=True)
    shake(adapters, "a"), shake(adapters, "b", seed=6)
    with adapters.use(["a", "b"], ids=[0, 1, 1, 0, 1]):
        mixed = model(**batch).logits
    for row, name in enumerate("abbab"):
        with adapters.use(name):
            alone = model(**{key: t[row : row + 1] for key, t in batch.items()}).logits
        torch.testing.assert_close(mixed[row], alone[0], rtol=0, atol=1e-5)


def test_vera_keeps_its_projection_out_of_the_file(tmp_path):
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


def test_the_preconditioned_gradient_is_that_of_the_weight_projected():
    factors = PreconditionedLoRA(rank=RANK, alpha=5.0)
    A, B = tensor(RANK, N_IN, seed=3), nn.Parameter(tensor(N_OUT, RANK, seed=4))
    g = tensor(N_OUT, RANK, seed=5)
    B.grad = g.clone()
    factors.before_step({"layer": {"A": A, "B": B}}, None)
    s = 5 / RANK
    expected = g @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(RANK, dtype=torch.float64)) / s**2
    torch.testing.assert_close(B.grad, expected)


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


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_dylora_uses_the_first_rows_at_alpha_over_rank(base, x, rank):
    A, B = tensor(4, N_IN, seed=3), tensor(N_OUT, 4, seed=4)
    ours, theirs = learn(A, B), learn(A, B)
    recipe = Recipe(factors=DyLoRA(rank=4, alpha=5.0))
    y = apply(x, base, lower(recipe, dict(zip("AB", ours, strict=True)), base, drawn=rank))
    down = (x.reshape(-1, N_IN) @ theirs[0][:rank].T).reshape(ROWS, TOKENS, rank)
    expected = F.linear(x, base.weight, base.bias) + 5 / rank * down @ theirs[1][:, :rank].T
    torch.testing.assert_close(y, expected)
    for mine, slow in zip(gradients(y, ours), gradients(expected, theirs), strict=True):
        torch.testing.assert_close(mine, slow)


def test_frozen_dylora_has_the_same_forward_and_gradient_in_one_row_alone(base, x):
    A, B = learn(tensor(4, N_IN, seed=3), tensor(N_OUT, 4, seed=4))
    p = {"A": A, "B": B}
    y = [apply(x, base, lower(Recipe(factors=DyLoRA(4, 5.0, frozen=f)), p, base, drawn=3)) for f in (True, False)]
    assert torch.equal(*y)
    gA, gB = gradients(y[0], [A, B])
    fA, fB = gradients(y[1], [A, B])
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
        drawn = adapters.live.drawn["default"]
        optimizer.step()
        optimizer.zero_grad()
        for key, (role, t) in adapters.tensors().items():
            if role in "AB":
                changed = (t != before[key]).any(1 if role == "A" else 0)
                assert changed.nonzero().flatten().tolist() == [drawn - 1]


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
        assert loralab.load(plain, tmp_path / str(rank)).entry(None).recipe.factors.rank == rank
        torch.testing.assert_close(plain(**batch).logits, outputs[-1], rtol=0, atol=1e-5)
    assert torch.equal(outputs[-1], model(**batch).logits)  # the full rank is what evaluation uses
    for rank in (1, 5):
        with pytest.raises(loralab.UserError, match="for ranks 2 to 4"), adapters.use("default", rank=rank):
            pass


@pytest.mark.parametrize("start", [0, 7])
def test_delta_lora_is_the_algorithm_that_writes_to_w(start):
    """50 AdamW steps: the snapshot form against W <- W + follow s (B' A' - B A), to float64 rounding."""
    follow, s, target = 1.7, 5 / RANK, tensor(ROWS, N_OUT, seed=7)
    x, W, b = tensor(ROWS, N_IN, seed=2), tensor(N_OUT, N_IN, seed=0), tensor(N_OUT, seed=1)
    A, B = learn(tensor(RANK, N_IN, seed=3), torch.zeros(N_OUT, RANK, dtype=torch.float64))
    literal_W, theirs = W.clone(), learn(A.detach(), B.detach())
    factors = DeltaLoRA(rank=RANK, alpha=5.0, follow=follow, wait=start)
    p = {"A": A, "B": B, "Ak": A.detach().clone(), "Bk": B.detach().clone(), "step": torch.zeros((), dtype=torch.int64)}
    base = Float(nn.Parameter(W, requires_grad=False), b)
    ours_optimizer, their_optimizer = torch.optim.AdamW([A, B], lr=0.05), torch.optim.AdamW(theirs, lr=0.05)
    for step in range(50):
        y = apply(x, base, lower(Recipe(factors=factors), p, base))
        expected = x @ literal_W.T + s * (x @ theirs[0].T) @ theirs[1].T + b
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
        before = theirs[1].detach() @ theirs[0].detach()
        for optimizer, out in ((ours_optimizer, y), (their_optimizer, expected)):
            optimizer.zero_grad()
            F.mse_loss(out, target).backward()
            optimizer.step()
        factors.after_step({"layer": p}, None, None)
        if step >= start:
            literal_W += follow * s * (theirs[1].detach() @ theirs[0].detach() - before)
    assert (literal_W - W).abs().max() > 0.1
    assert torch.equal(base.weight, W)


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
