"""Operations of the matrix products that a training step needs, counted from shapes.

A product (n, i) x (i, o) is 2 n i o operations. Backward repeats it for the gradient of its input, and again for that
of its weight, each only where that gradient is needed. Half the operations, of n rows:

    W      n i o        + n i o if x needs a gradient            + n i o if W is trained
    A, B   n r (i + o)  + n r o if A, d or x needs one + n r i if x does   + n r o if B is trained + n r i if A is
    gain   r i o + r r (i + o), the norm of W + B A, a constant to autograd
    s = q k^T, c = s v of each head: n t d each, and again for each of q, k, s, v that needs a gradient

This is what the method needs, not what an implementation does, so it is the same number for both backends.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loralab.adapters import Adapters
from loralab.layer import Adapted
from loralab.presets import LAYERS
from loralab.recipe import Recipe


@dataclass(frozen=True)
class Call:
    """One call of a linear layer."""

    rows: int  # n
    input_grad: bool  # whether its input carries a gradient
    output_grad: bool  # whether its output does
    shape: tuple[int, ...]  # of its output, (b, t, d)


def step_flops(adapters: Adapters, inputs: dict[str, Tensor]) -> int:
    """Operations of the products of one step on `inputs`, for a model without the fast path, whose hooks run."""
    model = adapters.model
    calls: dict[str, Call] = {}
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | Adapted)}
    hooks = [m.register_forward_hook(_recorder(calls, path)) for path, m in layers.items()]
    try:
        model(**{key: t for key, t in inputs.items() if key != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    spec = adapters.spec(None)
    total = sum(_weight(call, layers[path]) for path, call in calls.items())
    if spec.recipe.factors is not None:
        total += sum(_adapter(calls[path], layers[path], spec.recipe.at(path)) for path in spec.paths if path in calls)
    return total + _attention(calls, model.config)


def _recorder(calls: dict[str, Call], path: str) -> Any:
    """A forward hook that writes down a call of the layer at `path`."""

    def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0]  # (..., in)
        calls[path] = Call(x[..., 0].numel(), x.requires_grad, out.requires_grad, tuple(out.shape))

    return record


def _weight(call: Call, layer: nn.Linear | Adapted) -> int:
    trained = isinstance(layer, nn.Linear) and layer.weight.requires_grad  # an adapted one is frozen
    return 2 * call.rows * layer.in_features * layer.out_features * (1 + call.input_grad + trained)


def _adapter(call: Call, layer: Adapted, recipe: Recipe) -> int:
    n, i, o, r = call.rows, layer.in_features, layer.out_features, getattr(recipe.factors, "rank", 0)
    trained = set(recipe.learn)
    down = n * r * i * (1 + call.input_grad + ("A" in trained))
    up = n * r * o * (1 + (call.input_grad or bool(trained & {"A", "d"})) + ("B" in trained))
    norm = r * i * o + r * r * (i + o) if recipe.gain else 0
    return 2 * (down + up + norm)


def _attention(calls: dict[str, Call], config: Any) -> int:
    """The scores and their product with v; 0 for an encoder whose q, k and v are not known."""
    layers = LAYERS.get(config.model_type, {})
    ends = [layers.get(role, ("",))[0] for role in ("q", "k", "v")]
    total = 0
    for path in calls:
        if ends[0] and path.endswith(ends[0]):
            stem = path.removesuffix(ends[0])
            q, k, v = (calls[stem + end] for end in ends)
            b, t, d = q.shape
            scores = 1 + q.output_grad + k.output_grad
            context = 1 + (q.output_grad or k.output_grad) + v.output_grad
            total += 2 * b * t * t * d * (scores + context)
    return total
