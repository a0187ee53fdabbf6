"""One encoder layer whose norms come first (ModernBERT) as a single autograd function.

    h = x + drop(W_o drop(softmax(scale rope(q) rope(k)^T + mask)) v)    for q, k, v = W_qkv LN1(x)
    out = h + W_d drop(act(u) * w)                                       for u, w = W_i LN2(h)

A mask says where a token may look: everywhere, or within a window. What LayerNorm and the activation give is made again
in backward from their inputs. Like encoder_layer.py it knows updates, not methods, and block.py decides whether a layer
may be computed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
from loralab.fast.joined import JoinedLinear, JoinedUpdate, Saved, by_product
from loralab.fast.rotary import RotaryModules, rotate, rotate_back
from loralab.fast.shared import LayerCall, backward_of

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

    def compute(
        self, call: LayerCall, x: Tensor, mask: Tensor | None, given: Sequence[Tensor], joined: Sequence[Any]
    ) -> Tensor:
        """The output alone."""
        return compute(call, x, mask, given[0], given[1], joined)[0]

    def apply(
        self, call: LayerCall, x: Tensor, mask: Tensor | None, given: Sequence[Tensor], flat: Sequence[Tensor | None]
    ) -> Tensor:
        """The output as one node of autograd."""
        return PreNormLayer.apply(call, x, mask, *given, *flat)  # type: ignore[no-untyped-call, no-any-return]


def compute(
    call: LayerCall, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, joined: Sequence[JoinedUpdate | None]
) -> tuple[Tensor, tuple[Tensor | None, ...], list[Saved]]:
    """The output of a layer for x (b, t, d), the tensors that backward needs, and those of each product."""
    b, t, d = x.shape
    m, products = call.modules, call.products
    x = x.reshape(b * t, d)  # (n, d), n = b t
    n1, *of_norm1 = (x, None, None) if m.norm1 is None else layer_norm(x, m.norm1)  # (n, d)
    qkv, of_qkv = products.qkv.forward(n1, joined[0])  # (n, 3 d)
    qkv = qkv.view(b, t, 3, -1, m.head).permute(2, 0, 3, 1, 4)  # (3, b, heads, t, dh)
    qkv = torch.cat((_rotated(qkv[:2], cos, sin), qkv[2:]))
    by_products = call.wants_gradient or bool(call.dropout[0])
    c, *of_attention = (
        attention(qkv, m.scale, mask, None, call) if by_products else fused_attention(qkv, m.scale, mask, None)
    )
    c = c.transpose(1, 2).reshape(b * t, -1)  # (n, d)
    o, of_o = products.o.forward(c, joined[1])  # (n, d)
    mask_o = dropout_mask(o, call.dropout[1], (b, t, d), call)  # (n, d)
    h = add_masked(x, o, mask_o)  # (n, d)
    n2, *of_norm2 = layer_norm(h, m.norm2)  # (n, d)
    uw, of_gate_up = products.gate_up.forward(n2, joined[2])  # (n, 2 inner)
    u, w = uw.chunk(2, -1)  # (n, inner)
    g = aten.gelu(u, approximate=m.approximate).mul_(w)  # (n, inner)
    mask_down = dropout_mask(g, call.dropout[2], (b, t, g.shape[-1]), call)  # (n, inner)
    out, of_down = products.down.forward(masked(g, mask_down), joined[3])  # (n, d)
    saved = (x, *of_norm1, *of_attention, c, mask_o, h, *of_norm2, uw, mask_down)
    return aten._unsafe_view(out.add_(h), (b, t, d)), saved, [of_qkv, of_o, of_gate_up, of_down]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # read once: checkpointing recomputes them for the first reader and no other
    cos, sin, flat, saved = tensors[0], tensors[1], tensors[2:14], tensors[14:]
    x, mean1, rstd1, qkv, s, mask_s, c, mask_o, h, mean2, rstd2, uw, mask_down = saved[:13]
    of_qkv, of_o, of_gate_up, of_down = (Saved(*saved[13 + 5 * i : 18 + 5 * i]) for i in range(4))
    call, (b, t, d), learns = ctx.call, ctx.shape, ctx.learns
    m, products = call.modules, call.products
    u_qkv, u_o, u_gate_up, u_down = by_product(flat, products)
    u, w = uw.chunk(2, -1)  # (n, inner)
    dout = grad.reshape(b * t, d)  # (n, d), of h too, by the residual
    of_u = aten.gelu(u, approximate=m.approximate)  # (n, inner)
    dg, of4 = products.down.backward(dout, masked(of_u * w, mask_down) if learns[3] else None, u_down, of_down, True)
    dg = masked(dg, mask_down)  # (n, inner)
    duw = torch.cat((aten.gelu_backward(dg * w, u, approximate=m.approximate), dg * of_u), -1)  # (n, 2 inner)
    n2 = layer_norm(h, m.norm2)[0] if learns[2] else None  # (n, d)
    dn2, of3 = products.gate_up.backward(duw, n2, u_gate_up, of_gate_up, True)
    dh = norm_backward(dn2, h, mean2, rstd2, m.norm2).add_(dout)  # (n, d), of x too
    dc, of2 = products.o.backward(masked(dh, mask_o), c, u_o, of_o, True)  # (n, d)
    dqkv = attention_backward(dc, qkv, m.scale, s, mask_s, b).view(3, b, -1, t, m.head)  # (3, b, heads, t, dh)
    dqkv[:2] = _rotated(dqkv[:2], cos, sin, back=True)
    dqkv = dqkv.permute(1, 3, 0, 2, 4).reshape(b * t, -1)  # (n, 3 d)
    n1 = (x if m.norm1 is None else layer_norm(x, m.norm1)[0]) if learns[0] else None  # (n, d)
    dx, of1 = products.qkv.backward(dqkv, n1, u_qkv, of_qkv, ctx.needs_input_grad[1])  # (n, d)
    if dx is not None:
        dx = dx if m.norm1 is None else norm_backward(dx, x, mean1, rstd1, m.norm1)
        dx = dx.add_(dh).view(b, t, d)
    return None, dx, None, None, None, *of1, *of2, *of3, *of4


def _rotated(qk: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """q and k (2, b, heads, t, dh) rotated by position, or gradients rotated back; in float32 or wider."""
    wide = torch.promote_types(qk.dtype, torch.float32)
    turn = rotate_back if back else rotate
    cos, sin = cos.unsqueeze(1).to(wide), sin.unsqueeze(1).to(wide)  # (b or 1, 1, t, dh)
    return turn(qk.to(wide), cos, sin).to(qk.dtype)


class PreNormLayer(torch.autograd.Function):
    """`compute` with its backward pass. Inputs: call, x, mask, cos, sin, then A, B and gain of the four layers."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, call: LayerCall, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, *flat: Tensor
    ) -> Tensor:
        updates = by_product(flat, call.products)
        joined = [product.join(own, x.dtype) for product, own in zip(call.products, updates, strict=True)]
        out, saved, of_products = compute(call, x, mask, cos, sin, joined)
        ctx.call, ctx.shape = call, x.shape
        ctx.learns = [ctx.needs_input_grad[5 + 3 * i] for i in range(4)]  # A of each: only its gradient needs the input
        if not ctx.learns[1]:
            saved = (*saved[:6], None, *saved[7:])  # the input of o
        ctx.save_for_backward(cos, sin, *flat, *saved, *(t for of_one in of_products for t in of_one))
        return out

    backward = backward_of(_backward)
