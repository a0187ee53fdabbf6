"""Where the decoders of transformers keep the parts of a layer. An architecture is one row of LAYERS."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from loralab.fast.decoder_layer import ACTIVATIONS, DecoderModules, Norm

NORMS = {  # class of an RMSNorm in transformers -> what it adds to its weight
    "LlamaRMSNorm": 0.0,
    "MistralRMSNorm": 0.0,
    "Qwen2RMSNorm": 0.0,
    "Qwen3RMSNorm": 0.0,
    "GemmaRMSNorm": 1.0,
}


def _llama(layer: Any, head_norms: bool = False) -> DecoderModules:
    attention, mlp = layer.self_attn, layer.mlp
    if (name := type(mlp.act_fn).__name__) not in ACTIVATIONS:
        raise KeyError(f"its activation is a {name}")
    if not attention.is_causal:
        raise KeyError("its attention is not causal")
    return DecoderModules(
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        o=attention.o_proj,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        norm1=_norm(layer.input_layernorm),
        norm2=_norm(layer.post_attention_layernorm),
        activation=mlp.act_fn,
        attention=attention,
        head=attention.head_dim,
        scale=attention.scaling,
        q_norm=_norm(attention.q_norm) if head_norms else None,
        k_norm=_norm(attention.k_norm) if head_norms else None,
    )


def _norm(module: Any) -> Norm:
    """An RMSNorm. Raises KeyError for another module."""
    if (name := type(module).__name__) not in NORMS:
        raise KeyError(f"its norm is a {name}")
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module, eps, NORMS[name])


LAYERS: dict[str, Callable[[nn.Module], DecoderModules]] = {  # class of a layer -> how to find its parts
    "LlamaDecoderLayer": _llama,
    "MistralDecoderLayer": _llama,
    "Qwen2DecoderLayer": _llama,
    "Qwen3DecoderLayer": partial(_llama, head_norms=True),
    "GemmaDecoderLayer": _llama,
}
