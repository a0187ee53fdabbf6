"""AdaLoRA against a literal, slow version of itself and against PEFT: the same masks and losses, step by step."""

import math
from functools import partial

import pytest
import torch
from archs import build, rows, shake
from torch import nn

import loralab
from loralab.adapters import read
from loralab.methods.adalora import AdaLoRA, kept_gates
from loralab.rankmap import RankMap
from loralab.ranks.adalora import kept_map
from loralab.recipe import Recipe, recipe
from loralab.run import Settings, train

N_OUT, N_IN, RANK = 13, 11, 5
STEPS = {"total_steps": 14, "tinit": 2, "tfinal": 4}
TARGETS = ["query", "value", "intermediate.dense"]


def tensor(*shape, seed, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Slow:
    """AdaLoRA as the paper states it, value by value in Python, for layers of A (r, in), E (r,), B (out, r)."""

    def __init__(self, layers, r, target, total, tinit, tfinal, every=1, beta1=0.85, beta2=0.85):
        self.layers, self.r, self.target, self.every = layers, r, target, every
        self.total, self.tinit, self.tfinal, self.beta1, self.beta2 = total, tinit, tfinal, beta1, beta2
        self.mean, self.spread, self.closed = {}, {}, set()

    def penalty(self):
        norms = []
        for A, _, B in self.layers:
            norms += [
                (A @ A.T - torch.eye(self.r)).pow(2).sum().sqrt(),
                (B.T @ B - torch.eye(self.r)).pow(2).sum().sqrt(),
            ]
        return 0.5 * sum(norms) / len(norms)

    def score(self, key):
        return self.mean[key] * self.spread[key]

    def after(self, t):
        if t < self.total - self.tfinal:
            for i, layer in enumerate(self.layers):
                for role, p in zip("AEB", layer, strict=True):
                    for at, (value, grad) in enumerate(
                        zip(p.flatten().tolist(), p.grad.flatten().tolist(), strict=True)
                    ):
                        key, now = (i, role, at), abs(value * grad)
                        self.mean[key] = self.beta1 * self.mean.get(key, 0.0) + (1 - self.beta1) * now
                        gap = abs(now - self.mean[key])
                        self.spread[key] = self.beta2 * self.spread.get(key, 0.0) + (1 - self.beta2) * gap
        falling = self.tinit < t < self.total - self.tfinal and t % self.every == 0
        if falling or t == self.total - self.tfinal:
            triplets = {}
            for i, (A, _, B) in enumerate(self.layers):
                for k in range(self.r):
                    row = [self.score((i, "A", k * A.shape[1] + j)) for j in range(A.shape[1])]
                    column = [self.score((i, "B", j * self.r + k)) for j in range(B.shape[0])]
                    triplets[i, k] = self.score((i, "E", k)) + sum(row) / len(row) + sum(column) / len(column)
            most, least = self.r * len(self.layers), self.target * len(self.layers)
            part = 1 - (t - self.tinit) / (self.total - self.tinit - self.tfinal)
            budget = math.floor(least + (most - least) * part**3)
            self.closed = set(sorted(triplets, key=triplets.get)[: most - budget])
        if falling or t >= self.total - self.tfinal:
            with torch.no_grad():
                for i, k in self.closed:
                    self.layers[i][1][k] = 0.0


def literal_run(kind, every):
    """(largest difference of any value at any step, open gates after each step) of 17 steps on three layers."""
    factors = AdaLoRA(rank=RANK, target_rank=2, alpha=7.0, every=every, **STEPS)
    x, y = tensor(4, N_IN, seed=1), tensor(4, N_OUT, seed=2)
    E = torch.zeros(RANK, dtype=torch.float64)
    fresh = [(tensor(RANK, N_IN, seed=3 + i, std=0.3), E, tensor(N_OUT, RANK, seed=6 + i, std=0.3)) for i in range(3)]
    ours = [[nn.Parameter(t.clone()) for t in layer] for layer in fresh]
    theirs = [[nn.Parameter(t.clone()) for t in layer] for layer in fresh]
    slow = Slow(theirs, RANK, 2, 14, 2, 4, every)
    layers = {str(i): dict(zip("AEB", layer, strict=True)) for i, layer in enumerate(ours)}
    layers = {path: {**p, **factors.memory(p)} for path, p in layers.items()}
    make = {"SGD": partial(torch.optim.SGD, lr=0.05), "AdamW": partial(torch.optim.AdamW, lr=0.03)}[kind]
    optimizers = [make([p for layer in side for p in layer]) for side in (ours, theirs)]
    off, open_gates = 0.0, []
    for t in range(1, 18):  # beyond total_steps, too
        for optimizer in optimizers:
            optimizer.zero_grad()
        updates = [Recipe(factors=factors).lower(p, None) for p in layers.values()]
        (sum((i + 1) * x @ u.A.T @ u.B.T for i, u in enumerate(updates)) - y).pow(2).mean().backward()
        factors.before_step(layers, None, {})
        dense = [7.0 / (RANK + 1e-5) * B @ torch.diag(E) @ A for A, E, B in theirs]
        ((sum((i + 1) * x @ W.T for i, W in enumerate(dense)) - y).pow(2).mean() + slow.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
        factors.after_step(layers, None, None, t)
        slow.after(t)
        for mine, literal in zip(ours, theirs, strict=True):
            off = max(off, *(float((a - b).detach().abs().max()) for a, b in zip(mine, literal, strict=True)))
        open_gates.append(sum(map(sum, kept_gates(layers).values())))
    return off, open_gates


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_literal_algorithm(kind, every):
    off, open_gates = literal_run(kind, every)
    assert off < 1e-12
    assert open_gates[:2] == [15, 15]
    assert open_gates[9:] == [6] * 8  # settled at twice the layers
    assert open_gates == sorted(open_gates, reverse=True) or every > 1  # between two choices a gate may open again


def test_the_budget_falls_by_the_cube_of_what_is_left():
    factors = AdaLoRA(rank=12, target_rank=8, total_steps=100, tinit=10, tfinal=50)
    budgets = [factors.budget(step, 24) for step in range(101)]
    assert set(budgets[:11]) == {288}
    assert set(budgets[50:]) == {192}
    assert budgets[30] == 192 + int(96 * 0.5**3)
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(("every", "orthogonality"), [(1, 0.5), (2, 0.1)])
def test_peft_gives_the_same_masks_and_losses(optimizer, every, orthogonality):
    peft = pytest.importorskip("peft")
    ours, plain = build("bert").train(), build("bert").train()
    options = {"target_rank": 2, "every": every, "orthogonality": orthogonality, **STEPS}
    adapters = loralab.attach(ours, "adalora", rank=RANK, alpha=7.0, targets=TARGETS, head=True, **options)
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=2, lora_alpha=7, tinit=2, tfinal=4, total_step=14, deltaT=every,
        orth_reg_weight=orthogonality, target_modules=TARGETS, modules_to_save=["classifier"],
    )  # fmt: skip
    theirs = peft.get_peft_model(plain, config)
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, layer in adapters.layers.items():
            p = layer.roles("default")
            for role in "AB":
                getattr(modules[path], f"lora_{role}")["default"].copy_(p[role])
    rate = {"SGD": 0.3, "AdamW": 2e-2}[optimizer]
    optimizers = [
        getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        for model in (ours, theirs)
    ]
    closed = []
    for step in range(1, 17):
        batch, labels = rows(seed=step), torch.randint(0, 3, (5,), generator=torch.Generator().manual_seed(step))
        mine = ours(**batch, labels=labels).loss
        given = theirs.base_model(**batch, labels=labels).loss  # PeftModel alone, without a task type, adds no penalty
        mine.backward()
        given.backward()
        penalty = _penalty(adapters) * orthogonality  # PEFT reports it in the loss, here it is in the gradient alone
        assert mine.item() + penalty == pytest.approx(given.item(), abs=1e-5)
        for one in optimizers:
            one.step()
        theirs.base_model.update_and_allocate(step)
        for one in optimizers:
            one.zero_grad()
        for path, layer in adapters.layers.items():
            E = modules[path].lora_E["default"].flatten()
            assert torch.equal(layer.roles("default")["E"] == 0, E == 0), (step, path)
            torch.testing.assert_close(layer.roles("default")["E"], E, rtol=0, atol=1e-5)
        closed.append(sum(int((layer.roles("default")["E"] == 0).sum()) for layer in adapters.layers.values()))
    assert closed[0] == 0
    assert closed[-1] == 3 * len(adapters.layers)
    assert len(set(closed)) > 3


def _penalty(adapters):
    norms = []
    for layer in adapters.layers.values():
        for P in (layer.roles("default")["A"], layer.roles("default")["B"].T):
            norms.append((P @ P.T - torch.eye(len(P))).norm().item())
    return sum(norms) / len(norms)


def test_the_penalty_is_added_once_per_step_and_alone_where_the_loss_gives_nothing():
    factors = AdaLoRA(rank=RANK, orthogonality=0.7)
    A, B = nn.Parameter(tensor(RANK, N_IN, seed=1)), nn.Parameter(tensor(N_OUT, RANK, seed=2))
    eye = torch.eye(RANK, dtype=torch.float64)
    loss = 0.7 * ((A @ A.T - eye).norm() + (B.T @ B - eye).norm()) / 2
    expected = torch.autograd.grad(loss, [A, B])
    B.grad = torch.ones_like(B)
    p = {"A": A, "B": B, "E": nn.Parameter(tensor(RANK, seed=3))}
    factors.before_step({"one": p, "shared": p}, None, {})
    torch.testing.assert_close(A.grad, expected[0])
    torch.testing.assert_close(B.grad, 1 + expected[1])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"target_rank": 9, "rank": 8}, "target_rank=9: expected 1 to rank=8"),
        ({"every": 0}, "every=0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"orthogonality": -0.1}, "orthogonality=-0.1"),
        ({"total_steps": 10, "tinit": 6, "tfinal": 4}, "which is no step"),
        ({"start": "gaussian"}, "never move"),
        ({"start": "pissa"}, "not zero at the start"),
    ],
)
def test_settings_that_cannot_work_are_named(given, problem):
    with pytest.raises(loralab.UserError, match=problem):
        recipe("adalora", **given)


