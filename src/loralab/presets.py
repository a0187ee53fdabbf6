"""Presets: the parts q, k, v, o and mlp of a model, and what its layers of each part are called.

A row of LAYERS says it for an architecture, by path endings. For any other model the structure does: an attention is a
module whose children bear the usual names of q, k and v, or of all three in one layer; o is the one other linear layer
with it; and mlp are the other linear layers of its block, the smallest numbered module around it that has any. GPT-2
keeps q, k and v in one layer, so any of them means that layer.
"""

from collections.abc import Iterator

from torch import nn

from loralab import kinds
from loralab.coverage import folded
from loralab.errors import UserError
from loralab.layer import Adapted

PRESETS: dict[str, tuple[str, ...]] = {
    "attention-q": ("q",),
    "attention-k": ("k",),
    "attention-v": ("v",),
    "attention-qk": ("q", "k"),
    "attention-qv": ("q", "v"),
    "attention-qkv": ("q", "k", "v"),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("mlp",),
}

_BERT = {
    "q": ("attention.self.query",),
    "k": ("attention.self.key",),
    "v": ("attention.self.value",),
    "o": ("attention.output.dense",),
    "mlp": ("intermediate.dense", "layer.*.output.dense"),
}
_DEBERTA = {
    **_BERT,
    "q": ("attention.self.query_proj",),
    "k": ("attention.self.key_proj",),
    "v": ("attention.self.value_proj",),
}
_MPNET = {
    **_BERT,
    "q": ("attention.attn.q",),
    "k": ("attention.attn.k",),
    "v": ("attention.attn.v",),
    "o": ("attention.attn.o",),
}
_DISTILBERT = {
    "q": ("attention.q_lin",),
    "k": ("attention.k_lin",),
    "v": ("attention.v_lin",),
    "o": ("attention.out_lin",),
    "mlp": ("ffn.lin1", "ffn.lin2"),
}
_GPT2 = {
    "q": ("attn.c_attn",),
    "k": ("attn.c_attn",),
    "v": ("attn.c_attn",),
    "o": ("attn.c_proj",),
    "mlp": ("mlp.c_fc", "mlp.c_proj"),
}
_LLAMA = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
LAYERS: dict[str, dict[str, tuple[str, ...]]] = {  # config.model_type -> part -> path endings, * is one component
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta-v2": _DEBERTA,
    "mpnet": _MPNET,
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "smollm3": _LLAMA,
}

NAMES = {  # part -> what a child of an attention is called
    "q": ("q", "query", "q_proj", "query_proj", "q_lin", "q_linear", "linear_q", "to_q", "wq"),
    "k": ("k", "key", "k_proj", "key_proj", "k_lin", "k_linear", "linear_k", "to_k", "wk"),
    "v": ("v", "value", "v_proj", "value_proj", "v_lin", "v_linear", "linear_v", "to_v", "wv"),
}
FUSED = ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "att_proj", "qkv_linear")  # all three in one layer


def layers_of(model: nn.Module, preset: str) -> list[str]:
    """Path endings of the layers that a preset means in a model, * for one component.

    Raises UserError for a model whose structure does not tell them surely.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    parts = LAYERS.get(kind) if isinstance(kind, str) else None
    if parts is None:
        parts = structure(model)
    if missing := [part for part in PRESETS[preset] if not parts.get(part)]:
        raise UserError(
            f"targets {preset!r}: no preset for model type {kind!r}, and its structure does not tell which layers are "
            f"{', '.join(missing)}; use 'all-linear', a list of layer names or a regular expression"
        )
    return list(dict.fromkeys(ending for part in PRESETS[preset] for ending in parts[part]))


def structure(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Part -> path endings, as the structure of the model tells them; a part that it does not tell surely is empty."""
    linear = [path for path, module in model.named_modules() if _is_linear(module)]
    found: dict[str, dict[str, None]] = {part: {} for part in ("q", "k", "v", "o", "mlp")}
    sure = True
    holders = {path: own for path, module in model.named_modules() if (own := _own(path, module))}
    scopes = {path: _scope(path, own, linear) for path, own in holders.items()}
    of_attention = {p for scope in scopes.values() for p in _inside(scope, linear)}
    for path, own in holders.items():
        for part, layer in own.items():
            found[part][folded(layer)] = None
        rest = [p for p in _inside(scopes[path], linear) if p not in own.values()]
        sure = sure and len(rest) == 1
        found["o"] |= dict.fromkeys(map(folded, rest))
        found["mlp"] |= dict.fromkeys(folded(p) for p in _block(path, linear, of_attention))
    if not sure:
        found["o"] = {}
    return {part: tuple(endings) for part, endings in found.items()}


def _is_linear(module: nn.Module) -> bool:
    return type(module) is Adapted or kinds.is_product(module)


def _own(path: str, module: nn.Module) -> dict[str, str]:
    """Part -> path of the child that has it, of a module that is an attention; else empty."""
    children = {name: f"{path}.{name}".lstrip(".") for name, child in module.named_children() if _is_linear(child)}
    if fused := [place for name, place in children.items() if name in FUSED]:
        return dict.fromkeys(("q", "k", "v"), fused[0])
    own = {part: [place for name, place in children.items() if name in names] for part, names in NAMES.items()}
    return {part: places[0] for part, places in own.items()} if all(own.values()) else {}


def _scope(path: str, own: dict[str, str], linear: list[str]) -> str:
    """The attention around q, k and v: the module that has them, or the one around it if o is there."""
    around = path.rpartition(".")[0]
    if set(_inside(path, linear)) > set(own.values()) or not around or path.rpartition(".")[2].isdecimal():
        return path
    if around.rpartition(".")[2].isdecimal():  # that is a block, with more than an attention in it
        return path
    return around


def _inside(scope: str, linear: list[str]) -> list[str]:
    return [path for path in linear if path.startswith(f"{scope}.")]


def _block(path: str, linear: list[str], of_attention: set[str]) -> list[str]:
    """The linear layers beside attention in the smallest numbered module around it that has any."""
    for scope in _numbered(path):
        if rest := [p for p in _inside(scope, linear) if p not in of_attention]:
            return rest
    return []


def _numbered(path: str) -> Iterator[str]:
    """The modules around a path that are items of a list, the smallest first."""
    names = path.split(".")
    for count in range(len(names) - 1, 0, -1):
        if names[count - 1].isdecimal():
            yield ".".join(names[:count])
