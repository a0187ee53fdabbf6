"""How much multiplication a training step needs, from shapes.

A product (n, i) x (i, o) is 2 n i o operations. Backward it is done again for the gradient of what comes in, and again
for that of the weight, each only where that is wanted:

    W      n i o        + n i o if x is learned from         + n i o if W learns
    A, B   n r (i + o)  + n r o if A, d or x want it + n r i if x does     + n r o for B, + n r i for A
    gain   r i o + r r (i + o), the norm of W + B A, a constant to autograd
    s = q k^T, c = s v of each head: n t d each, and again for each of q, k, s, v that wants a gradient

It counts what the method needs, not what an implementation does, so it is the same number for both sides.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loralab.adapters import Adapters
from loralab.layer import Adapted
from loralab.recipe import Recipe
from loralab.targets import LAYERS


@dataclass(frozen=True)
class Seen:
    """One call of a linear layer."""

    rows: int  # n
    wants: bool  # whether its input carries a gradient
    gives: bool  # whether its output does
    shape: tuple[int, ...]  # of its output, (b, t, d)


def needed(adapters: Adapters, inputs: dict[str, Tensor]) -> int:
    """Operations of the products of one step; run on a plain model, where every layer is called."""
    model = adapters.model
    seen: dict[str, Seen] = {}
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | Adapted)}
    hooks = [m.register_forward_hook(_look(seen, path)) for path, m in layers.items()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    entry = adapters.spec(None)
    total = sum(_weight(call, layers[path]) for path, call in seen.items())
    if entry.recipe.factors is not None:
        total += sum(_adapter(seen[path], layers[path], entry.recipe.at(path)) for path in entry.paths if path in seen)
    return total + _attention(seen, model.config)


def _look(seen: dict[str, Seen], path: str) -> Any:
    def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0]
        seen[path] = Seen(x[..., 0].numel(), x.requires_grad, out.requires_grad, tuple(out.shape))

    return look


def _weight(call: Seen, layer: nn.Linear | Adapted) -> int:
    learns = isinstance(layer, nn.Linear) and layer.weight.requires_grad  # an adapted one is frozen
    return 2 * call.rows * layer.in_features * layer.out_features * (1 + call.wants + learns)


def _adapter(call: Seen, layer: Adapted, recipe: Recipe) -> int:
    n, i, o, r = call.rows, layer.in_features, layer.out_features, getattr(recipe.factors, "rank", 0)
    learns = set(recipe.learn)
    down = n * r * i * (1 + call.wants + ("A" in learns))
    up = n * r * o * (1 + (call.wants or bool(learns & {"A", "d"})) + ("B" in learns))
    norm = r * i * o + r * r * (i + o) if recipe.gain else 0
    return 2 * (down + up + norm)


def _attention(seen: dict[str, Seen], config: Any) -> int:
    """Of the scores and of their sum over v; an encoder whose q, k and v are not known counts none."""
    parts = LAYERS.get(config.model_type, {})
    ends = [parts.get(part, ("",))[0] for part in ("q", "k", "v")]
    total = 0
    for path in seen:
        if ends[0] and path.endswith(ends[0]):
            stem = path.removesuffix(ends[0])
            q, k, v = (seen[stem + end] for end in ends)
            b, t, d = q.shape
            scores = 1 + q.gives + k.gives
            context = 1 + (q.gives or k.gives) + v.gives
            total += 2 * b * t * t * d * (scores + context)
    return total
