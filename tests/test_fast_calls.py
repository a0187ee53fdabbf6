"""What a call asks of a layer and what a layer has become: the fast path is the plain one, or the layer says why not.

Encoders and decoders alike, in float64: masks of every kind, tokens that see nothing, code and numbers that others put
into a layer, models in models, copies, checkpointing while something else learns, and the way back.
"""

import copy
import pickle
from contextlib import nullcontext

import pytest
import test_fast_decoders as decoders
import torch
from archs import CONFIGS, build, shake
from test_fast import ENCODERS, double
from test_fast_decoders import exact  # noqa: F401
from test_fast_encoders import build as build_newer
from test_fast_encoders import exact as exact_positions  # noqa: F401
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForSequenceClassification, BertLMHeadModel, BertModel, EncoderDecoderModel

import loralab
from loralab.fast import prepare
from loralab.fast.layers import layers_of

pytestmark = pytest.mark.usefixtures("exact")
KINDS = {  # kind -> how a model of it is made
    **dict.fromkeys(ENCODERS, build),
    "albert": build_newer,
    "modernbert": build_newer,
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma"), decoders.build),
}
DROPS = {"bert": build, "modernbert": build_newer, "llama": decoders.build}


def made(kind, quick, **more):
    """A model in float64 with an adapter in general position, and what `prepare` chose."""
    model = KINDS[kind](kind, **more)
    adapters = loralab.attach(model, "lora", rank=3, alpha=5.0, targets="all-linear")
    shake(adapters, "default")
    double(model, adapters)
    return model, adapters, prepare(model) if quick else None


def ids(rows=5, tokens=9):
    return torch.randint(5, 50, (rows, tokens), generator=torch.Generator().manual_seed(7))


def given(kind, **more):
    return {"input_ids": ids(), **more, **({} if kind in ENCODERS or "bert" in kind else {"use_cache": False})}


def passed(model, batch):
    """(logits of every token, padding too, gradients of all that learns), or the class of error that it raises."""
    model.train()
    for p in model.parameters():
        p.grad = None
    try:
        logits = model(**batch).logits
    except RuntimeError as error:
        return type(error)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()).sum().backward()
    return logits, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def alike(quick, plain):
    if isinstance(quick, type) or isinstance(plain, type):
        assert quick is plain
        return
    torch.testing.assert_close(quick[0], plain[0], rtol=0, atol=1e-9 * (1 + plain[0].abs().max().item()))
    assert quick[1].keys() == plain[1].keys()
    for key, grad in plain[1].items():
        assert (grad is None) == (quick[1][key] is None), key
        if grad is not None:
            atol = 1e-9 * (1 + grad.abs().max().item())
            torch.testing.assert_close(quick[1][key], grad, rtol=0, atol=atol, msg=key)


# ---- masks and arguments ---------------------------------------------------------------------------------------------


def pads(side, empty=None):
    mask = torch.ones(5, 9, dtype=torch.long)
    for i in range(1, 5):
        mask[i, : 2 * i - 1] = 0
    mask = mask if side == "left" else mask.flip(1)
    if empty is not None:
        mask[empty] = 0
    return mask


def seen(blind=False):
    """True where a token may look (5, 1, 9, 9); with `blind` some see nothing."""
    mask = torch.rand(5, 1, 9, 9, generator=torch.Generator().manual_seed(5)) > 0.4
    if blind:
        mask[2, 0, 3:5] = False
        return mask
    return mask | torch.eye(9, dtype=torch.bool)


def added(lowest):
    return torch.zeros(5, 1, 9, 9, dtype=torch.float64).masked_fill(~seen(), lowest)


CALLS = {  # what is given beside the tokens
    "nothing": dict,
    "padding on the right": lambda: {"attention_mask": pads("right")},
    "padding on the left": lambda: {"attention_mask": pads("left")},
    "a row of padding alone": lambda: {"attention_mask": pads("right", empty=3)},
    "who sees whom": lambda: {"attention_mask": seen()},
    "who sees whom, and some see nobody": lambda: {"attention_mask": seen(blind=True)},
    "the lowest number": lambda: {"attention_mask": added(torch.finfo(torch.float64).min)},
    "minus infinity": lambda: {"attention_mask": added(-torch.inf)},
    "one mask for all who look": lambda: {"attention_mask": added(-1e4)[:, :, 4:5]},
    "one mask for all rows": lambda: {"attention_mask": added(-1e4)[2:3]},
    "a mask for each head": lambda: {"attention_mask": torch.cat((added(-1e4), added(-1e4).flip(0)), 1)},
    "ones and zeros": lambda: {"attention_mask": seen().long()},
    "attention that is causal": lambda: {"is_causal": True},
    "attention that is not": lambda: {"is_causal": False},
}


@pytest.mark.few(30)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whatever_a_call_gives_is_what_the_layers_themselves_make_of_it(kind, call, attention):
    results = []
    for quick in (True, False):
        model, _, _ = made(kind, quick)
        model.set_attn_implementation(attention)
        results.append(passed(model, given(kind, **CALLS[call]())))
    alike(*results)


