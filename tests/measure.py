"""The largest differences between the library and what it must agree with, method by method.

`EQUATIONS`, `STEPS` and `STARTS` are the papers', written slowly in literal.py; those of peft_oracle.py are PEFT's.
A measure returns the largest absolute difference it finds. The tests bound them, and docs/conformance.md prints them.
"""

import dataclasses
from functools import partial

import torch
from literal import DOUBLE, HAND, UPDATES, WIDE, best_part, forward, gram_schmidt, product, tensor
from test_adalora import literal_run as adalora_steps
from torch import nn
from torch.nn import functional as F

import loralab
from loralab.methods.delta import DeltaLoRA
from loralab.methods.dylora import DyLoRA
from loralab.methods.starts import begin, blank
from loralab.recipe import NAMED, Recipe, recipe
from loralab.stores import STORES, keep
from loralab.stores.float import Float
from loralab.update import apply

SIZE, RANK, ALPHA, ROWS, TOKENS = (13, 11), 3, 5.0, 5, 7
GATES = torch.tensor([0.5, 0.0, 1.0], dtype=DOUBLE)


def largest(pairs):
    """The largest absolute difference within pairs of tensors, all finite and of one shape."""
    out = 0.0
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        assert mine.isfinite().all()
        assert theirs.isfinite().all()
        out = max(out, float((mine - theirs).detach().abs().max()))
    return out


def weighted(y, learned):
    """Gradients of a scalar in generic position; zeros where there is none."""
    grads = torch.autograd.grad((y * tensor(*y.shape, seed=9)).sum(), learned, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, learned, strict=True)]


def named(name):
    """The recipe of a row at a small rank, and the size of its layer."""
    rank, has = 1 if name in HAND else 17 if name == "vera" else RANK, vars(NAMED[name][0].factors)
    small = {key: value for key, value in {"rank": rank, "alpha": ALPHA, "block": 5}.items() if key in has}
    return recipe(name, **small), WIDE if name in HAND or "block" in has else SIZE


def parameters(name, r, size):
    """Every role of one layer, its gates and its constants, in generic position and float64."""
    p = blank(r.start, r.factors, *size, torch.Generator().manual_seed(0))
    p = {role: tensor(*t.shape, seed=i) for i, (role, t) in enumerate(p.items(), 3) if t.is_floating_point()}
    p |= {"m": tensor(size[0], seed=20).abs() + 0.5} if r.gain else {}
    p |= {"gates": GATES} if name == "lora-drop" else {}
    constants = r.factors.local(r.factors.constants([size, (31, 29)]), *size)  # made for a larger layer too
    return p, {key: t.double() if t.is_floating_point() else t for key, t in constants.items()}


def equation(name, exact=False):
    """Output and gradients of one layer, dropout on, against the literal formula with the same mask."""
    r, size = named(name)
    r = dataclasses.replace(r, exact_gain=exact)
    (p, constants), drawn = parameters(name, r, size), 2 if isinstance(r.factors, DyLoRA) else None
    W, b, x = tensor(*size, seed=0), tensor(size[0], seed=1), tensor(ROWS, TOKENS, size[1], seed=2)
    base = STORES[r.store](W.float(), b) if r.store else Float(W, b)
    mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) > 0.3) / 0.7 if r.factors.drops else 1.0
    sides = []
    for ours in (True, False):
        xs, own = x.clone().requires_grad_(), {role: t.clone().requires_grad_(role in r.learn) for role, t in p.items()}
        if ours:
            y = apply(xs, base, r.lower(own | constants, base, drawn), lambda x: x * mask)
        else:
            U = UPDATES[name]({**own, **constants, "W": base.dense().double()}, r.factors, drawn)
            y = forward(xs, base.dense().double(), b, U, own.get("m"), exact, xs * mask)
        sides.append([y, *weighted(y, [xs, *(t for t in own.values() if t.requires_grad)])])
    return largest(zip(*sides, strict=True))


EQUATIONS = {name: partial(equation, name) for name in UPDATES}


# ---- steps -----------------------------------------------------------------------------------------------------------


def delta_lora(wait):
    """50 AdamW steps: the snapshot form against W <- W + follow s (B' A' - B A)."""
    follow, s, target = 1.7, ALPHA / RANK, tensor(ROWS, 13, seed=7)
    x, W, b = tensor(ROWS, 11, seed=2), tensor(*SIZE, seed=0), tensor(13, seed=1)
    A, B = nn.Parameter(tensor(RANK, 11, seed=3)), nn.Parameter(torch.zeros(13, RANK, dtype=DOUBLE))
    literal_W, theirs = W.clone(), [nn.Parameter(t.detach().clone()) for t in (A, B)]
    factors, base = DeltaLoRA(rank=RANK, alpha=ALPHA, follow=follow, wait=wait), Float(W, b)
    p = {"A": A, "B": B, "Ak": A.detach().clone(), "Bk": B.detach().clone()}
    optimizers = [torch.optim.AdamW(side, lr=0.05) for side in ([A, B], theirs)]
    seen = []
    for step in range(50):
        y = apply(x, base, Recipe(factors=factors).lower(p, base))
        expected = x @ literal_W.T + s * (x @ theirs[0].T) @ theirs[1].T + b
        seen.append((y, expected))
        before = theirs[1].detach() @ theirs[0].detach()
        for optimizer, out in zip(optimizers, (y, expected), strict=True):
            optimizer.zero_grad()
            F.mse_loss(out, target).backward()
            optimizer.step()
        factors.after_step({"layer": p}, None, None, step + 1)
        if step >= wait:
            literal_W += follow * s * (theirs[1].detach() @ theirs[0].detach() - before)
    assert (literal_W - W).abs().max() > 0.1
    return largest([*seen, (A, theirs[0]), (B, theirs[1])])


