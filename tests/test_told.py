"""Weights that several layers have, and targets that do nothing or are no layers: all are told."""

import warnings

import pytest
import torch
import zoo

import loralab
from loralab.reach import tied_to

TIED = ["t5", "bart", "switch_transformers", "pegasus", "gpt2", "gemma"]  # the last two have two layers, not four
TOKENS = [7, 9, 40]


def answer(model, name):
    inputs = zoo.INPUTS[zoo.ROWS[name].inputs]()
    inputs |= {key: torch.where(t % 3 == 0, 9, t) for key, t in inputs.items() if key.endswith("input_ids")}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", TIED)
def test_single_tokens_change_in_every_layer_that_has_the_table(name):
    model, right = zoo.build(name), zoo.build(name)
    adapters = loralab.attach(model, "lora", rank=2, targets="attention-q", tokens=TOKENS)
    model.double()
    key = next(key for key in adapters.state() if key.endswith(".D"))  # one tensor, under each of the layers
    D = torch.randn(3, adapters.state()[key].shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        adapters.state()[key].copy_(D)
        right.get_input_embeddings().weight[TOKENS] += D
    right.tie_weights()
    torch.testing.assert_close(answer(model, name), answer(right, name), rtol=0, atol=1e-9)
    assert (answer(right, name) - answer(zoo.build(name), name)).abs().max() > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was one stays one, so nothing is untied
        plain = adapters.merge()
    torch.testing.assert_close(answer(plain, name), answer(right, name), rtol=0, atol=1e-9)
    words = plain.get_input_embeddings().weight
    others = [key for key, p in plain.named_parameters(remove_duplicate=False) if p is words]
    assert len(others) == 1 + len(tied_to(zoo.build(name), others[0].removesuffix(".weight")))


def told(name, targets):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        loralab.attach(zoo.build(name), "lora", rank=2, targets=targets)
    return [str(note.message) for note in notes if "does nothing by itself" in str(note.message)]


@pytest.mark.parametrize(
    ("name", "targets", "twins"),
    [
        ("t5", ["shared", "q"], "encoder.embed_tokens, decoder.embed_tokens"),
        ("bart", ["shared"], "model.encoder.embed_tokens, model.decoder.embed_tokens"),
        ("t5", ["shared", "decoder.embed_tokens"], "encoder.embed_tokens"),
        ("t5", ["shared", "embed_tokens"], None),
        ("bart", ["embed_tokens"], None),
        ("gpt2", ["wte"], None),
        ("gemma", ["embed_tokens"], None),
        ("bert", ["word_embeddings"], None),
    ],
)
def test_a_table_that_only_others_are_made_of_is_told(name, targets, twins):
    notes = told(name, targets)
    assert len(notes) == (twins is not None)
    assert all(note.endswith(f"name {twins}") for note in notes)
    model = zoo.build(name)
    before = answer(model, name) if twins and "q" not in targets and len(targets) == 1 else None
    if before is not None:  # the reason to tell it
        adapters = loralab.attach(model, "lora", rank=2, targets=targets)
        with torch.no_grad():
            for t in adapters.state().values():
                t.add_(1.0)
        assert torch.equal(answer(model.double(), name), before)


def test_a_model_without_linear_layers_says_what_it_has():
    with pytest.raises(
        loralab.UserError, match=r"no linear layer in the backbone of ResNet.*, which has resnet\.embed"
    ):
        loralab.attach(zoo.build("resnet"), "lora", rank=2)


@pytest.mark.parametrize(
    ("name", "target", "told"),
    [
        ("llama", "input_layernorm", r"input_layernorm \(2\) is LlamaRMSNorm, no layer that multiplies by a matrix"),
        ("llama", "self_attn", r"is LlamaAttention, a module around layers: name k_proj, o_proj, q_proj, v_proj"),
        ("bert", "encoder.layer.0", "is BertLayer, a module around layers: name dense, key, query, value"),
        ("vit", "dropout", "no layer that multiplies by a matrix"),
        ("llama", "self_atn", "match no layer"),
    ],
)
def test_a_target_that_is_there_and_cannot_be_adapted_says_what_it_is(name, target, told):
    with pytest.raises(loralab.UserError, match=told):
        loralab.attach(zoo.build(name), "lora", rank=2, targets=[target])