# ---- what becomes of a layer -----------------------------------------------------------------------------------------


def part(model):
    """The attention of the second layer."""
    layer = layers_of(model)[1]
    return next(module for name, module in layer.named_children() if "att" in name and "norm" not in name)


def louder(kind):
    """A class whose forward gives half as much again."""

    class Louder(kind):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

    return Louder


def a_part_gets_another_class(model):
    part(model).__class__ = louder(type(part(model)))


def a_layer_gets_another_class(model):
    layer = layers_of(model)[1]
    layer.__class__ = louder(type(layer))


def a_part_is_replaced(model):
    layer, old = layers_of(model)[1], part(model)
    new = copy.copy(old)
    new.__class__ = louder(type(old))
    layer.set_submodule(next(name for name, module in layer.named_children() if module is old), new)


class AnotherForward:
    """Half as much again of what every module of a class gives, within the block."""

    def __init__(self, kind):
        self.kind, self.own = kind, kind.forward

    def __enter__(self):
        own = self.own

        def forward(module, *args, **kwargs):
            out = own(module, *args, **kwargs)
            return (1.5 * out[0], *out[1:])

        self.kind.forward = forward

    def __exit__(self, *_):
        self.kind.forward = self.own


class HookOfAll:
    """A hook on every module of the process, within the block."""

    def __enter__(self):
        self.hook = register_module_forward_hook(lambda m, _, out: 1.5 * out if "Norm" in type(m).__name__ else None)

    def __exit__(self, *_):
        self.hook.remove()


def numbers_change(model):
    for module in layers_of(model)[1].modules():
        for key in ("eps", "variance_epsilon", "scaling"):
            if isinstance(vars(module).get(key), float):
                setattr(module, key, 0.7)


def it_is_causal_no_more(model):
    model.config.is_causal = False
    for layer in layers_of(model):
        for module in layer.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False


CHANGES = {  # a change to a model, or what holds while it runs -> why the second layer computes itself
    "a part gets another class": (a_part_gets_another_class, "is a Louder of test_fast_calls"),
    "a layer gets another class": (a_layer_gets_another_class, "is a Louder of test_fast_calls"),
    "a part is replaced": (a_part_is_replaced, "is a Louder of test_fast_calls"),
    "a class gets another forward": (lambda m: AnotherForward(type(part(m))), "has a forward of its own"),
    "all modules have a hook": (lambda m: HookOfAll(), "hooks on all modules"),
    "numbers change": (numbers_change, None),
    "it is causal no more": (it_is_causal_no_more, None),
}


@pytest.mark.few(24)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mask", [None, "left"])
def test_what_becomes_of_a_layer_counts(kind, change, mask):
    make, why = CHANGES[change]
    results = []
    for quick in (True, False):
        model, _, _ = made(kind, quick)
        batch = given(kind, **({} if mask is None else {"attention_mask": pads(mask)}))
        first = passed(model, batch)
        second = layers_of(model)[1]
        with make(model) or nullcontext():
            results.append(passed(model, batch))
            if quick and why is not None:
                assert why in second.__dict__["forward"].why_plain().text
        if change != "it is causal no more":
            assert not torch.equal(first[0], results[-1][0])
    alike(*results)


# ---- models in models ------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A model of somebody's own around one of transformers; it has no config."""

    def __init__(self):
        super().__init__()
        self.inner = build("bert")

    def forward(self, **batch):
        return self.inner(**batch)


class Pair(nn.Module):
    """Two models; what stands for the config of both is that of the other."""

    def __init__(self):
        super().__init__()
        self.config = decoders.build("llama").config
        self.inner = build("bert")
        self.inner.set_attn_implementation("eager")

    def forward(self, **batch):
        return self.inner(**batch)


def translator():
    encoder, decoder = copy.deepcopy(CONFIGS["bert"]), copy.deepcopy(CONFIGS["bert"])
    decoder.is_decoder = decoder.add_cross_attention = True
    for config in (encoder, decoder):
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return EncoderDecoderModel(encoder=BertModel(encoder), decoder=BertLMHeadModel(decoder))


def in_chunks():
    config = copy.deepcopy(CONFIGS["bert"])
    config.chunk_size_feed_forward = 3
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


