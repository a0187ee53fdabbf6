"""PEFT as a second oracle: one model by each library with the same parameters.

`PEFT` measures outputs, the gradient of every tensor that learns, and outputs of the merged model, in float32.
"""

import warnings
from collections.abc import Callable
from functools import partial

import peft
import torch
from archs import build, rows
from measure import largest
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F

import loralab
from loralab.recipe import NAMED

RANK, ALPHA, LABELS = 3, 5, torch.tensor([0, 1, 2, 1, 0])
TARGETS = ["query", "value", "intermediate.dense"]
COMMON = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
LORA = {"r": RANK, "lora_alpha": ALPHA, **COMMON}
CONFIGS: dict[str, Callable[..., peft.PeftConfig]] = {
    "lora": partial(peft.LoraConfig, **LORA),
    "rslora": partial(peft.LoraConfig, **LORA, use_rslora=True),
    "dora": partial(peft.LoraConfig, **LORA, use_dora=True),
    "pissa": partial(peft.LoraConfig, **LORA, init_lora_weights="pissa"),
    "olora": partial(peft.LoraConfig, **LORA, init_lora_weights="olora"),
    "vera": partial(peft.VeraConfig, r=RANK, **COMMON, projection_prng_key=3, d_initial=0.7),
    "loha": partial(peft.LoHaConfig, r=RANK, alpha=ALPHA, **COMMON),
    "miss": partial(peft.MissConfig, r=RANK, **COMMON),
    # of a query the outputs are scaled, which in PEFT scales a bias too; see UNBIASED
    "ia3": partial(peft.IA3Config, **COMMON, feedforward_modules=TARGETS[1:]),
    "oft": partial(peft.OFTConfig, **COMMON, oft_block_size=5),
    "adalora": partial(
        peft.AdaLoraConfig, init_r=RANK, target_r=2, lora_alpha=ALPHA, **COMMON, total_step=9, tinit=1, tfinal=2
    ),
}
OURS = {
    "vera": {"projection_seed": 3, "source": "peft"},
    "adalora": {"target_rank": 2, "total_steps": 9},
    "ia3": {"inputs": TARGETS[1:]},
    "oft": {"block": 5, "terms": 5},
}
UNBIASED = {"ia3": "query"}  # method -> layers whose bias is taken away
NAMES = {  # role -> PEFT's name of the tensor in a layer
    "A": "lora_A.default.weight",
    "B": "lora_B.default.weight",
    "m": "lora_magnitude_vector.default.weight",
    "B1": "hada_w1_a.default",
    "A1": "hada_w1_b.default",
    "B2": "hada_w2_a.default",
    "A2": "hada_w2_b.default",
    "D": "miss_block.default",
    "l": "ia3_l.default",
    "Q": "oft_R.default.weight",
    "d": "vera_lambda_d.default",
    "b": "vera_lambda_b.default",
}
ADALORA = {role: f"lora_{role}.default" for role in "ABE"}


def quiet(make, *args, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **given)


def lively(kind, method="lora"):
    """A model whose layers all matter: with transformers' start of 0.02 a query has next to no gradient."""
    model, generator = build(kind), torch.Generator().manual_seed(4)
    for path, module in model.named_modules():
        if path.endswith(UNBIASED.get(method, "nothing")):
            module.bias = None
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.2, generator=generator)
    return model


def pair(method, kind="bert", ours=None, **given):
    """(our handle, PEFT's model, our path.role -> PEFT's tensor): the same parameters in both, off their start."""
    with torch.random.fork_rng():  # PEFT draws its start from the global generator
        torch.manual_seed(6)
        theirs = quiet(peft.get_peft_model, lively(kind, method), CONFIGS[method](**given)).eval()
    has = vars(NAMED[method][0].factors)
    settings = {key: value for key, value in {"rank": RANK, "alpha": float(ALPHA)}.items() if key in has}
    more = OURS.get(method, {}) | settings | (ours or {})
    adapters = loralab.attach(lively(kind, method), method, targets=TARGETS, head=True, **more)
    held, names, tensors = dict(theirs.named_parameters()), ADALORA if method == "adalora" else NAMES, {}
    for key, (role, t) in adapters.tensors().items():
        if t.requires_grad:
            path, _, last = key.rpartition(".")
            inside = f"{path}.modules_to_save.default.{last}" if role == "head" else f"{path}.{names[role]}"
            tensors[key] = held[f"base_model.model.{inside}"]
    generator, state = torch.Generator().manual_seed(2), adapters.state()
    with torch.no_grad():
        for key, t in tensors.items():
            t.add_(torch.empty(t.shape).normal_(0, 0.3, generator=generator))
            state[key].copy_(t.reshape(state[key].shape))
    return adapters, theirs, tensors


def difference(method):
    adapters, theirs, tensors = pair(method)
    outputs = []
    for model in (adapters.model, theirs):
        logits = model(**rows()).logits
        F.cross_entropy(logits, LABELS).backward()
        outputs.append(logits)
    state = adapters.state()
    grads = [(state[key].grad, t.grad.reshape(state[key].shape)) for key, t in tensors.items()]
    assert sum(t.requires_grad for t in theirs.parameters()) == len(tensors)
    assert min(float(mine.abs().max()) for mine, _ in grads) > 1e-3  # far above the tolerance
    merged = adapters.merge()(**rows()).logits, theirs.merge_and_unload()(**rows()).logits
    return largest([tuple(outputs), *grads, merged])


def loraplus():
    """Five AdamW steps over PEFT's groups and over ours with grouping="peft", a gain and decay included."""
    adapters, theirs, tensors = pair("dora", ours={"lr_ratio": 16.0})
    optimizers = (
        torch.optim.AdamW(adapters.parameter_groups(lr=1e-3, weight_decay=0.1, grouping="peft")),
        create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1),
    )
    rates = [
        {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        for optimizer in optimizers
    ]
    state = adapters.state()
    assert len(rates[0]) == len(rates[1]) == len(tensors)
    assert all(rates[0][id(state[key])] == rates[1][id(t)] for key, t in tensors.items())
    for step in range(5):
        for model, optimizer in zip((adapters.model, theirs), optimizers, strict=True):
            F.cross_entropy(model(**rows(seed=step)).logits, LABELS).backward()
            optimizer.step()
            optimizer.zero_grad()
    return largest((state[key], t) for key, t in tensors.items())


PEFT = {name: partial(difference, name) for name in CONFIGS} | {"lora+": loraplus}
