"""Code that somebody puts in the place of what a layer calls: the layer computes itself with it, and says so."""

import functools
import sys

import pytest
import torch
from test_fast_calls import alike, given, made, pads, passed
from test_fast_decoders import exact  # noqa: F401
from test_fast_encoders import exact as exact_positions  # noqa: F401
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.glm import modeling_glm

from loralab.fast.layers import layers_of

pytestmark = pytest.mark.usefixtures("exact")


def louder(function, wraps=False):
    """A function that gives half as much again, of all it gives or of the first of several."""

    def loud(*args, **kwargs):
        out = function(*args, **kwargs)
        return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

    return functools.wraps(function)(loud) if wraps else loud


def file_of(model):
    return sys.modules[type(layers_of(model)[1]).__module__]


def in_its_file(name, wraps=False):
    def put(model, patch):
        patch.setattr(file_of(model), name, louder(getattr(file_of(model), name), wraps))

    return put


def in_torch(name):
    return lambda model, patch: patch.setattr(F, name, louder(getattr(F, name)))


def of_its_class(name, wraps=False):
    def put(model, patch):
        kind = type(layers_of(model)[1])
        patch.setattr(kind, name, louder(getattr(kind, name), wraps))

    return put


def of_one_layer(name):
    def put(model, patch):
        layer = layers_of(model)[1]
        patch.setattr(layer, name, louder(getattr(layer, name), wraps=True), raising=False)

    return put


def norms(model, patch):
    kind = type(layers_of(model)[1].input_layernorm)
    patch.setattr(kind, "forward", louder(kind.forward, wraps=True))


def attention(name):
    def put(model, patch):
        table = file_of(model).ALL_ATTENTION_FUNCTIONS
        patch.setitem(
            AttentionInterface._global_mapping, name, louder(table.get(name, file_of(model).eager_attention_forward))
        )
        model.set_attn_implementation(name)

    return put


def attention_of_its_file(model, patch):
    table = file_of(model).ALL_ATTENTION_FUNCTIONS
    patch.setitem(table._local_mapping, "sdpa", louder(table["sdpa"]))


def of_another_family(model, patch):
    """Rotates neighbours, where Llama rotates halves."""
    patch.setattr(file_of(model), "apply_rotary_pos_emb", modeling_glm.apply_rotary_pos_emb)


class Loud(AttentionInterface):
    """A table whose attentions give half as much again."""

    def get_interface(self, name, default):
        return louder(super().get_interface(name, default))


def table_of_its_file(model, patch):
    patch.setattr(file_of(model), "ALL_ATTENTION_FUNCTIONS", Loud())


def how_the_table_is_asked(model, patch):
    ask = AttentionInterface.get_interface
    patch.setattr(AttentionInterface, "get_interface", lambda *args: louder(ask(*args)))


def call_of_a_part(model, patch):
    layer = layers_of(model)[1]
    kind = type(layer.mlp if hasattr(layer, "mlp") else layer.output)
    patch.setattr(kind, "__call__", louder(kind.__call__))


def products_under_eager(model, patch):
    model.set_attn_implementation("eager")
    patch.setattr(torch, "matmul", louder(torch.matmul))


HERE = "is a function of test_fast_code"
ROTATED = ("llama", "mistral", "qwen3", "gemma", "modernbert")
WITH_A_TABLE = ("llama", "qwen3", "bert", "distilbert", "albert", "modernbert")
CASES = {  # what is replaced -> by what, in which models, and what the layer says
    "positions": (in_its_file("apply_rotary_pos_emb"), ROTATED, f"apply_rotary_pos_emb, which it calls, {HERE}"),
    "positions by a wrapper": (in_its_file("apply_rotary_pos_emb", wraps=True), ROTATED, HERE),
    "half of the positions": (in_its_file("rotate_half"), ("llama", "gemma"), f"rotate_half, which it calls, {HERE}"),
    "positions of another family": (of_another_family, ("llama", "mistral"), "transformers.models.glm.modeling_glm"),
    "torch's attention": (in_torch("scaled_dot_product_attention"), WITH_A_TABLE, HERE),
    "torch's norms": (in_torch("layer_norm"), ("bert", "mpnet", "modernbert"), f"layer_norm, which it calls, {HERE}"),
    "torch's softmax": (in_torch("softmax"), ("mpnet",), f"softmax, which it calls, {HERE}"),
    "sdpa for all": (attention("sdpa"), WITH_A_TABLE, f"sdpa, which it calls, {HERE}"),
    "sdpa for one file": (attention_of_its_file, WITH_A_TABLE, f"sdpa, which it calls, {HERE}"),
    "eager for all": (attention("eager"), WITH_A_TABLE, f"eager, which it calls, {HERE}"),
    "the table of one file": (table_of_its_file, WITH_A_TABLE, "ALL_ATTENTION_FUNCTIONS, which it calls"),
    "how the table is asked": (how_the_table_is_asked, WITH_A_TABLE, f"get_interface, which it calls, {HERE}"),
    "__call__ of a part": (call_of_a_part, ("bert", "llama", "gemma", "modernbert"), "has a __call__ of its own"),
    "products under eager": (products_under_eager, ("bert", "llama"), f"matmul, which it calls, {HERE}"),
    "what a layer calls": (in_its_file("apply_chunking_to_forward", wraps=True), ("bert", "roberta", "albert"), HERE),
    "a method": (of_its_class("feed_forward_chunk", wraps=True), ("bert", "roberta", "electra"), HERE),
    "another method": (of_its_class("ff_chunk", wraps=True), ("albert",), HERE),
    "a method of one layer": (of_one_layer("feed_forward_chunk"), ("bert", "roberta"), HERE),
    "forward of a class by a wrapper": (norms, ("llama", "gemma"), "has a forward of its own"),
}


@pytest.mark.few(20)
@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, row in CASES.items() for kind in row[1]])
@pytest.mark.parametrize("when", ["before", "after"])
def test_code_that_replaces_what_a_layer_calls_is_run(case, kind, when, monkeypatch):
    put, _, why = CASES[case]
    batch = given(kind, attention_mask=pads("right"))
    untouched = passed(made(kind, False)[0], batch)
    results = []
    for quick in (True, False):
        model, adapters, _ = made(kind, quick and when == "after")
        if quick and when == "after":
            passed(model, batch)
        with monkeypatch.context() as patch:
            put(model, patch)
            if quick and when == "before":
                adapters.fast("float32", quiet=True)
            results.append(passed(model, batch))
            if quick:
                assert why in layers_of(model)[1].__dict__["forward"].why_plain().text
        model.set_attn_implementation("sdpa") if "eager" in case else None
        alike(passed(model, batch), untouched)  # and it is fast again
        if quick:
            assert layers_of(model)[1].__dict__["forward"].why_plain() is None
    alike(*results)
    assert not results[0][0].equal(untouched[0])


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_compiled_functions_of_transformers_are_its_own(kind, monkeypatch):
    """torch.compile computes the same, so the layer stays fast."""
    model, _, _ = made(kind, True)
    batch = given(kind, attention_mask=pads("right"))
    expected = passed(model, batch)
    function = file_of(model).apply_rotary_pos_emb
    monkeypatch.setattr(file_of(model), "apply_rotary_pos_emb", torch.compile(function, backend="eager"))
    alike(passed(model, batch), expected)
    assert [layer.__dict__["forward"].why_plain() for layer in layers_of(model)] == [None] * len(layers_of(model))
