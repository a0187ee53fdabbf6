"""A decoder's block is the layer it replaces: outputs, gradients, mixed batches, what backward keeps, and when not."""

import sys

import pytest
import torch
from archs import drop_as_blocks, shake, written_in
from test_fast import same
from torch.nn import functional as F
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import loralab
from loralab.fast import prepare, rotary
from loralab.fast.decoders import NORMS
from loralab.fast.layers import layers_of
from loralab.recipe import NAMED

SIZES = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 600, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True, "attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"hidden_activation": "gelu_pytorch_tanh"}),
}
LOW_RANK = [name for name, (row, _) in NAMED.items() if row.factors is not None and row.low_rank and not row.policy]


@pytest.fixture
def exact(monkeypatch):
    """RMSNorm and softmax of transformers round to float32 whatever their input; here they take the input's dtype."""

    norms = NORMS  # of this file, for a function that is as if it stood in another

    def forward(self, x):
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        more = norms[type(self).__name__]
        return (self.weight + more) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    softmax = written_in(F, lambda x, dim, dtype=None: torch.softmax(x, dim))
    monkeypatch.setattr(F, "softmax", softmax)  # likewise in eager attention
    for _, model_class, _ in FAMILIES.values():
        norm = type(build(model_class=model_class).model.norm)
        monkeypatch.setattr(norm, "forward", written_in(sys.modules[norm.__module__], forward))


def build(family="llama", model_class=None):
    row = next(r for name, r in FAMILIES.items() if (r[1] is model_class if model_class else name == family))
    torch.manual_seed(3)
    model = row[1](row[0](**{**SIZES, **row[2]}))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.3)
    return model


