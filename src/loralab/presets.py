"""Presets: the parts q, k, v, o and mlp of a model, and what its layers of each part are called.

The structure of the model says it: an attention is a module whose children bear the usual names of q, k and v, or of
all three in one layer; o is the one other linear layer in that module, or else the one in the module around it; and mlp
are the other linear layers of its block, the smallest numbered module around it that has any. GPT-2 keeps q, k and v in
one layer, so any of them means that layer.
"""

from collections.abc import Collection, Iterator

from torch import nn

from loralab.coverage import folded
from loralab.errors import UserError
from loralab.layer import is_linear, plain_modules

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
    parts = structure(model)
    if missing := [part for part in PRESETS[preset] if not parts.get(part)]:
        raise UserError(
            f"targets {preset!r}: the structure of {type(model).__name__} does not tell which layers are "
            f"{', '.join(missing)}; use 'all-linear', a list of layer names or a regular expression"
        )
    return list(dict.fromkeys(ending for part in PRESETS[preset] for ending in parts[part]))


def structure(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Part -> path endings, as the structure of the model tells them; a part that it does not tell surely is empty."""
    linear = [path for path, module in plain_modules(model) if is_linear(module)]
    found: dict[str, dict[str, None]] = {part: {} for part in ("q", "k", "v", "o", "mlp")}
    holders = attentions(model)
    outputs = {path: _output(path, own.values(), linear) for path, own in holders.items()}
    of_attention = {p for scope, _ in outputs.values() for p in _inside(scope, linear)}
    for path, own in holders.items():
        for part, layer in own.items():
            found[part][folded(layer)] = None
        if output := outputs[path][1]:
            found["o"][folded(output)] = None
        found["mlp"] |= dict.fromkeys(folded(p) for p in _block(path, linear, of_attention))
    if not all(output for _, output in outputs.values()):
        found["o"] = {}
    return {part: tuple(endings) for part, endings in found.items()}


def attentions(model: nn.Module) -> dict[str, dict[str, str]]:
    """Path of each attention -> part q, k, v -> path of the layer that makes it, one layer where it makes all three."""
    return {path: own for path, module in plain_modules(model) if (own := _own(path, module))}


def _own(path: str, module: nn.Module) -> dict[str, str]:
    """Part -> path of the child that has it, of a module that is an attention; else empty."""
    children = {name: f"{path}.{name}".lstrip(".") for name, child in module.named_children() if is_linear(child)}
    if fused := [place for name, place in children.items() if name in FUSED]:
        return dict.fromkeys(("q", "k", "v"), fused[0])
    own = {part: [place for name, place in children.items() if name in names] for part, names in NAMES.items()}
    return {part: places[0] for part, places in own.items()} if all(own.values()) else {}


def _output(path: str, own: Collection[str], linear: list[str]) -> tuple[str, str | None]:
    """The module that is the attention with these q, k and v, theirs or the one around it, and its o if sure."""
    rest = [p for p in _inside(path, linear) if p not in own]
    if len(rest) == 1:
        return path, rest[0]
    around = path.rpartition(".")[0]
    if not around or _is_item(path) or _is_item(around):  # an item of a list is a block, with more than an attention
        return path, None
    outside = [p for p in _inside(around, linear) if not p.startswith(f"{path}.")]
    if len(outside) == 1:
        return around, outside[0]
    return path if rest else around, None


def _is_item(path: str) -> bool:
    return path.rpartition(".")[2].isdecimal()


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
