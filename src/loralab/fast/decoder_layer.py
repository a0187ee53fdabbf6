"""One decoder layer of the Llama family (RMSNorm, rotary attention with grouped heads, gated feed-forward) as a single
autograd function.

    h = x + W_o softmax(scale rope(q) rope(k)^T + mask) v    for q, k, v = W N1(x)
    out = h + W_d (act(W_g N2(h)) * W_u N2(h))               N(x) = w x / sqrt(mean(x^2) + eps)

It joins q, k, v into one product, and gate and up, lets autograd see one node with the adapters' updates (A, B, g) as
its inputs, and keeps little for backward: what RMSNorm and the activation give is made again from their inputs. Key and
value heads are never repeated: the query heads of a group are rows of one product with their key head. It knows
updates, not methods. Whether a layer may be computed here is decided in block.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.fast.function import Computed, Given, Gradients, Joined, Kept
from loralab.fast.joined import JoinedLinear
from loralab.fast.rotary import RotaryModules, rotate, rotate_back
from loralab.fast.shared import LayerCall, add_mask, blank_rows, dropout_of, softmax

aten = torch.ops.aten


class Activation(NamedTuple):
    """act(u), and dg act'(u)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {  # class of an activation in transformers, or torch's
    "SiLUActivation": Activation(F.silu, aten.silu_backward),
    "SiLU": Activation(F.silu, aten.silu_backward),
    "GELUTanh": Activation(
        lambda u: F.gelu(u, approximate="tanh"), lambda dg, u: aten.gelu_backward(dg, u, approximate="tanh")
    ),
}


class Norm(NamedTuple):
    """An RMSNorm: y = (w + more) x / sqrt(mean(x^2) + eps). `more` is 1 where the weight is kept as w - 1 (Gemma)."""

    module: nn.Module
    eps: float
    more: float

    def weight(self, wide: torch.dtype) -> Tensor:
        """w (d,), to multiply in that dtype."""
        w: Tensor = self.module.weight.detach().to(wide)  # type: ignore[operator]
        return w + self.more if self.more else w

    def rstd(self, x: Tensor) -> Tensor:
        """1 / sqrt(mean(x^2) + eps) of x (..., d): (..., 1), in float32 or wider."""
        return x.to(_wide(x)).square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()

    def forward(self, x: Tensor, rstd: Tensor) -> Tensor:
        """y (..., d), rounded where the module itself rounds."""
        scaled = x.to(rstd.dtype) * rstd
        if self.more:
            return (scaled * self.weight(rstd.dtype)).to(x.dtype)
        return scaled.to(x.dtype) * self.weight(x.dtype)

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
        """dx (..., d)."""
        scaled = x.to(rstd.dtype).mul(rstd)  # (..., d)
        slope = dy.to(rstd.dtype) * self.weight(rstd.dtype)
        slope -= scaled.mul_((slope * scaled).mean(-1, keepdim=True))
        return slope.mul_(rstd).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class DecoderProducts(NamedTuple):
    """The linear layers of one layer as four products."""

    qkv: JoinedLinear
    o: JoinedLinear
    gate_up: JoinedLinear
    down: JoinedLinear