def in_double(method, **given):
    """One linear layer in float64 with an adapter off its start."""
    model = nn.Sequential(nn.Linear(11, 13))
    with torch.no_grad():
        for i, p in enumerate(model.double().parameters()):
            p.copy_(tensor(*p.shape, seed=i))
    adapters = loralab.attach(model, method, targets=["0"], rank=RANK, alpha=ALPHA, **given)
    model.double().train()
    with torch.no_grad():
        for role, t in adapters.layers["0"].roles("default").items():
            t.copy_(tensor(*t.shape, seed=ord(role)))
    return model, adapters


def stepped(method, literal, steps=6, lr=0.01, **given):
    """SGD steps on one layer against `literal(A, B, gA, gB, drawn)`, which changes A and B by hand."""
    model, adapters = in_double(method, **given)
    p, r = adapters.layers["0"].roles("default"), adapters.spec(None).recipe
    A, B = p["A"].detach().clone(), p["B"].detach().clone()
    W, b = (t.detach() for t in (adapters.layers["0"].weight, adapters.layers["0"].bias))
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=lr))
    pairs, drawn = [], []
    for step in range(steps):
        x, y = tensor(ROWS, 11, seed=30 + step), tensor(ROWS, 13, seed=60 + step)
        F.mse_loss(model(x), y).backward()
        drawn.append(adapters.active.drawn.get("default"))
        optimizer.step()
        optimizer.zero_grad()
        own = {"A": A.requires_grad_(), "B": B.requires_grad_()}
        U = UPDATES[method](own, r.factors, drawn[-1])
        gA, gB = torch.autograd.grad(F.mse_loss(forward(x, W, b, U), y), [A, B])
        with torch.no_grad():
            A, B = literal(A.detach(), B.detach(), gA, gB, drawn[-1])
        pairs += [(p["A"], A), (p["B"], B)]
    assert drawn[0] is None or len(set(drawn)) > 1
    return largest((mine.detach(), slow) for mine, slow in pairs[-2:])


def last_row(A, B, gA, gB, drawn):
    A, B = A.clone(), B.clone()
    A[drawn - 1] -= 0.01 * gA[drawn - 1]
    B[:, drawn - 1] -= 0.01 * gB[:, drawn - 1]
    return A, B


def preconditioned(A, B, gA, gB, drawn):
    eye, s = torch.eye(RANK, dtype=DOUBLE), ALPHA / RANK
    return A, B - 0.01 * gB @ torch.linalg.inv(product(A, A.T) + 1e-8 * eye) / s**2


STEPS = {
    "lora": partial(stepped, "lora", lambda A, B, gA, gB, _: (A - 0.01 * gA, B - 0.01 * gB)),
    "lora-fa": partial(stepped, "lora-fa", lambda A, B, gA, gB, _: (A, B - 0.01 * gB)),
    "lora-fa-precond": partial(stepped, "lora-fa-precond", preconditioned),
    "lora+": partial(stepped, "lora+", lambda A, B, gA, gB, _: (A - 0.01 * gA, B - 0.16 * gB)),
    "dylora": partial(stepped, "dylora", lambda A, B, gA, gB, _: (A - 0.01 * gA, B - 0.01 * gB)),
    "frozen-dylora": partial(stepped, "frozen-dylora", last_row),
    "delta-lora": lambda: max(delta_lora(wait) for wait in (0, 7)),
    "adalora": lambda: max(adalora_steps(kind, every)[0] for kind in ("SGD", "AdamW") for every in (1, 3)),
}


# ---- starts: computed in float32, so the measure is of its rounding -------------------------------------------------


def begun(name):
    """(recipe, weight, weight as kept, parameters) of a fresh layer."""
    r, size = recipe(name, rank=RANK, alpha=ALPHA), (29, 23)
    layer = nn.Linear(*size[::-1])
    with torch.no_grad():
        layer.weight.copy_(0.3 * tensor(*size, seed=5))
    W, base, generator = keep(layer).dense().detach(), keep(layer, r.store), torch.Generator().manual_seed(0)
    p = blank(r.start, r.factors, *size, generator)
    return (
        r.factors.scaling,
        W,
        base.dense().detach(),
        p | r.factors.from_base(base) | begin(r.start, r.factors, W, base, generator),
    )


def best(name):
    """s B A is the best part of the weight (PiSSA) or of what the store rounds away (LoftQ), in equal halves."""
    s, W, kept, p = begun(name)
    M = W if name == "pissa" else W - kept
    S = (torch.linalg.svdvals(M.double())[:RANK] / s).diag()
    A, B = p["A"].double(), p["B"].double()
    return largest([(s * B @ A, best_part(M, RANK)), (A @ A.T, S), (B.T @ B, S)])


def olora():
    _, W, _, p = begun("olora")
    A, B = gram_schmidt(W, RANK)
    signs = (p["B"].double() * B).sum(0).sign()
    return largest([(p["A"].double(), signs[:, None] * A), (p["B"].double(), signs * B)])


def lora_xs():
    """B A is the best part of the weight, A with rows of length 1 and B with all of the singular values."""
    _, W, _, p = begun("lora-xs")
    A, B, S = p["A"].double(), p["B"].double(), torch.linalg.svdvals(W.double())[:RANK]
    eye = torch.eye(RANK, dtype=DOUBLE)
    return largest([(B @ A, best_part(W, RANK)), (A @ A.T, eye), ((B / S).T @ (B / S), eye)])


STARTS = {"lora-xs": lora_xs, "pissa": partial(best, "pissa"), "loftq": partial(best, "loftq"), "olora": olora}
WITHOUT = [name for name, (row, _) in NAMED.items() if row.factors is None]  # no layer is adapted
