"""Where PEFT and the papers differ, and what loralab does: each row of `DEVIATIONS` shows it, or raises."""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from archs import build, rows
from literal import best_part
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.loftq_utils import _low_rank_decomposition
from peft_oracle import ALPHA, COMMON, LABELS, NAMES, RANK, lively, pair, quiet
from shapes import made
from torch import nn
from torch.nn import functional as F

import loralab
from loralab.inputs import _span
from loralab.methods.lora import LoRA
from loralab.methods.precond import PreconditionedLoRA
from loralab.methods.starts import begin
from loralab.methods.vera import VeRA
from loralab.stores import STORES


@dataclass(frozen=True)
class Deviation:
    paper: str
    peft: str
    loralab: str
    show: Callable[[], None]  # raises where any of the three is not so


def layer_pair(method="lora", dropout=0.0, **given):
    """(our model of one layer, PEFT's, its layer), in training."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(11, 13))
    theirs = quiet(
        peft.get_peft_model, copy.deepcopy(plain),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=dropout, **given),
    ).train()  # fmt: skip
    layer, ours = theirs.base_model.model[0], plain.train()
    adapters = loralab.attach(ours, method, rank=RANK, alpha=float(ALPHA), targets=["0"], dropout=dropout)
    with torch.no_grad():
        for role, t in adapters.layers["0"].roles("default").items():
            if role not in ("A0", "B0"):
                held = layer.get_parameter(NAMES[role])
                held.add_(0.3 * torch.randn(held.shape, generator=torch.Generator().manual_seed(ord(role))))
                t.copy_(held)
    return ours, theirs, layer, {key.rpartition(".")[2]: t.detach() for key, t in adapters.state().items()}


def dropped(x, p):
    torch.manual_seed(1)
    return x * F.dropout(torch.ones_like(x), p)


def seeded(model, x):
    torch.manual_seed(1)
    return model(x).detach()


def dora_dropout():
    ours, theirs, layer, p = layer_pair("dora", 0.3, use_dora=True)
    x = torch.randn(7, 11)
    W, b, z, s = layer.base_layer.weight, layer.base_layer.bias, dropped(x, 0.3), ALPHA / RANK
    g = p["m"] / (W + s * p["B"] @ p["A"]).norm(dim=1)
    both = F.linear(x, W, b) + (g - 1) * F.linear(z, W) + g * s * F.linear(z, p["B"] @ p["A"])
    branch = g * (F.linear(x, W) + s * F.linear(z, p["B"] @ p["A"])) + b
    torch.testing.assert_close(seeded(theirs, x), both)
    torch.testing.assert_close(seeded(ours, x), branch)
    assert (both - branch).abs().max() > 0.01


def start_dropout():
    ours, theirs, _, p = layer_pair("pissa", 0.3, init_lora_weights="pissa")
    x = torch.randn(7, 11)
    W, b, z, s = ours[0].weight, ours[0].bias, dropped(x, 0.3), ALPHA / RANK
    start = p["B0"] @ p["A0"]
    torch.testing.assert_close(seeded(theirs, x), F.linear(x, W - start, b) + s * F.linear(z, p["B"] @ p["A"]))
    torch.testing.assert_close(seeded(ours, x), F.linear(x, W, b) + F.linear(z, s * p["B"] @ p["A"] - start))
    fresh = nn.Sequential(nn.Linear(11, 13))
    expected = fresh(x)
    loralab.attach(fresh, "pissa", rank=RANK, targets=["0"], dropout=0.3)
    torch.testing.assert_close(fresh.train()(x), expected)  # nothing is lost at the start
    assert not torch.allclose(seeded(theirs, x), seeded(ours, x), atol=1e-2)


def dora_norm():
    ours, theirs, _, _ = layer_pair("dora", use_dora=True)
    x = torch.randn(7, 11)
    torch.testing.assert_close(theirs(x), ours(x))
    assert {(11, 11), (13, 11)} <= made(theirs, x)
    assert {(11, 11), (13, 11), (11, 13)}.isdisjoint(made(ours, x))


def vera_generator():
    theirs = peft.get_peft_model(build("bert"), peft.VeraConfig(r=7, **COMMON, projection_prng_key=3))
    shapes = [(24, 24), (37, 24)]
    for role in "AB":
        drawn = getattr(theirs.base_model, f"vera_{role}")["default"]
        assert torch.equal(VeRA(rank=7, projection_seed=3, source="peft").constants(shapes)[role], drawn)
        own = VeRA(rank=7, projection_seed=3).constants(shapes)[role]
        assert own.shape == drawn.shape
        assert not torch.equal(own, drawn)


def adalora_penalty():
    adapters, theirs, tensors = pair("adalora")
    norms = []
    for model, learned in ((adapters.model, adapters.state().values()), (theirs, tensors.values())):
        held = [t for t in learned if t.requires_grad]
        model.train()(**rows(), labels=LABELS).loss.backward()
        nn.utils.clip_grad_norm_(held, 1e-3)
        torch.optim.SGD(held, lr=0.0).step()
        norms.append(float(torch.stack([t.grad.norm() for t in held]).norm()))
    assert norms[1] < 1.01e-3  # the penalty was clipped with the rest
    assert norms[0] > 0.05


def loraplus_vectors():
    adapters, theirs, tensors = pair("dora", ours={"lr_ratio": 16.0})
    optimizer = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=16, weight_decay=0.1)
    given = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    own = {
        id(p): (g["lr"], g["weight_decay"])
        for g in adapters.parameter_groups(lr=1.0, weight_decay=0.1)
        for p in g["params"]
    }
    for key, (role, t) in adapters.tensors().items():
        if t.requires_grad:
            assert given[id(tensors[key])] == (16.0 if role == "B" or t.ndim == 1 else 1.0, 0.0)  # no decay at all
            assert own[id(t)] == (16.0 if role == "B" else 1.0, 0.1 if t.ndim == 2 else 0.0)


def lorafa_optimizer():
    """The scaled gradient is in the first moment after a step: 0.1 of it."""
    _, theirs, layer, p = layer_pair()
    optimizer = create_lorafa_optimizer(theirs, r=RANK, lora_alpha=ALPHA, lr=0.1)
    theirs(torch.randn(7, 11)).square().sum().backward()
    B = layer.lora_B.default.weight
    grad = B.grad.clone()
    optimizer.step()
    moment = next(v["exp_avg_B"] for v in optimizer.state.values() if "exp_avg_B" in v) / 0.1
    ours = {"A": p["A"], "B": nn.Parameter(B.detach().clone())}
    ours["B"].grad = grad.clone()
    factors = PreconditionedLoRA(rank=RANK, alpha=float(ALPHA))
    factors.before_step({"0": ours}, None, {"0": factors})
    exact = grad.double() @ torch.linalg.inv((p["A"] @ p["A"].T).double()) / (ALPHA / RANK) ** 2
    size = exact.norm()
    assert (ours["B"].grad - exact).norm() / size < 1e-5
    assert (moment - exact).norm() / size < 2e-2


def olora_conv1d():
    """A layer of GPT-2 keeps W as (in, out)."""
    config = peft.LoraConfig(r=RANK, target_modules=["c_attn"], init_lora_weights="olora", fan_in_fan_out=True)
    theirs = quiet(peft.get_peft_model, build("gpt2"), config)
    layer = theirs.base_model.model.transformer.h[0].attn.c_attn
    W = build("gpt2").transformer.h[0].attn.c_attn.weight  # (24, 72)
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(layer.lora_A.default.weight, R[:RANK])
    assert layer.lora_B.default.weight.shape == (24, RANK)  # and not (72, rank)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        theirs(**rows())
    model = build("gpt2")
    adapters = loralab.attach(model, "olora", rank=RANK, targets=["c_attn"])
    Q, R = torch.linalg.qr(W.T)
    held = adapters.layers["transformer.h.0.attn.c_attn"].roles("default")
    torch.testing.assert_close(held["B"] @ held["A"], Q[:, :RANK] @ R[:RANK], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**rows()).logits, build("gpt2")(**rows()).logits, rtol=0, atol=1e-5)


def loftq_scale():
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    lost = W - STORES["nf4"](W, None).dense()
    found = _low_rank_decomposition(lost, reduced_rank=RANK)
    torch.testing.assert_close((found["L"] @ found["R"]).double(), best_part(lost, RANK), rtol=0, atol=1e-4)
    factors = LoRA(rank=RANK, alpha=float(ALPHA))
    p = begin("loftq", factors, W, STORES["nf4"](W, None), torch.Generator().manual_seed(0))
    torch.testing.assert_close((ALPHA / RANK * p["B"] @ p["A"]).double(), best_part(lost, RANK), rtol=0, atol=1e-4)


def eva_mean():
    X = torch.randn(50, 11, generator=torch.Generator().manual_seed(0)) + torch.arange(11.0)
    theirs = IncrementalPCA(n_components=RANK).fit(X).components_
    ours = _span((X.T @ X).double(), RANK).directions
    for found, seen in ((theirs, X - X.mean(0)), (ours, X)):
        V = torch.linalg.svd(seen.double()).Vh[:RANK]
        torch.testing.assert_close((found.double() * V).sum(1).abs(), torch.ones(RANK).double(), rtol=0, atol=1e-5)
    assert float((theirs[0] @ ours[0]).abs()) < 0.9


def moved_base():
    """What is exported after a start off zero is a plain LoRA; PEFT's own file begins anew when it is read."""
    adapters, theirs, _ = pair("pissa")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        assert config["init_lora_weights"] == "pissa"
        assert not torch.equal(theirs.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight,
                               lively("bert").bert.encoder.layer[0].attention.self.query.weight)  # fmt: skip
        adapters.export(Path(folder) / "ours")
        plain = peft.PeftModel.from_pretrained(lively("bert"), Path(folder) / "ours").eval()
    torch.testing.assert_close(plain(**rows()).logits, adapters.model(**rows()).logits, rtol=0, atol=1e-5)