@dataclass(frozen=True)
class DecoderModules(RotaryModules):
    """The modules of one layer, whatever the architecture calls them."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    norm1: Norm
    norm2: Norm
    activation: nn.Module
    attention: Any  # holds the probability of dropout, and is on while it trains
    head: int  # size of a head
    scale: float  # of scores
    q_norm: Norm | None = None  # over each head
    k_norm: Norm | None = None
    returns_tuple: bool = False
    causal: ClassVar[bool] = True  # whether a token sees those before it alone where no mask is given

    @property
    def linear(self) -> tuple[nn.Module, ...]:
        """The seven linear layers, in the order of their updates."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down

    @property
    def dropout(self) -> tuple[float, ...]:
        """The probabilities that dropout has now: of attention."""
        return (self.attention_p,)

    @property
    def checked(self) -> tuple[tuple[nn.Module, tuple[type, ...]], ...]:
        """Modules other than the linear ones, each with the classes that it may be of: none, as
        decoders.py looks at the classes of norms and activation when it finds them."""
        return ()

    def activate(self, u: Tensor) -> Tensor:
        """What the activation gives."""
        return self._act.forward(u)

    @property
    def _act(self) -> Activation:
        return ACTIVATIONS[type(self.activation).__name__]

    def products(self) -> DecoderProducts:
        """The products of the layer's modules."""
        joined = (self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,)
        return DecoderProducts(*map(JoinedLinear, joined))

    def compute(self, call: LayerCall, x: Tensor, mask: Tensor | None, given: Given, joined: Joined) -> Computed:
        """The output of a layer for x (b, t, d), the tensors that backward needs, and those of each product."""
        b, t, d = x.shape
        products, (cos, sin) = call.products, given
        x = x.reshape(b * t, d)  # (n, d), n = b t
        rstd1 = self.norm1.rstd(x)  # (n, 1)
        qkv, of_qkv = products.qkv.forward(self.norm1.forward(x, rstd1), joined.updates[0])  # (n, (heads + 2 kv) dh)
        # q (b kv, g t, dh), k and v (b kv, t, dh)
        q, k, v, *of_norms = _heads(qkv.view(b, t, -1, self.head), call, cos, sin)
        c, s, dropped = _attention(q, k, v, mask, b, call)  # c (n, heads dh), s (b kv, g t, t)
        o, of_o = products.o.forward(c, joined.updates[1])  # (n, d)
        h = o.add_(x)  # (n, d)
        rstd2 = self.norm2.rstd(h)  # (n, 1)
        uw, of_gate_up = products.gate_up.forward(self.norm2.forward(h, rstd2), joined.updates[2])  # (n, 2 inner)
        u, w = uw.chunk(2, -1)  # (n, inner)
        out, of_down = products.down.forward(self.activate(u).mul_(w), joined.updates[3])  # (n, d)
        saved = (x, rstd1, q, k, v, *of_norms, s, dropped, c if joined.learns[1] else None, h, rstd2, uw)
        return aten._unsafe_view(out.add_(h), (b, t, d)), saved, [of_qkv, of_o, of_gate_up, of_down]

    def backward(self, call: LayerCall, grad: Tensor, kept: Kept) -> Gradients:
        """The gradients of x and of each product's updates."""
        x, rstd1, q, k, v, q_in, k_in, s, dropped, c, h, rstd2, uw = kept.saved
        of_qkv, of_o, of_gate_up, of_down = kept.of_products
        (u_qkv, u_o, u_gate_up, u_down), (cos, sin) = kept.updates, kept.given
        products, (b, t, d) = call.products, grad.shape
        u, w = uw.chunk(2, -1)  # (n, inner)
        dout = grad.reshape(b * t, d)  # (n, d), of h too, by the residual
        of_u = self._act.forward(u)  # (n, inner)
        g = of_u * w if kept.learns[3] else None  # (n, inner)
        dg, of7 = products.down.backward(dout, g, u_down, of_down, True)  # (n, inner)
        duw = torch.empty_like(uw)
        torch.mul(dg, of_u, out=duw[:, w.shape[1] :])
        duw[:, : w.shape[1]] = self._act.backward(dg.mul_(w), u)
        n2 = self.norm2.forward(h, rstd2) if kept.learns[2] else None  # (n, d)
        dn2, of56 = products.gate_up.backward(duw, n2, u_gate_up, of_gate_up, True)
        dh = self.norm2.backward(dn2, h, rstd2).add_(dout)  # (n, d), of x too
        dc, of4 = products.o.backward(dh, c, u_o, of_o, True)  # (n, heads dh)
        dqkv = _attention_backward(dc, q, k, v, q_in, k_in, s, dropped, cos, sin, call, (b, t))
        n1 = self.norm1.forward(x, rstd1) if kept.learns[0] else None  # (n, d)
        dn1, of123 = products.qkv.backward(dqkv, n1, u_qkv, of_qkv, kept.to_x)
        dx = None if dn1 is None else self.norm1.backward(dn1, x, rstd1).add_(dh).view(b, t, d)
        return dx, (of123, of4, of56, of7)


# ---- attention -------------------------------------------------------------------------------------------------------