MODELS = {  # model -> arguments beside tokens and mask, and what the choice of the block says
    Wrapper: ({}, "one step of autograd"),
    Pair: ({}, "one step of autograd"),
    translator: ({"decoder_input_ids": ids(5, 4), "use_cache": False}, "2 of 4 layers take their own forward: it is a"),
    in_chunks: ({}, "in chunks"),
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_models_in_models_and_layers_of_decoders(make):
    """An encoder-decoder model of BERT lost what its decoder's layers look at, and the encoder its gradients."""
    more, reason = MODELS[make]
    results = []
    for quick in (True, False):
        model = make()
        adapters = loralab.attach(model, "lora", rank=3, alpha=5.0, targets="all-linear")
        shake(adapters, "default")
        double(model, adapters)
        if quick:
            choices = prepare(model)
        results.append(passed(model, {"input_ids": ids(), "attention_mask": pads("right"), **more}))
    alike(*results)
    assert any(grad.abs().max() > 0 for key, grad in results[0][1].items() if "encoder.layer.0." in key)
    assert reason in {choice.piece: choice for choice in choices}["block"].reason


# ---- checkpointing, copies, the way back -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DROPS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout_gives_the_gradient_of_the_loss_whatever_else_learns(kind, reentrant):
    """A norm that learns sends layers to their own forward, in the first run of checkpointing as in the second."""
    model, _, _ = made(kind, True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.3
    for key, p in model.named_parameters():
        if "norm" in key.lower():
            p.requires_grad_(True)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()

    def loss():
        torch.manual_seed(5)
        logits = model(**given(kind, attention_mask=pads("right"))).logits
        return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()).sum()

    loss().backward()
    learned = [p for p in model.parameters() if p.grad is not None]
    steps = [torch.randn(p.shape, generator=torch.Generator().manual_seed(9)).double() for p in learned]
    slope = sum((p.grad * step).sum() for p, step in zip(learned, steps, strict=True)).item()
    losses = []
    with torch.no_grad():
        for by in (1e-6, -2e-6):
            for p, step in zip(learned, steps, strict=True):
                p.add_(step, alpha=by)
            losses.append(loss().item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


# ---- more than a gradient --------------------------------------------------------------------------------------------


def hessian_product(model, loss, learned):
    first = torch.autograd.grad(loss(), learned, create_graph=True, allow_unused=True)
    used = [grad for grad in first if grad is not None]
    torch.autograd.grad(used, learned, [torch.ones_like(grad) for grad in used], allow_unused=True)


def penalty(model, loss, learned):
    first = torch.autograd.grad(loss(), learned, create_graph=True, allow_unused=True)
    sum(grad.square().sum() for grad in first if grad is not None).backward()


def hessian_of_inputs(model, loss, learned):
    x = model.get_input_embeddings()(ids()).detach()
    torch.autograd.functional.vhp(loss, x, torch.ones_like(x))


def many_gradients(model, loss, learned):
    torch.autograd.grad(torch.stack([loss(), 2 * loss()]), learned, torch.eye(2), is_grads_batched=True)


def forward_mode(model, loss, learned):
    x = model.get_input_embeddings()(ids()).detach()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize("kind", ["bert", "mpnet", "albert", "modernbert", "llama"])
@pytest.mark.parametrize("ask", [hessian_product, penalty, hessian_of_inputs, many_gradients, forward_mode])
def test_more_than_a_gradient_is_right_or_refused(kind, ask):
    """A product with the Hessian was zero, or what lies outside of layers gave alone."""
    found = []
    for quick in (True, False):
        model, adapters, _ = made(kind, quick)
        model.set_attn_implementation("eager")
        more = {key: value for key, value in given(kind).items() if key != "input_ids"}

        def loss(x=None, model=model, more=more):
            words = {"input_ids": ids()} if x is None else {"inputs_embeds": x}
            return model(**words, **more).logits.square().sum()

        learned = [p for p in model.parameters() if p.requires_grad]
        if quick and ask is not forward_mode:
            with pytest.raises(loralab.UserError, match=r"=True: the fast path .* adapters[.]fast\(speed=\"off\"\)"):
                ask(model, loss, learned)
            adapters.fast(speed="off", quiet=True)
        found.append(ask(model, loss, learned))
    if ask is forward_mode:
        torch.testing.assert_close(*found, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "modernbert", "llama"])
def test_pickles_are_fast_and_weights_that_are_laid_anew_without_gradients_learn(kind):
    model, _, _ = made(kind, True)
    batch = given(kind, attention_mask=pads("right"))
    before = passed(model, batch)
    again = pickle.loads(pickle.dumps(model))
    again.eval()
    with torch.inference_mode():
        again(**batch)
    assert not any(p.is_inference() for p in again.parameters())
    alike(passed(again, batch), before)
    assert [layer.__dict__["forward"].why_plain() for layer in layers_of(again)] == [None] * len(layers_of(model))
    prepare(again, speed="off")
    alike(passed(again, batch), before)


def test_off_is_the_way_back_from_everything(monkeypatch):
    monkeypatch.setattr("loralab.fast.COMPILER", "eager")
    model, adapters, _ = made("bert", False)
    batch = given("bert")
    before = passed(model, batch)
    for speed in ("auto", "compile"):
        adapters.fast("float32", quiet=True, speed=speed)
        assert (model._compiled_call_impl is not None) == (speed == "compile")
    choices = adapters.fast("float32", quiet=True, speed="off")
    assert not any(choice.used for choice in choices)
    assert model._compiled_call_impl is None
    assert not any("forward" in vars(module) for module in model.modules())
    logits, gradients = passed(model, batch)
    assert torch.equal(logits, before[0])
    assert all(torch.equal(grad, before[1][key]) for key, grad in gradients.items())