def ia3_bias():
    plain, x = nn.Sequential(nn.Linear(11, 13)), torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    theirs = quiet(peft.get_peft_model, copy.deepcopy(plain), config)
    adapters = loralab.attach(plain, "ia3", targets=["0"])
    l = 1 + torch.randn(13, generator=torch.Generator().manual_seed(1))  # noqa: E741
    with torch.no_grad():
        theirs.base_model.model[0].ia3_l["default"].copy_(l.unsqueeze(1))
        adapters.state()["0.l"].copy_(l)
    y, b = F.linear(x, adapters.layers["0"].base.weight), adapters.layers["0"].bias
    torch.testing.assert_close(theirs(x), l * y + l * b)
    torch.testing.assert_close(plain(x), l * y + b)
    assert ((l - 1) * b).abs().max() > 0.01


def lora_ga_size():
    """PEFT's SVD is randomised and its singular vectors have signs of its own."""
    plain = nn.Sequential(nn.Linear(23, 29))
    x, y = (torch.randn(40, n, generator=torch.Generator().manual_seed(n)) for n in (23, 29))

    def loss(model, batch=None):
        return 100 * F.mse_loss(model(x), y)

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights="lora_ga",
                             lora_ga_config=peft.LoraGAConfig())  # fmt: skip
    theirs = copy.deepcopy(plain)
    peft.preprocess_loraga(theirs, config, lambda: loss(theirs).backward())
    layer = quiet(peft.get_peft_model, theirs, config).base_model.model[0]
    plain[0].weight.requires_grad_()
    U, S, Vh = torch.linalg.svd(torch.autograd.grad(loss(plain), plain[0].weight)[0])
    c = (29**0.5 / 16) ** 0.5
    right, left = Vh[:RANK], U[:, RANK : 2 * RANK].T
    p = loralab.attach(plain, "lora-ga", rank=RANK, targets=["0"], batches=[{}], loss=loss).layers["0"].roles("default")
    for A, B, of_A, of_B in (
        (layer.lora_A.default.weight, layer.lora_B.default.weight, torch.ones(RANK), c * S[RANK : 2 * RANK]),
        (p["A"], p["B"], torch.full((RANK,), c), torch.full((RANK,), c)),
    ):
        torch.testing.assert_close((A * right).sum(1).abs(), of_A, rtol=1e-3, atol=0)
        torch.testing.assert_close((B.T * left).sum(1).abs(), of_B, rtol=1e-2, atol=0)
    assert (S[RANK : 2 * RANK] - 1).abs().max() > 0.1