def _heads(qkv: Tensor, call: LayerCall, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """q k v (b, t, heads + 2 kv, dh) -> q (b kv, g t, dh) of the g query heads of each key head, k and v (b kv, t, dh),
    rotated, q scaled, as it has fewer values than the scores; and the inputs of the norms of q and k, None without."""
    m = call.modules
    q, k, v = qkv.split([out // m.head for out in call.products.qkv.outs], 2)
    q_in, k_in = (None, None) if m.q_norm is None else (q, k)
    if m.q_norm is not None and m.k_norm is not None:
        q, k = m.q_norm.forward(q, m.q_norm.rstd(q)), m.k_norm.forward(k, m.k_norm.rstd(k))
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (b or 1, t, 1, dh)
    kv = k.shape[2]
    return (  # type: ignore[return-value]
        _to_rows(rotate(q, cos, sin), kv).mul_(m.scale), _to_rows(rotate(k, cos, sin), kv), _to_rows(v, kv), q_in, k_in
    )  # fmt: skip


def _to_rows(x: Tensor, kv: int) -> Tensor:
    """(b, t, kv g, dh) -> (b kv, g t, dh)."""
    b, t, _, dh = x.shape
    return x.view(b, t, kv, -1, dh).permute(0, 2, 3, 1, 4).reshape(b * kv, -1, dh)


def _from_rows(x: Tensor, b: int, t: int) -> Tensor:
    """(b kv, g t, dh) -> (b, t, kv g, dh)."""
    dh = x.shape[-1]
    return x.view(b, len(x) // b, -1, t, dh).permute(0, 3, 1, 2, 4).reshape(b, t, -1, dh)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, b: int, call: LayerCall
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, scaled (b kv, g t, dh), k, v (b kv, t, dh) -> output (n, heads dh), weights (b kv, g t, t), their dropout."""
    kv, t = len(k) // b, k.shape[1]
    s = torch.bmm(q, k.mT).view(b, -1, t, t)  # (b, heads, t, t)
    before = torch.ones(t, t, dtype=torch.bool, device=s.device).tril_() if mask is None else mask
    s = blank_rows(softmax(add_mask(s, before)), mask)
    dropped = dropout_of(s, call.dropout[0], call.streams)  # (b, heads, t, t)
    s = s.view(b * kv, -1, t)  # (b kv, g t, t)
    dropped = None if dropped is None else dropped.view_as(s)
    c = torch.bmm(s if dropped is None else s * dropped, v)  # (b kv, g t, dh)
    return _from_rows(c, b, t).reshape(b * t, -1), s, dropped


def _attention_backward(
    dc: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_in: Tensor | None,
    k_in: Tensor | None,
    s: Tensor,
    dropped: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    call: LayerCall,
    shape: tuple[int, int],
) -> Tensor:
    """dc (n, heads dh) -> the gradient of q, k, v as their product gave them (n, (heads + 2 kv) dh)."""
    (b, t), m = shape, call.modules
    kv, dh = len(k) // b, m.head
    dc = _to_rows(dc.view(b, t, -1, dh), kv)  # (b kv, g t, dh)
    dv = torch.bmm((s if dropped is None else s * dropped).mT, dc)  # (b kv, t, dh)
    ds = torch.bmm(dc, v.mT)  # (b kv, g t, t)
    ds = ds if dropped is None else ds.mul_(dropped)
    ds = torch._softmax_backward_data(ds, s, -1, s.dtype)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    dq = rotate_back(_from_rows(torch.bmm(ds, k).mul_(m.scale), b, t), cos, sin)  # (b, t, heads, dh)
    dk = rotate_back(_from_rows(torch.bmm(ds.mT, q), b, t), cos, sin)  # (b, t, kv, dh)
    if m.q_norm is not None and m.k_norm is not None and q_in is not None and k_in is not None:
        dq = m.q_norm.backward(dq, q_in, m.q_norm.rstd(q_in))
        dk = m.k_norm.backward(dk, k_in, m.k_norm.rstd(k_in))
    return torch.cat((dq, dk, _from_rows(dv, b, t)), 2).reshape(b * t, -1)
