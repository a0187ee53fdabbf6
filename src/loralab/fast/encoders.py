"""Where the encoders of transformers keep the parts of a layer. An architecture is one row of LAYERS."""

from typing import Any

from torch import nn

from loralab.fast.block import Find
from loralab.fast.encoder_layer import LayerModules
from loralab.fast.pre_norm_layer import PreNormModules

GELU = {  # class of an activation in transformers -> torch's variant
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "GELUTanh": "tanh",
}


def _bert(layer: Any) -> LayerModules:
    inner, output = layer.attention.self, layer.attention.output
    _refuse_decoders_and_chunks(layer, inner)
    return LayerModules(
        q=inner.query,
        k=inner.key,
        v=inner.value,
        o=output.dense,
        norm1=output.LayerNorm,
        heads=inner.num_attention_heads,
        scale=inner.scaling,
        attention_dropout=inner.dropout,
        attention=inner,
        o_dropout=output.dropout,
        **_feed_forward(layer),
    )


def _mpnet(layer: Any) -> LayerModules:
    inner = layer.attention.attn
    return LayerModules(
        q=inner.q,
        k=inner.k,
        v=inner.v,
        o=inner.o,
        norm1=layer.attention.LayerNorm,
        heads=inner.num_attention_heads,
        scale=inner.attention_head_size**-0.5,
        attention_dropout=inner.dropout,
        attention=inner.dropout,
        o_dropout=layer.attention.dropout,
        position_bias=True,
        returns_tuple=True,
        **_feed_forward(layer),
    )


def _distilbert(layer: Any) -> LayerModules:
    inner, ffn = layer.attention, layer.ffn
    _refuse_decoders_and_chunks(ffn, inner)
    return LayerModules(
        q=inner.q_lin,
        k=inner.k_lin,
        v=inner.v_lin,
        o=inner.out_lin,
        norm1=layer.sa_layer_norm,
        up=ffn.lin1,
        down=ffn.lin2,
        norm2=layer.output_layer_norm,
        activation=ffn.activation,
        heads=inner.n_heads,
        scale=inner.scaling,
        attention_dropout=inner.dropout,
        attention=inner,
        o_dropout=None,
        down_dropout=ffn.dropout,
        approximate=_approximate(ffn.activation),
    )


def _albert(layer: Any) -> LayerModules:
    """One layer that the model calls at every depth."""
    inner = layer.attention
    _refuse_decoders_and_chunks(layer, inner)
    return LayerModules(
        q=inner.query,
        k=inner.key,
        v=inner.value,
        o=inner.dense,
        norm1=inner.LayerNorm,
        up=layer.ffn,
        down=layer.ffn_output,
        norm2=layer.full_layer_layer_norm,
        activation=layer.activation,
        heads=inner.num_attention_heads,
        scale=inner.scaling,
        attention_dropout=inner.attention_dropout,
        attention=inner,
        o_dropout=inner.output_dropout,
        down_dropout=None,
        approximate=_approximate(layer.activation),
    )


def _modernbert(layer: Any) -> PreNormModules:
    attention, mlp = layer.attn, layer.mlp
    _refuse_decoders_and_chunks(layer, attention)
    return PreNormModules(
        qkv=attention.Wqkv,
        o=attention.Wo,
        norm1=_unless_identity(layer.attn_norm),
        gate_up=mlp.Wi,
        down=mlp.Wo,
        norm2=layer.mlp_norm,
        activation=mlp.act,
        attention=attention,
        head=attention.head_dim,
        scale=attention.head_dim**-0.5,
        o_dropout=_unless_identity(attention.out_drop),
        down_dropout=mlp.drop,
        approximate=_approximate(mlp.act),
    )


def _refuse_decoders_and_chunks(layer: Any, attention: Any) -> None:
    """Raise KeyError for a layer of a decoder, or one whose feed-forward part, of which `layer` knows, is in chunks."""
    if getattr(layer, "is_decoder", False):
        raise KeyError("it is a layer of a decoder")
    if getattr(attention, "is_causal", False):
        raise KeyError("its attention is causal")
    if getattr(layer, "chunk_size_feed_forward", 0):
        raise KeyError("it computes its feed-forward part in chunks (chunk_size_feed_forward)")


def _unless_identity(module: Any) -> Any:
    return None if type(module) is nn.Identity else module


def _feed_forward(layer: Any) -> dict[str, Any]:
    """The feed-forward part, which BERT and MPNet call the same."""
    activation = layer.intermediate.intermediate_act_fn
    return {
        "up": layer.intermediate.dense,
        "down": layer.output.dense,
        "norm2": layer.output.LayerNorm,
        "activation": activation,
        "down_dropout": layer.output.dropout,
        "approximate": _approximate(activation),
    }


def _approximate(activation: nn.Module) -> str:
    """torch's variant of GELU that a layer has. Raises KeyError for another activation."""
    name = type(activation).__name__
    if name not in GELU:
        raise KeyError(f"its activation is a {name}")
    return GELU[name]


DISENTANGLED = "its attention also compares contents with positions (disentangled), which a block does not compute"
REFUSED = {"DebertaV2Layer": DISENTANGLED, "DebertaLayer": DISENTANGLED}  # class of a layer -> why no block computes it
LAYERS: dict[str, Find] = {  # class of a layer -> how to find its parts
    "BertLayer": _bert,
    "RobertaLayer": _bert,
    "XLMRobertaLayer": _bert,
    "CamembertLayer": _bert,
    "ElectraLayer": _bert,
    "MPNetLayer": _mpnet,
    "TransformerBlock": _distilbert,
    "AlbertLayer": _albert,
    "ModernBertEncoderLayer": _modernbert,
}
