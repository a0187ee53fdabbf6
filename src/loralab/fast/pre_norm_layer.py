"""One encoder layer whose norms come first (ModernBERT) as a single autograd function.

    h = x + drop(W_o drop(softmax(scale rope(q) rope(k)^T + mask)) v)    for q, k, v = W_qkv LN1(x)
    out = h + W_d drop(act(u) * w)                                       for u, w = W_i LN2(h)

A mask says where a token may look: everywhere, or within a window. What LayerNorm and the activation give is made again
in backward from their inputs. Like encoder_layer.py it knows updates, not methods, and block.py decides whether a layer
may be computed here.
"""

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
from loralab.fast.rotary import RotaryModules, rotate, rotate_back
from loralab.fast.shared import LayerCall

aten = torch.ops.aten


class PreNormProducts(NamedTuple):
    """The linear layers of one layer."""

    qkv: JoinedLinear
    o: JoinedLinear
    gate_up: JoinedLinear
    down: JoinedLinear


@dataclass(frozen=True)
class PreNormModules(RotaryModules):
    """The modules of one layer, whatever the architecture calls them."""

    qkv: nn.Module
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module
    norm1: nn.LayerNorm | None  # None in a first layer, whose input is normed already
    norm2: nn.LayerNorm
    activation: nn.Module
    attention: Any  # holds the probability of dropout, and is on while it trains
    head: int  # size of a head
    scale: float  # of scores
    o_dropout: nn.Dropout | None
    down_dropout: nn.Dropout | None
    approximate: str  # of GELU: "none" or "tanh"
    returns_tuple: bool = False
    causal: ClassVar[bool] = False  # whether a token sees those before it alone where no mask is given

    @property
    def linear(self) -> tuple[nn.Module, ...]:
        """The four linear layers, in the order of their updates."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def dropout(self) -> tuple[float, float, float]:
        """The probabilities that dropout has now: of attention, after o, before down."""
        return self.attention_p, probability(self.o_dropout), probability(self.down_dropout)

    @property
    def checked(self) -> tuple[tuple[nn.Module, tuple[type, ...]], ...]:
        """Modules other than the linear ones, each with the classes that it may be of."""
        norms = (norm for norm in (self.norm1, self.norm2) if norm is not None)
        drops = (drop for drop in (self.o_dropout, self.down_dropout) if drop is not None)
        return (*((norm, (nn.LayerNorm,)) for norm in norms), *((drop, (nn.Dropout,)) for drop in drops))

    def activate(self, u: Tensor) -> Tensor:
        """What the activation gives."""
        return aten.gelu(u, approximate=self.approximate)  # type: ignore[no-any-return]

    def products(self) -> PreNormProducts:
        """The products of the layer's modules."""
        return PreNormProducts(*(JoinedLinear([module]) for module in self.linear))

    def compute(self, call: LayerCall, x: Tensor, mask: Tensor | None, given: Given, joined: Joined) -> Computed:
        """The output of a layer for x (b, t, d), the tensors that backward needs, and those of each product."""
        b, t, d = x.shape
        products, (cos, sin) = call.products, given
        x = x.reshape(b * t, d)  # (n, d), n = b t
        n1, *of_norm1 = (x, None, None) if self.norm1 is None else layer_norm(x, self.norm1)  # (n, d)
        qkv, of_qkv = products.qkv.forward(n1, joined.updates[0])  # (n, 3 d)
        qkv = qkv.view(b, t, 3, -1, self.head).permute(2, 0, 3, 1, 4)  # (3, b, heads, t, dh)
        qkv = torch.cat((_rotated(qkv[:2], cos, sin), qkv[2:]))
        by_products = call.wants_gradient or bool(call.dropout[0])
        attend = partial(attention, call=call) if by_products else fused_attention
        c, *of_attention = attend(qkv, self.scale, mask, None)
        c = c.transpose(1, 2).reshape(b * t, -1)  # (n, d)
        o, of_o = products.o.forward(c, joined.updates[1])  # (n, d)
        mask_o = dropout_mask(o, call.dropout[1], (b, t, d), call)  # (n, d)
        h = add_masked(x, o, mask_o)  # (n, d)
        n2, *of_norm2 = layer_norm(h, self.norm2)  # (n, d)
        uw, of_gate_up = products.gate_up.forward(n2, joined.updates[2])  # (n, 2 inner)
        u, w = uw.chunk(2, -1)  # (n, inner)
        g = aten.gelu(u, approximate=self.approximate).mul_(w)  # (n, inner)
        mask_down = dropout_mask(g, call.dropout[2], (b, t, g.shape[-1]), call)  # (n, inner)
        out, of_down = products.down.forward(masked(g, mask_down), joined.updates[3])  # (n, d)
        saved = (x, *of_norm1, *of_attention, c if joined.learns[1] else None, mask_o, h, *of_norm2, uw, mask_down)
        return aten._unsafe_view(out.add_(h), (b, t, d)), saved, [of_qkv, of_o, of_gate_up, of_down]

    def backward(self, call: LayerCall, grad: Tensor, kept: Kept) -> Gradients:
        """The gradients of x and of each product's updates."""
        x, mean1, rstd1, qkv, s, mask_s, c, mask_o, h, mean2, rstd2, uw, mask_down = kept.saved
        of_qkv, of_o, of_gate_up, of_down = kept.of_products
        (u_qkv, u_o, u_gate_up, u_down), (cos, sin) = kept.updates, kept.given
        products, (b, t, d) = call.products, grad.shape
        u, w = uw.chunk(2, -1)  # (n, inner)
        dout = grad.reshape(b * t, d)  # (n, d), of h too, by the residual
        of_u = aten.gelu(u, approximate=self.approximate)  # (n, inner)
        g = masked(of_u * w, mask_down) if kept.learns[3] else None  # (n, inner)
        dg, of4 = products.down.backward(dout, g, u_down, of_down, True)
        dg = masked(dg, mask_down)  # (n, inner)
        duw = torch.cat((aten.gelu_backward(dg * w, u, approximate=self.approximate), dg * of_u), -1)  # (n, 2 inner)
        n2 = layer_norm(h, self.norm2)[0] if kept.learns[2] else None  # (n, d)
        dn2, of3 = products.gate_up.backward(duw, n2, u_gate_up, of_gate_up, True)
        dh = norm_backward(dn2, h, mean2, rstd2, self.norm2).add_(dout)  # (n, d), of x too
        dc, of2 = products.o.backward(masked(dh, mask_o), c, u_o, of_o, True)  # (n, d)
        dqkv = attention_backward(dc, qkv, self.scale, s, mask_s, b)  # (3, b heads, t, dh)
        dqkv = dqkv.view(3, b, -1, t, self.head)  # (3, b, heads, t, dh)
        dqkv[:2] = _rotated(dqkv[:2], cos, sin, back=True)
        dqkv = dqkv.permute(1, 3, 0, 2, 4).reshape(b * t, -1)  # (n, 3 d)
        n1 = (x if self.norm1 is None else layer_norm(x, self.norm1)[0]) if kept.learns[0] else None  # (n, d)
        dx, of1 = products.qkv.backward(dqkv, n1, u_qkv, of_qkv, kept.to_x)  # (n, d)
        if dx is not None:
            dx = dx if self.norm1 is None else norm_backward(dx, x, mean1, rstd1, self.norm1)
            dx = dx.add_(dh).view(b, t, d)
        return dx, (of1, of2, of3, of4)


def _rotated(qk: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """q and k (2, b, heads, t, dh) rotated by position, or gradients rotated back; in float32 or wider."""
    wide = torch.promote_types(qk.dtype, torch.float32)
    turn = rotate_back if back else rotate
    cos, sin = cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)  # (b or 1, 1, t, dh)
    return turn(qk.to(wide), cos, sin).to(qk.dtype)