def test_a_training_too_short_to_see_which_ranks_matter_does_not_begin():
    """All gates tied at zero and closed, and the adapter was nothing for ever."""
    for steps in (1, 2, 3):
        model = build("bert").train()
        adapters = loralab.attach(model, "adalora", rank=3, total_steps=steps, head=True)
        if steps < 3:
            with pytest.raises(loralab.UserError, match="before it has seen which matter"):
                model(**rows())
            continue
        optimizer = torch.optim.AdamW(adapters.parameter_groups())
        for _ in range(steps):
            model(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        gates = kept_gates({path: layer.roles("default") for path, layer in adapters.layers.items()})
        assert sum(map(sum, gates.values())) == 2 * len(gates)


def test_without_the_length_of_training_it_does_not_begin():
    model = build("bert").train()
    loralab.attach(model, "adalora", rank=3)
    with pytest.raises(loralab.UserError, match="pass total_steps"):
        model(**rows())
    model.eval()(**rows())  # an adapter that only predicts needs none


def test_defaults_follow_rank_and_length():
    assert (AdaLoRA().target, AdaLoRA(rank=3).target, AdaLoRA(rank=1).target) == (8, 2, 1)
    assert AdaLoRA(total_steps=50_000).phases == (5_000, 25_000)
    for steps in range(1, 30):
        assert AdaLoRA(total_steps=steps).problems() == []
    assert recipe("adalora", rank=4).for_steps(30).factors.total_steps == 30
    assert recipe("adalora", total_steps=20).for_steps(30).factors.total_steps == 20
    assert recipe("full").for_steps(30) == recipe("full")


def test_what_a_budget_left_is_a_map_for_another_run(tmp_path):
    model = build("bert").train()
    adapters = loralab.attach(model, "adalora", rank=3, target_rank=1, targets=TARGETS, head=True, **STEPS)
    with pytest.raises(loralab.UserError, match="before the first step"):
        kept_map(adapters)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-2))
    for step in range(14):
        model(**rows(seed=step), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = RankMap.load(kept_map(adapters).save(tmp_path / "map.json"))
    assert {path: part.rank for path, part in ranks.layers.items()} == {
        path: int((layer.roles("default")["E"] != 0).sum()) for path, layer in adapters.layers.items()
    }
    assert sum(part.rank for part in ranks.layers.values()) == len(adapters.layers)
    again = loralab.attach(build("bert"), "lora", targets=TARGETS, ranks=ranks)
    assert set(again.layers) == set(ranks.adapted)
    with pytest.raises(loralab.UserError, match="method adalora"):
        kept_map(again)


def test_what_training_remembers_stays_out_of_the_file(tmp_path):
    adapters = loralab.attach(build("bert"), "adalora", rank=3, total_steps=8)
    shake(adapters, "default")
    adapters.save(tmp_path / "a")
    assert {key.rpartition(".")[2] for key in adapters.state()} == {"A", "B", "E"}
    assert adapters.steps.state_dict().keys() >= {f"default/{path}/A.mean" for path in adapters.layers}
    loaded = loralab.load(build("bert"), tmp_path / "a")
    assert loaded.spec(None).recipe.factors.total_steps == 8


def test_a_run_knows_its_length_and_ends_within_the_budget(tiny, own, tmp_path):
    given = {"task": str(own["class"]), "model": str(tiny), "text": ("sentence",), "label": "label", "max_length": 32}
    settings = Settings(
        **given, method="adalora", rank=6, epochs=2, batch_size=20, selection="last", out=tmp_path / "r"
    )
    train(settings)
    file = read(tmp_path / "r/adapter")
    assert file.recipe.factors.total_steps == settings.steps(192) == 20
    gates = kept_gates({path: {"E": file.tensors[f"{path}.E"]} for path in file.paths})
    assert sum(map(sum, gates.values())) == 4 * len(gates)
    assert len({sum(kept) for kept in gates.values()}) > 1  # some layers keep more than others
