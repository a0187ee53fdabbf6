"""The matrix products that a training step needs, and their operations, from shapes.

A product (n, i) x (i, o) is 2 n i o operations. Backward repeats it for the gradient of its input, and again for that
of its weight, each only where that gradient is needed. Half the operations, of n rows:

    W      n i o        + n i o if x needs a gradient            + n i o if W is trained
    A, B   n r (i + o)  + n r o if A, d or x needs one + n r i if x does   + n r o if B is trained + n r i if A is
    gain   r i o + r r (i + o), the norm of W + B A, a constant to autograd
    s = q k^T, c = s v of each head: n t d each, and again for each of q, k, s, v that needs a gradient

This is what the method needs, not what an implementation does, so it is the same number for both backends.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from loralab.adapters import Adapters
from loralab.layer import Adapted
from loralab.presets import attentions
from loralab.recipe import Recipe


@dataclass(frozen=True)
class Call:
    """One call of a linear layer."""

    rows: int  # n
    input_grad: bool  # whether its input carries a gradient
    output_grad: bool  # whether its output does
    shape: tuple[int, ...]  # of its output, (b, t, d)


class Product(NamedTuple):
    """A product (n, k) x (k, m), or a batch of them."""

    batch: int
    n: int
    k: int
    m: int
    form: Literal["nn", "nt", "tn"]  # which of the two lies transposed in memory

    @property
    def operations(self) -> int:
        """Floating-point operations of all of the batch."""
        return 2 * self.batch * self.n * self.k * self.m


def step_flops(adapters: Adapters, inputs: dict[str, Tensor]) -> int:
    """Operations of the products of one step on `inputs`, for a model without the fast path, whose hooks run."""
    return sum(product.operations * count for product, count in step_products(adapters, inputs).items())


def step_products(adapters: Adapters, inputs: dict[str, Tensor]) -> Counter[Product]:
    """How often one step on `inputs` needs each product, for a model without the fast path, whose hooks run."""
    model = adapters.model
    calls: dict[str, list[Call]] = {}  # a layer may be called at every depth
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | Adapted)}
    hooks = [m.register_forward_hook(_recorder(calls, path)) for path, m in layers.items()]
    try:
        model(**{key: t for key, t in inputs.items() if key != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    spec = adapters.spec(None)
    adapted = set(spec.paths) if spec.recipe.factors is not None else set()
    found: Counter[Product] = Counter()
    for path, own in calls.items():
        for call in own:
            found.update(_weight(call, layers[path]))
            if path in adapted:
                found.update(_adapter(call, layers[path], spec.recipe.at(path)))
    found.update(_attention(calls, model))
    return found


def _recorder(calls: dict[str, list[Call]], path: str) -> Any:
    """A forward hook that writes down a call of the layer at `path`."""

    def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0]  # (..., in)
        call = Call(x[..., 0].numel(), x.requires_grad, out.requires_grad, tuple(out.shape))
        calls.setdefault(path, []).append(call)

    return record


def _weight(call: Call, layer: nn.Linear | Adapted) -> Iterator[Product]:
    trained = isinstance(layer, nn.Linear) and layer.weight.requires_grad  # an adapted one is frozen
    return _linear(call.rows, layer.in_features, layer.out_features, call.input_grad, trained)


def _linear(n: int, i: int, o: int, to_input: bool, to_weight: bool) -> Iterator[Product]:
    """Of y (n, o) = x W^T: y, and where they are wanted the gradients of x (n, i) and of W (o, i)."""
    yield Product(1, n, i, o, "nt")
    if to_input:
        yield Product(1, n, o, i, "nn")
    if to_weight:
        yield Product(1, o, n, i, "tn")


def _adapter(call: Call, layer: Adapted, recipe: Recipe) -> Iterator[Product]:
    n, i, o, r = call.rows, layer.in_features, layer.out_features, getattr(recipe.factors, "rank", 0)
    trained = set(recipe.learn)
    yield from _linear(n, i, r, call.input_grad, "A" in trained)
    yield from _linear(n, r, o, call.input_grad or bool(trained & {"A", "d"}), "B" in trained)
    if recipe.gain:
        yield from (Product(1, o, i, r, "nt"), Product(1, r, i, r, "nt"), Product(1, r, o, r, "tn"))


def _attention(calls: dict[str, list[Call]], model: nn.Module) -> Iterator[Product]:
    """The scores and their product with v; none where one layer makes q, k and v."""
    heads = getattr(model.config, "num_attention_heads", 1)
    for own in attentions(model).values():
        if len(set(own.values())) == 3:
            for q, k, v in zip(*(calls.get(own[part], ()) for part in ("q", "k", "v")), strict=True):
                yield from _scores(q, k, v, heads)


def _scores(q: Call, k: Call, v: Call, heads: int) -> Iterator[Product]:
    """Of s = q k^T and c = s v of each head, and of the gradients that are wanted."""
    b, t, d = q.shape
    size, batch = d // heads, b * heads
    to_s = q.output_grad or k.output_grad
    yield Product(batch, t, size, t, "nt")  # s
    yield Product(batch, t, t, size, "nn")  # c
    if to_s:
        yield Product(batch, t, size, t, "nt")
    for wanted, form in ((q.output_grad, "nn"), (k.output_grad, "tn"), (v.output_grad, "tn")):
        if wanted:
            yield Product(batch, t, t, size, form)  # type: ignore[arg-type]