def batch(rows=5, tokens=9, padded=True):
    ids = torch.randint(3, 50, (rows, tokens), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    if padded:
        for i in range(1, rows):
            mask[i, tokens - i :] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def adapted(family="llama", method="lora", targets="all-linear", **more):
    model = build(family)
    allowed = vars(NAMED[method][0].factors)
    given = {key: value for key, value in {"rank": 3, "alpha": 5.0}.items() if key in allowed}
    inputs = [{**{key: t for key, t in batch().items() if key != "use_cache"}, "labels": batch()["input_ids"]}]
    adapters = loralab.attach(model, method, targets=targets, batches=inputs, **given, **more)
    shake(adapters, "default")
    model.double()
    for layer in adapters.layers.values():
        for name, constants in layer.constants.items():
            layer.constants[name] = {k: t.double() if t.is_floating_point() else t for k, t in constants.items()}
    return model, adapters


def pass_through(model, adapters, batch, draws=None):
    """(logits of tokens that are no padding, gradients by path.role) of one training pass."""
    if draws is not None:
        torch.manual_seed(draws)
    logits = model.train()(**batch).logits[batch["attention_mask"].bool()]  # (tokens, vocabulary)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (logits * weight).sum().backward()
    return logits, {key: t.grad for key, t in adapters.state().items() if t.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "attention-qv", ".*layers[.]1[.]mlp.*"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_block_is_the_layer_it_replaces(exact, family, targets, padded):
    results = []
    for quick in (False, True):
        model, adapters = adapted(family, targets=targets)
        if quick:
            choices = prepare(model)
            assert {choice.piece: choice.used for choice in choices}["block"]
            assert len(layers_of(model)) == 2
        results.append(pass_through(model, adapters, batch(padded=padded)))
        if quick:
            assert [layer.__dict__["forward"].why_plain() for layer in layers_of(model)] == [None, None]
    same(*results)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_block_takes_the_masks_of_both_attentions(exact, attention):
    results = []
    for quick in (False, True):
        model, adapters = adapted("mistral")
        model.set_attn_implementation(attention)
        if quick:
            prepare(model)
        results.append(pass_through(model, adapters, batch()))
    same(*results)


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_block_takes_every_low_rank_method(exact, method):
    results = []
    for quick in (False, True):
        model, adapters = adapted("llama", method)
        if quick:
            prepare(model)
        adapters.steps.disconnect()  # a rank drawn anew for each model would compare two different functions
        results.append(pass_through(model, adapters, batch()))
    same(*results, 1e-5 if NAMED[method][0].store else 1e-9)  # what is stored in few bits is made anew in float32


def test_a_block_is_the_layer_with_the_same_dropout(exact, monkeypatch):
    drop_as_blocks(monkeypatch)
    results = []
    for quick in (False, True):
        model, adapters = adapted()
        model.set_attn_implementation("eager")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        if quick:
            prepare(model)
        results.append(pass_through(model, adapters, batch(), draws=5))
    same(*results)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_checkpointing_comes_to_the_same(exact, checkpointing):
    results = []
    for quick in (False, True):
        model, adapters = adapted("qwen3")
        if quick:
            prepare(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(pass_through(model, adapters, batch()))
    same(*results)


def test_rows_of_several_adapters_go_through_a_block(exact):
    model, adapters = adapted(method="dora")
    adapters.add("b", "rslora", rank=5)
    shake(adapters, "b", seed=4)
    model.double()
    names, ids = ["default", "b"], [1, 0, 0, 1, 0]

    def mixed():
        with adapters.use(names, ids=ids):
            logits = model(**batch(padded=False)).logits
        learned = [t for name in names for t in adapters.state(name).values()]
        return logits, dict(enumerate(torch.autograd.grad(logits.square().sum(), learned, allow_unused=True)))

    plain = mixed()
    prepare(model)
    same(mixed(), plain)


@torch.no_grad()
def test_without_a_gradient_and_from_the_cache_it_is_the_same(exact):
    model, adapters = adapted("gemma")
    plain = model.eval()(**batch()).logits
    prepare(model)
    with adapters.caching():
        for _ in range(2):
            torch.testing.assert_close(model(**batch()).logits, plain, rtol=0, atol=1e-9)


def test_writing_goes_on_with_the_cache_of_keys(exact):
    """With a cache the layer computes itself, so that what is written is the same."""
    model, _ = adapted()
    model.eval()
    given = {key: t for key, t in batch(rows=2, padded=False).items() if key != "use_cache"}
    before = model.generate(**given, max_new_tokens=6, do_sample=False)
    prepare(model)
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), before)


REFUSED = {  # what is changed -> why the layer computes itself
    "a norm learns": (lambda m: m.model.layers[0].input_layernorm.weight.requires_grad_(), "weight learns"),
    "another activation": (lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.ReLU()), "activation is a ReLU"),
    "a norm of another class": (
        lambda m: setattr(m.model.layers[0], "input_layernorm", torch.nn.RMSNorm(24).double()), "norm is a RMSNorm"
    ),
    "a hook": (lambda m: m.model.layers[0].mlp.register_forward_hook(lambda *_: None), "has a hook"),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_a_layer_that_differs_computes_itself_and_says_why(exact, change):
    make, why = REFUSED[change]
    results = []
    for quick in (False, True):
        model, adapters = adapted()
        if quick:
            prepare(model)
        make(model)
        results.append(pass_through(model, adapters, batch()))
    same(*results)
    first, second = (layer.__dict__["forward"].why_plain() for layer in layers_of(model))
    assert why in first.text
    assert second is None


def test_long_rows_go_through_torchs_attention(exact):
    results = []
    for quick in (False, True):
        model, adapters = adapted()
        if quick:
            prepare(model)
        results.append(pass_through(model, adapters, batch(rows=1, tokens=rotary.LONGEST + 1, padded=False)))
    same(*results)
    assert "tokens" in layers_of(model)[0].__dict__["forward"].why_plain().text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_fewer_bits_it_is_as_near_to_float64_as_the_layer_itself(dtype):
    """Against float64: the block is off by at most one and a half times what the layer itself is off by."""
    exact_model, exact_adapters = adapted()
    right = pass_through(exact_model, exact_adapters, batch())
    off = []
    for quick in (False, True):
        model, adapters = adapted()
        model.to(dtype)
        if quick:
            prepare(model)
        logits, gradients = pass_through(model, adapters, batch())
        errors = [(logits.double() - right[0]).norm() / right[0].norm()]
        errors += [(g.double() - right[1][key]).norm() / right[1][key].norm() for key, g in gradients.items()]
        off.append(torch.stack(errors).detach().mean().item())
    assert off[1] < 1.5 * off[0] + 1e-7, off


@pytest.mark.parametrize("targets", ["all-linear", "attention-qv"])
def test_backward_keeps_less_than_the_layer_itself(targets):
    kept = []
    for quick in (False, True):
        model, _ = adapted(targets=targets)
        if quick:
            prepare(model)
        seen = {}

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.train()(**batch(tokens=12)).logits.sum()
        kept.append(sum(size for key, size in seen.items() if key not in own))
    assert kept[1] < 0.9 * kept[0], kept
