"""Where the encoders of transformers keep the parts of a layer. An architecture is one row of LAYERS."""

from collections.abc import Callable
from typing import Any

from torch import nn

from loralab.active import Active
from loralab.fast.block import Block, Parts

GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}  # name -> torch's variant


def _bert(layer: Any, config: Any, active: Active) -> Block:
    inner, attention = layer.attention.self, layer.attention.output
    drops = (inner.dropout.p, attention.dropout.p, layer.output.dropout.p)
    parts = (inner.query, inner.key, inner.value, attention.dense, attention.LayerNorm)
    return Block(layer, active, Parts(*parts, *_rest(layer, config), drops))


def _mpnet(layer: Any, config: Any, active: Active) -> Block:
    inner = layer.attention.attn
    drops = (inner.dropout.p, layer.attention.dropout.p, layer.output.dropout.p)
    parts = (inner.q, inner.k, inner.v, inner.o, layer.attention.LayerNorm)
    return Block(layer, active, Parts(*parts, *_rest(layer, config), drops), lambda out: (out,))


def _distilbert(layer: Any, config: Any, active: Active) -> Block:
    inner, ffn = layer.attention, layer.ffn
    drops = (inner.dropout.p, 0.0, ffn.dropout.p)
    parts = (inner.q_lin, inner.k_lin, inner.v_lin, inner.out_lin, layer.sa_layer_norm)
    rest = (ffn.lin1, ffn.lin2, layer.output_layer_norm, config.n_heads, GELU[config.activation])
    return Block(layer, active, Parts(*parts, *rest, drops))


def _rest(layer: Any, config: Any) -> tuple[Any, Any, Any, int, str]:
    """The feed-forward part and the numbers, which BERT and MPNet call the same."""
    linear = (layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)
    return (*linear, config.num_attention_heads, GELU[config.hidden_act])


LAYERS: dict[str, Callable[[Any, Any, Active], Block]] = {  # class of a layer -> how to find its parts
    "BertLayer": _bert,
    "RobertaLayer": _bert,
    "XLMRobertaLayer": _bert,
    "CamembertLayer": _bert,
    "ElectraLayer": _bert,
    "MPNetLayer": _mpnet,
    "TransformerBlock": _distilbert,
}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers encoder that a `Block` can take the place of."""
    config = getattr(model, "config", None)
    if getattr(config, "is_decoder", False) or getattr(config, "chunk_size_feed_forward", 0):
        return []
    if getattr(config, "hidden_act", getattr(config, "activation", None)) not in GELU:
        return []
    ours = [m for m in model.modules() if type(m).__module__.startswith("transformers.models.")]
    return [m for m in ours if type(m).__name__ in LAYERS]
