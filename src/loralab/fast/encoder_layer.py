"""One encoder layer (attention, feed-forward, two LayerNorms) as a single autograd function.

    s = softmax(scale q k^T + mask + bias)    y = LN(x + drop(W_o drop(s) v))    out = LN(y + drop(W_2 act(W_1 y)))

Small encoders spend more time between products than in them. This writes into the tensors it has, joins q, k and v
into one product, and lets autograd see one node with the adapters' updates (A, B, g) as its inputs. It keeps for
backward what the products need and no more, and nothing at all where no gradient is wanted. It knows updates, not
methods. Whether a layer may be computed here is decided in block.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from loralab.fast.encoder_parts import (
    add_masked,
    attention,
    attention_backward,
    dropout_mask,
    fused_attention,
    layer_norm,
    masked,
    norm_backward,
    probability,
)
from loralab.fast.function import Computed, Given, Gradients, Joined, Kept
from loralab.fast.joined import JoinedLinear
from loralab.fast.shared import LayerCall

aten = torch.ops.aten


class LayerProducts(NamedTuple):
    """The linear layers of one layer as four products."""

    qkv: JoinedLinear
    o: JoinedLinear
    up: JoinedLinear
    down: JoinedLinear


@dataclass(frozen=True)
class LayerModules:
    """The modules of one layer, whatever the architecture calls them."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm1: nn.LayerNorm
    up: nn.Module
    down: nn.Module
    norm2: nn.LayerNorm
    activation: nn.Module
    heads: int
    scale: float  # of scores
    attention_dropout: nn.Dropout
    attention: nn.Module  # attention dropout is on while this module trains
    o_dropout: nn.Dropout | None
    down_dropout: nn.Dropout | None
    approximate: str  # of GELU: "none" or "tanh"
    position_bias: bool = False  # whether the layer takes a position bias as its third argument
    returns_tuple: bool = False
    causal: ClassVar[bool] = False  # whether a token sees those before it alone where no mask is given

    @property
    def linear(self) -> tuple[nn.Module, ...]:
        """The six linear layers, in the order of their updates."""
        return self.q, self.k, self.v, self.o, self.up, self.down

    @property
    def attention_p(self) -> float:
        """The probability that attention dropout has now."""
        return self.attention_dropout.p if self.attention.training else 0.0

    @property
    def dropout(self) -> tuple[float, float, float]:
        """The probabilities that dropout has now: of attention, after o, after down."""
        return self.attention_p, probability(self.o_dropout), probability(self.down_dropout)

    @property
    def checked(self) -> tuple[tuple[nn.Module, tuple[type, ...]], ...]:
        """Modules other than the linear ones, each with the classes that it may be of."""
        drops = (drop for drop in (self.attention_dropout, self.o_dropout, self.down_dropout) if drop is not None)
        norms = self.norm1, self.norm2
        return (*((norm, (nn.LayerNorm,)) for norm in norms), *((drop, (nn.Dropout,)) for drop in drops))

    @property
    def reads(self) -> tuple[str, ...]:
        """Arguments of a call, beside the input and the mask, that are read here."""
        return ("position_bias",) if self.position_bias else ()

    def activate(self, u: Tensor) -> Tensor:
        """What the activation gives."""
        return aten.gelu(u, approximate=self.approximate)  # type: ignore[no-any-return]

    def products(self) -> LayerProducts:
        """The products of the layer's modules."""
        return LayerProducts(*map(JoinedLinear, ((self.q, self.k, self.v), (self.o,), (self.up,), (self.down,))))

    def given(self, told: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """What a call gives beside the mask: the position bias (b, heads, t, t), where the layer takes one."""
        return (told.get("position_bias") if self.position_bias else None,)

    def misfit(self, x: Tensor, mask: Tensor | None, given: tuple[Tensor | None, ...]) -> str | None:
        """Why these inputs are not computed here, None if they are."""
        return None

    def compute(self, call: LayerCall, x: Tensor, mask: Tensor | None, given: Given, joined: Joined) -> Computed:
        """The output of a layer for x (b, t, d), the tensors that backward needs, and those of each product.

        The tensors: the inputs of the four products, then q k v, weights and mask of attention, and for each LayerNorm
        its input, the dropout mask before it, mean and 1 / std; the input of GELU lies between the two.
        """
        b, t, d = x.shape
        products = call.products
        x = x.reshape(b * t, d)  # (n, d), n = b t
        qkv, of_qkv = products.qkv.forward(x, joined.updates[0])  # (n, 3 d)
        qkv = qkv.view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, b, heads, t, dh)
        by_products = call.wants_gradient or bool(call.dropout[0])
        attend = partial(attention, call=call) if by_products else fused_attention
        c, *of_attention = attend(qkv, self.scale, mask, given[0])
        c = c.transpose(1, 2).reshape(b * t, -1)  # (n, d)
        o, of_o = products.o.forward(c, joined.updates[1])  # (n, d)
        mask_o = dropout_mask(o, call.dropout[1], (b, t, d), call)  # (n, d)
        o = add_masked(x, o, mask_o)
        y, *of_norm1 = layer_norm(o, self.norm1)  # (n, d)
        u, of_up = products.up.forward(y, joined.updates[2])  # (n, inner)
        g = aten.gelu(u, approximate=self.approximate)  # (n, inner)
        w, of_down = products.down.forward(g, joined.updates[3])  # (n, d)
        mask_down = dropout_mask(w, call.dropout[2], (b, t, d), call)  # (n, d)
        w = add_masked(y, w, mask_down)
        out, *of_norm2 = layer_norm(w, self.norm2)  # (n, d)
        inputs = [t if learned else None for t, learned in zip((x, c, y, g), joined.learns, strict=True)]
        saved = (*inputs, *of_attention, o, mask_o, *of_norm1, u, w, mask_down, *of_norm2)
        return aten._unsafe_view(out, (b, t, d)), saved, [of_qkv, of_o, of_up, of_down]

    def backward(self, call: LayerCall, grad: Tensor, kept: Kept) -> Gradients:
        """The gradients of x and of each product's updates."""
        x, c, y, g, qkv, s, mask_s, o, mask_o, mean1, rstd1, u, w, mask_down, mean2, rstd2 = kept.saved
        of_qkv, of_o, of_up, of_down = kept.of_products
        (u_qkv, u_o, u_up, u_down), products, (b, t, d) = kept.updates, call.products, grad.shape
        dw = norm_backward(grad.reshape(b * t, d), w, mean2, rstd2, self.norm2)  # (n, d), of y too, by the residual
        dg, of6 = products.down.backward(masked(dw, mask_down), g, u_down, of_down, True)  # (n, inner)
        du = aten.gelu_backward(dg, u, approximate=self.approximate)  # (n, inner)
        dy, of5 = products.up.backward(du, y, u_up, of_up, True)  # (n, d)
        do = norm_backward(dy.add_(dw), o, mean1, rstd1, self.norm1)  # (n, d), of x too
        dc, of4 = products.o.backward(masked(do, mask_o), c, u_o, of_o, True)  # (n, d)
        dqkv = attention_backward(dc, qkv, self.scale, s, mask_s, b)  # (3, b heads, t, dh)
        dqkv = dqkv.view(3, b, self.heads, t, -1).permute(1, 3, 0, 2, 4).reshape(b * t, -1)  # (n, 3 d)
        dx, of123 = products.qkv.backward(dqkv, x, u_qkv, of_qkv, kept.to_x)  # (n, d)
        dx = None if dx is None else dx.add_(do).view(b, t, d)
        return dx, (of123, of4, of5, of6)
