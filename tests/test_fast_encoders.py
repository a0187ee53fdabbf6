"""Blocks of encoders with other layers than BERT's: ALBERT, whose one layer is called at every depth, and ModernBERT,
whose norms come first, with rotary positions, a gated activation and attention within windows.
"""

import copy

import pytest
import torch
from archs import build as build_known
from archs import drop_as_blocks, labelled, rows, shake, written_in
from test_fast import LOW_RANK, double, pass_through, same
from torch.nn import functional as F
from transformers import AlbertConfig, AutoModelForSequenceClassification, ModernBertConfig
from transformers.models.modernbert import modeling_modernbert

import loralab
from loralab.fast import prepare, rotary
from loralab.fast.layers import layers_of
from loralab.recipe import NAMED

SIZES = {"vocab_size": 101, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 37, "num_labels": 3}
CONFIGS = {
    "albert": AlbertConfig(
        **SIZES, embedding_size=17, num_hidden_layers=3, inner_group_num=2, classifier_dropout_prob=0.0
    ),
    "modernbert": ModernBertConfig(
        **SIZES, num_hidden_layers=4, local_attention=4, global_attn_every_n_layers=3, pad_token_id=0,
        attention_bias=True, mlp_bias=True, norm_bias=True, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    ),
}  # fmt: skip
BLOCKS = {"albert": 2, "modernbert": 4}
DROPOUT = {"albert": ("attention_probs", "hidden"), "modernbert": ("attention", "mlp")}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """ModernBERT rotates, and eager attention takes the softmax, in float32 whatever the input; here in its dtype."""

    half = modeling_modernbert.rotate_half

    def rotated(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", written_in(modeling_modernbert, rotated))
    softmax = written_in(F, lambda x, dim, dtype=None: torch.softmax(x, dim))
    monkeypatch.setattr(F, "softmax", softmax)


def build(kind, dropout=0.0, **changes):
    config = copy.deepcopy(CONFIGS[kind])
    for name in DROPOUT[kind]:
        setattr(config, f"{name}_dropout" + "_prob" * (kind == "albert"), dropout)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias") or "norm" in key.lower():
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def adapted(kind, method="lora", targets="all-linear", **more):
    allowed = vars(NAMED[method][0].factors)
    given = {key: value for key, value in {"rank": 3, "alpha": 5.0}.items() if key in allowed}
    model = build(kind, **more)
    adapters = loralab.attach(model, method, targets=targets, head=True, batches=[labelled()], **given)
    shake(adapters, "default")
    double(model, adapters)
    return model, adapters


def reasons(model):
    return [layer.__dict__["forward"].why_plain() for layer in layers_of(model)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", "attention", ".*(layers.1|albert_layers.1).*"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_is_the_layer_it_replaces(kind, targets, attention):
    results = []
    for quick in (False, True):
        model, adapters = adapted(kind, targets=targets)
        model.set_attn_implementation(attention)
        if quick:
            assert {choice.piece: choice.used for choice in prepare(model)}["block"]
            assert len(layers_of(model)) == BLOCKS[kind]
        results.append(pass_through(model, adapters, rows(tokens=9)))
        if quick:
            assert reasons(model) == [None] * BLOCKS[kind]
    same(*results)


def test_windows_are_narrower_than_rows():
    """The mask of a window reaches the block: a token far away changes nothing in a layer of windows alone."""
    outs = []
    for wide in (2, 64):
        model, adapters = adapted("modernbert", global_attn_every_n_layers=100, sliding_window=wide)
        prepare(model)
        outs.append(pass_through(model, adapters, rows(tokens=9))[0])
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_block_takes_every_low_rank_method(method):
    results = []
    for quick in (False, True):
        model, adapters = adapted("modernbert", method)
        if quick:
            prepare(model)
        adapters.steps.disconnect()
        results.append(pass_through(model, adapters, rows()))
    same(*results, 1e-5 if NAMED[method][0].store else 1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_block_is_the_layer_with_the_same_dropout(kind, monkeypatch):
    drop_as_blocks(monkeypatch)
    results = []
    for quick in (False, True):
        model, adapters = adapted(kind, dropout=0.3)
        model.set_attn_implementation("eager")
        if quick:
            prepare(model)
        results.append(pass_through(model, adapters, rows(), draws=5))
        if quick:
            assert reasons(model) == [None] * BLOCKS[kind]
    same(*results)
    model, adapters = adapted(kind)
    assert (pass_through(model, adapters, rows())[0] - results[0][0]).abs().max() > 0.01  # it did drop


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_rows_of_several_adapters_go_through_a_block(kind, method):
    model, adapters = adapted(kind, method)
    adapters.add("b", "rslora", rank=5, head=True)
    shake(adapters, "b", seed=4)
    double(model, adapters)
    names, ids = ["default", "b"], [1, 0, 0, 1, 0]

    def mixed():
        with adapters.use(names, ids=ids):
            logits = model(**rows()).logits
        learned = [t for name in names for t in adapters.state(name).values() if t.requires_grad]
        return logits, dict(enumerate(torch.autograd.grad(logits.square().sum(), learned, allow_unused=True)))

    plain = mixed()
    prepare(model)
    same(mixed(), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_comes_to_the_same_and_draws_the_same_masks(reentrant):
    model, adapters = adapted("modernbert", dropout=0.3)
    prepare(model)
    expected = pass_through(model, adapters, rows(), draws=6)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same(pass_through(model, adapters, rows(), draws=6), expected)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_without_a_gradient_and_from_the_cache_it_is_the_same(kind):
    model, adapters = adapted(kind)
    plain = model.eval()(**rows()).logits
    prepare(model)
    with adapters.caching():
        for _ in range(2):
            torch.testing.assert_close(model(**rows()).logits, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", CONFIGS)
def test_in_fewer_bits_it_is_as_near_to_float64_as_the_layer_itself(kind, dtype):
    """Over several batches: of one, either may be twice as near as the other."""
    off = [0.0, 0.0]
    for seed in range(8):
        right = pass_through(*adapted(kind), rows(seed=seed))
        for quick in (False, True):
            model, adapters = adapted(kind)
            model.to(dtype)
            if quick:
                prepare(model)
            logits, gradients = pass_through(model, adapters, rows(seed=seed))
            errors = [(logits.double() - right[0]).norm() / right[0].norm()]
            errors += [(g.double() - right[1][key]).norm() / right[1][key].norm() for key, g in gradients.items()]
            off[quick] += torch.stack(errors).detach().mean().item()
    assert off[1] < 1.5 * off[0] + 1e-7, off


def test_backward_keeps_less_than_the_layer_itself():
    kept = []
    for quick in (False, True):
        model, _ = adapted("modernbert")
        if quick:
            prepare(model)
        seen = {}

        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.train()(**rows(tokens=12)).logits.sum()
        kept.append(sum(size for key, size in seen.items() if key not in own))
    assert kept[1] < 0.9 * kept[0], kept


def test_long_rows_go_through_torchs_attention(monkeypatch):
    monkeypatch.setattr(rotary, "LONGEST", 8)
    results = []
    for quick in (False, True):
        model, adapters = adapted("modernbert")
        if quick:
            prepare(model)
        results.append(pass_through(model, adapters, rows(tokens=9)))
    same(*results)
    assert "9 tokens" in reasons(model)[0].text


CHANGES = {  # what is changed -> why the layer computes itself
    "a norm learns": (lambda layer: layer.mlp_norm.weight.requires_grad_(), "weight learns"),
    "another norm": (lambda layer: setattr(layer, "attn_norm", torch.nn.RMSNorm(24).double()), "is a RMSNorm"),
    "another activation": (lambda layer: setattr(layer.mlp, "act", torch.nn.ReLU()), "activation is a ReLU"),
    "a hook": (lambda layer: layer.mlp.register_forward_hook(lambda *_: None), "has a hook"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_differs_computes_itself_and_says_why(change):
    make, why = CHANGES[change]
    results = []
    for quick in (False, True):
        model, adapters = adapted("modernbert")
        if quick:
            prepare(model)
        make(model.model.layers[1])
        results.append(pass_through(model, adapters, rows()))
    same(*results)
    found = reasons(model)
    assert why in found[1].text
    assert found[0] is found[2] is None


def test_deberta_says_why_it_has_no_block():
    model = build_known("deberta-v2")
    loralab.attach(model, "lora")
    choice = {choice.piece: choice for choice in prepare(model)}["block"]
    assert not choice.used
    assert "a DebertaV2Layer computes itself: its attention also compares contents with positions" in choice.reason