def oft_sign():
    plain, x = nn.Sequential(nn.Linear(12, 7)), torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    q, outs = 0.05 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), {}
    for series in (True, False):
        config = peft.OFTConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=series)
        theirs = quiet(peft.get_peft_model, copy.deepcopy(plain), config)
        ours = copy.deepcopy(plain)
        adapters = loralab.attach(ours, "oft", block=4, terms=5 * series, targets=["0"])
        for sign in (1, -1):
            with torch.no_grad():
                theirs.base_model.model[0].oft_R["default"].weight.copy_(sign * q)
                adapters.state()["0.Q"].copy_(sign * q)
            outs[series, sign] = theirs(x), ours(x)
    for sign in (1, -1):
        torch.testing.assert_close(outs[True, sign][0], outs[True, sign][1])
        torch.testing.assert_close(outs[False, sign][0], outs[False, -sign][1])
        torch.testing.assert_close(outs[False, sign][1], outs[True, sign][1], rtol=0, atol=1e-3)  # a short series
    assert (outs[False, 1][0] - outs[True, 1][0]).abs().max() > 0.1


DEVIATIONS = {
    "AdaLoRA: penalty": Deviation(
        "a term of the loss",
        "a term of the loss, so gradient clipping scales it down with the rest, and the loss printed contains it",
        "its gradient is added when the optimizer steps, after clipping, once per step; the loss printed is the task's",
        adalora_penalty,
    ),
    "DoRA: dropout": Deviation(
        "not said",
        "W x + (g - 1) W drop(x) + g s B A drop(x), a second product with W",
        "g (W x + s B A drop(x)): dropout on the adapter's branch alone",
        dora_dropout,
    ),
    "DoRA: norm": Deviation(
        "|W + B A| of each column; the authors' code takes one length per output",
        "one length per output; B A made from an identity matrix on every pass",
        "one length per output, in closed form: nothing of the size of W is made",
        dora_norm,
    ),
    "EVA: mean": Deviation(
        "SVD of the inputs",
        "of the inputs less their mean (incremental PCA)",
        "of the inputs as they are",
        eva_mean,
    ),
    "IA3: bias": Deviation(
        "its layers have none",
        "a bias is scaled with the outputs",
        "y = l W x + b: a bias is not scaled; PEFT's folders with one are refused",
        ia3_bias,
    ),
    "LoRA-GA: size": Deviation(
        "A and B are singular vectors times out^(1/4) / 4",
        "A has length 1, and B is times the gradient's singular values, so it depends on the scale of the loss",
        "as in the paper; the base keeps W, as for PiSSA",
        lora_ga_size,
    ),
    "OFT: sign": Deviation(
        "R = (I + Q)(I - Q)^-1",
        "the series, its default, is of that; `use_cayley_neumann=False` gives the rotation of -Q",
        "of Q in both; PEFT's exact folders are read with -Q",
        oft_sign,
    ),
    "LoftQ: scale": Deviation(
        "Q + B A nearest to W, without a scale",
        "B A nearest to W - Q, then scaled by alpha / r in the layer: right for alpha = r only",
        "s B A nearest to W - Q; one round, as PEFT's default",
        loftq_scale,
    ),
    "LoRA-FA: optimizer": Deviation(
        "A frozen, plain AdamW on B",
        "an optimizer that multiplies B's gradient by (A A^T)^-1 / s^2, in bfloat16 where there is any",
        "both: `lora-fa` is the paper's, `lora-fa-precond` PEFT's, in float32 and with any optimizer",
        lorafa_optimizer,
    ),
    "LoRA+: vectors and decay": Deviation(
        "B at ratio times the rate of A",
        "every 1-d tensor too (a head's bias, DoRA's m); `weight_decay` is ignored, `loraplus_weight_decay` counts",
        'B alone, decay on matrices; PEFT\'s groups with `parameter_groups(grouping="peft")`',
        loraplus_vectors,
    ),
    "OLoRA: Conv1D": Deviation(
        "QR of W (out, in)",
        "QR of the stored (in, out) weight of a Conv1D: A and B have the wrong sides, GPT-2 cannot run",
        "QR of W (out, in) whatever the layer",
        olora_conv1d,
    ),
    "PiSSA, OLoRA: base": Deviation(
        "the base becomes W - s B0 A0",
        "the same; a file is for that base, which is made again from W when it is read",
        "the base keeps W and the file holds A0 and B0; exported as a plain LoRA of rank 2 r",
        moved_base,
    ),
    "PiSSA, OLoRA: dropout": Deviation(
        "not said",
        "(W - s B0 A0) x + s B A drop(x): a fresh adapter with dropout is not the base",
        "W x + (s B A - B0 A0) drop(x): a fresh adapter changes nothing",
        start_dropout,
    ),
    "VeRA: generator": Deviation(
        "random, from a seed",
        "torch's generator, so A and B are stored beside the vectors by default",
        "numpy's Philox words, so the file holds the two vectors; PEFT's draw with `source=\"peft\"`",
        vera_generator,
    ),
}
