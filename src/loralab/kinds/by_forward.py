"""A frozen layer whose output its own forward computes, with any weight in the place of its own.

Embeddings, convolutions and subclasses of linear layers are kept this way: y = g * (W x + B A x) + b holds for whatever
`W x` their forward computes, as long as it is linear in W. `disagreement` tries that on a layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loralab.update import Dense, Update, each, gained, merged

TOLERANCE = 1e-3  # of the largest output; a forward that is not linear is off by far more


class ByForward(nn.Module):
    """W (out, in) of a layer in the layer's own shape; the tensors of the layer are shared, not copied."""

    channel = -1  # dimension of an output that counts the rows of W

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, so that it is no submodule
        self.weight: nn.Parameter = layer.weight
        self.bias: Tensor | None = getattr(layer, "bias", None)
        self.out_features, self.in_features = self.dense().shape

    # ---- the shape of the weight, which a kind whose weight is not (out, in) overrides -----------------------------

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight in the layer's own shape as W (out, in)."""
        return weight

    def as_weight(self, W: Tensor) -> Tensor:
        """The inverse of `as_matrix`, of any number of rows."""
        return W

    def after(self, B: Tensor, z: Tensor) -> Tensor:
        """B (out, r) applied to what the layer gives with A as its weight."""
        return z @ B.mT

    def example(self) -> tuple[Any, ...]:
        """Arguments that the layer's forward takes, to try it."""
        return (torch.randn(2, 3, self.in_features).to(self.weight),)

    def few(self) -> Tensor:
        """As much of the weight, in the layer's own shape, as `example` needs."""
        return self.weight

    # ---- what the normal form asks -----------------------------------------------------------------------------------

    def call(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer's own forward answers with this weight and bias, without its hooks."""
        layer = self.layer[0]
        out: Tensor = type(layer).forward(twin(layer, weight=weight, bias=bias), *args, **kwargs)
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.call(self.weight, self.bias, *args, **kwargs)

    def linear(self, x: Tensor) -> Tensor:
        """W x: (..., in) -> (..., out)."""
        W = self.dense()
        y: Tensor = (x.to(W.dtype) @ W.mT).to(x.dtype)
        return y

    def dense(self) -> Tensor:
        """W (out, in) as kept."""
        return self.as_matrix(self.weight)

    def square_norms(self) -> Tensor:
        """|W_i|^2 (out,) in float32 or wider."""
        W = self.dense().detach()
        return W.to(torch.promote_types(W.dtype, torch.float32)).square().sum(-1)

    def times(self, u: Update | Dense, *args: Any, **kwargs: Any) -> Tensor:
        """B A x of the layer's input."""
        if args and args[0].is_floating_point():
            u = each(lambda t: t.to(args[0].dtype), u)
        if isinstance(u, Dense):
            return self.call(self.as_weight(u.D), None, *args, **kwargs)
        z = self.call(self.as_weight(u.A), None, *args, **kwargs)
        return self.after(u.B.to(z.dtype), z)

    def adapted(self, u: Update | Dense, drop: Callable[[Tensor], Tensor] | None, *args: Any, **kwargs: Any) -> Tensor:
        """g * (W x + B A drop(x)) + b; what is looked up by whole numbers has no dropout."""
        y = self(*args, **kwargs)
        if drop is not None and args and args[0].is_floating_point():
            args = (drop(args[0]), *args[1:])
        y = y + self.times(u, *args, **kwargs).to(y.dtype)
        if u.gain is None:
            return y  # type: ignore[no-any-return]
        return gained(y.movedim(self.channel, -1), self.bias, u.gain).movedim(-1, self.channel)

    def restore(self, layer: Any, W: Tensor | None) -> Any:
        """The layer with another weight W (out, in); None gives it its own parameters back."""
        layer.weight = self.weight if W is None else nn.Parameter(self.as_weight(W).contiguous(), requires_grad=False)
        if "bias" in layer._parameters:
            layer.bias = self.bias
        return layer


def twin(layer: Any, **tensors: Tensor | None) -> Any:
    """A layer of the same settings with other tensors, which need not be parameters, and without hooks."""
    other = object.__new__(type(layer))
    vars(other).update(vars(layer))
    vars(other)["_parameters"] = layer._parameters | tensors
    return other


def disagreement(base: ByForward) -> str | None:
    """Why the normal form over a layer is not what its forward computes with a changed weight; None where it is.

    The law "merged = adapted" is tried on the layer itself, in float32, with a random update of rank 2 and a gain.
    """
    if base.weight.is_meta or isinstance(base.weight, FakeTensor):
        return None
    name = type(base.layer[0]).__name__
    bias = None if base.bias is None else base.bias.detach().float()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tried = type(base)(twin(base.layer[0], weight=base.few().detach().float(), bias=bias))
        W = tried.dense()  # (out, in)
        A, B = torch.randn(2, W.shape[1]), W.std() * torch.randn(len(W), 2)
        u = Update(A.to(W), B.to(W), (0.5 + torch.rand(len(W))).to(W))
        try:
            args = tried.example()
            expected = tried.call(tried.as_weight(merged(W, u)), bias, *args)
            if not isinstance(expected, Tensor):
                return f"the forward of {name} answers something else than one tensor"
            off = (expected - tried.adapted(u, None, *args)).abs().max().item()
        except Exception as error:  # whatever a foreign forward raises
            return f"the forward of {name} cannot be tried on one tensor ({type(error).__name__})"
    if not off <= TOLERANCE * expected.abs().max().item():
        return f"the forward of {name} is not W x + b, so it would not be what the adapter merges to"
    return None
