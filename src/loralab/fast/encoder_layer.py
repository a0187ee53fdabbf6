"""One encoder layer (attention, feed-forward, two LayerNorms) as a single autograd function.

    s = softmax(scale q k^T + mask + bias)    y = LN(x + drop(W_o drop(s) v))    out = LN(y + drop(W_2 act(W_1 y)))

Small encoders spend more time between products than in them: this writes into the tensors it has, joins q, k and v
into one product, and lets autograd see one node with the adapters' triples as its inputs. It keeps for backward what
the products need and no more, and nothing at all where no gradient is wanted. It knows triples, not methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.active import Active, Stream
from loralab.fast.masks import mask as dropout_mask
from loralab.fast.product import Joined, Low, Product
from loralab.layer import Adapted
from loralab.update import Update

SHORT = 48  # tokens up to which softmax by exp and sum beats torch's, whose rows are then too short for vectors

aten = torch.ops.aten
Seen = tuple[Tensor | None, Tensor | None, Tensor | None]  # of attention for backward: q, k, v; weights; dropout


@dataclass(frozen=True)
class Parts:
    """The modules of one layer, whatever the architecture calls them."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm1: nn.LayerNorm
    up: nn.Module
    down: nn.Module
    norm2: nn.LayerNorm
    heads: int
    approximate: str  # of GELU: "none" or "tanh"
    drops: tuple[float, float, float]  # of attention, of o, of down


class Block:
    """Takes the place of a layer's `forward`; `wrap` makes what the architecture returns."""

    def __init__(self, layer: nn.Module, active: Active, parts: Parts, wrap: Any = None) -> None:
        self.layer, self.active, self.parts, self.wrap = layer, active, parts, wrap
        p = parts
        self.linear = (p.q, p.k, p.v, p.o, p.up, p.down)
        self.products = (Product((p.q, p.k, p.v)), Product((p.o,)), Product((p.up,)), Product((p.down,)))
        self.products[0].adjoin()

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **more: Any,
    ) -> Any:
        self.active.check(len(hidden_states))
        if self._plain(more):
            kept = {"position_bias": position_bias} if position_bias is not None else {}
            return type(self.layer).forward(self.layer, hidden_states, attention_mask, **kept, **more)
        drops = self.parts.drops if self.layer.training else (0.0, 0.0, 0.0)
        now = Now(drops, self.active.streams, torch.is_grad_enabled())
        given = (self, now, hidden_states, attention_mask, position_bias)
        if now.learns:
            updates = [m.active_update() if isinstance(m, Adapted) else None for m in self.linear]
            flat = [t for u in updates for t in ((None, None, None) if u is None else u)]
            out = EncoderLayer.apply(*given, *flat)  # type: ignore[no-untyped-call]
        else:
            out = computed(*given, [product.kept(self.active, hidden_states.dtype) for product in self.products])[0]
        return out if self.wrap is None else self.wrap(out)

    def _plain(self, more: dict[str, Any]) -> bool:
        """Whether this is asked for what it does not do: attentions, a cache, dense updates, dropout on their input."""
        adapted = [m for m in self.linear if isinstance(m, Adapted)]
        active = [(m, m.recipes[name]) for m in adapted for name in self.active.names if name in m.recipes]
        odd = any(not recipe.low_rank or (m.training and recipe.dropout) for m, recipe in active)
        return odd or bool(more.get("output_attentions")) or more.get("past_key_values") is not None


class Now(NamedTuple):
    """What one forward is like."""

    drops: tuple[float, float, float]
    streams: Sequence[Stream]
    learns: bool  # whether a backward pass may follow


def computed(
    block: Block, now: Now, x3: Tensor, mask: Tensor | None, bias: Tensor | None, joined: Sequence[Joined | None]
) -> tuple[Tensor, tuple[Tensor | None, ...], list[tuple[Tensor | None, ...]]]:
    """The output of a layer for x3 (b, t, d), what backward needs, and that of each product."""
    b, t, d = x3.shape
    p, (in_qkv, in_o, in_up, in_down) = block.parts, block.products
    x = x3.reshape(b * t, d)  # (n, d), n = b t
    qkv, of_qkv = in_qkv.forward(x, joined[0])  # (n, 3 d)
    qkv = qkv.view(b, t, 3, p.heads, -1).permute(2, 0, 3, 1, 4)  # (3, b, heads, t, dh)
    c, *of_attention = _attention(qkv, mask, bias, now) if now.learns or now.drops[0] else _fused(qkv, mask, bias)
    c = c.transpose(1, 2).reshape(b * t, d)
    o, of_o = in_o.forward(c, joined[1])
    m2 = _mask(o, now.drops[1], (b, t, d), now)
    o = _add(x, o, m2)
    y, *of_norm1 = _norm(o, p.norm1)
    u, of_up = in_up.forward(y, joined[2])  # (n, inner)
    g = aten.gelu(u, approximate=p.approximate)
    w, of_down = in_down.forward(g, joined[3])
    m3 = _mask(w, now.drops[2], (b, t, d), now)
    w = _add(y, w, m3)
    out, *of_norm2 = _norm(w, p.norm2)
    kept = (x, c, y, g, *of_attention, o, m2, *of_norm1, u, w, m3, *of_norm2)
    return out.view(b, t, d), kept, [of_qkv, of_o, of_up, of_down]


class EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, block: Block, now: Now, x3: Tensor, mask: Tensor | None, bias: Tensor | None, *flat: Tensor
    ) -> Tensor:
        lows = _lows(flat)
        joined = [product.join(own, x3.dtype) for product, own in zip(block.products, lows, strict=True)]
        out, (x, c, y, g, *kept), of = computed(block, now, x3, mask, bias, joined)
        learns = [ctx.needs_input_grad[5 + 3 * i] for i in range(6)]  # A of each: only its gradient needs the input
        inputs = [t if learn else None for t, learn in zip((x, c, y, g), (any(learns[:3]), *learns[3:]), strict=True)]
        ctx.block, ctx.shape, ctx.approximate = block, x3.shape, block.parts.approximate
        own = [t for kept_of, j in zip(of, joined, strict=True) for t in (*kept_of, *(j or (None, None, None)))]
        ctx.save_for_backward(*flat, *inputs, *kept, *own)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        flat, saved = ctx.saved_tensors[:18], ctx.saved_tensors[18:]
        x, c, y, g, qkv, s, m1, o, m2, mean1, rstd1, u, w, m3, mean2, rstd2 = saved[:16]
        of_qkv, of_o, of_up, of_down = (saved[16 + 5 * i : 21 + 5 * i] for i in range(4))
        block, (b, t, d), lows = ctx.block, ctx.shape, _lows(flat)
        p, (in_qkv, in_o, in_up, in_down), to_x = block.parts, block.products, ctx.needs_input_grad[2]
        dw = _norm_back(grads[0].reshape(b * t, d), w, mean2, rstd2, p.norm2)  # also the gradient of y, by the residual
        dg, of6 = in_down.backward(_times(dw, m3), g, lows[3], of_down, True)
        du = aten.gelu_backward(dg, u, approximate=ctx.approximate)
        dy, of5 = in_up.backward(du, y, lows[2], of_up, True)
        do = _norm_back(dy.add_(dw), o, mean1, rstd1, p.norm1)  # also the gradient of x
        dc, of4 = in_o.backward(_times(do, m2), c, lows[1], of_o, True)
        dqkv = _attention_back(dc, qkv, s, m1, b)
        dqkv = dqkv.view(3, b, p.heads, t, -1).permute(1, 3, 0, 2, 4).reshape(b * t, 3 * d)
        dx, of123 = in_qkv.backward(dqkv, x, lows[0], of_qkv, to_x)
        given = None if dx is None else dx.add_(do).view(b, t, d)
        return None, None, given, None, None, *of123, *of4, *of5, *of6


def softmax(s: Tensor) -> Tensor:
    """Softmax over the last axis, in place where rows are short."""
    if s.shape[-1] > SHORT or s.device.type != "cpu":
        return torch.softmax(s, -1)
    s = s.sub_(s.amax(-1, keepdim=True)).exp_()
    return s.mul_(s.sum(-1, keepdim=True).reciprocal_())


def _add_bias(s: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """scale s + mask + bias for scores s (b, heads, t, t); a boolean mask is true where attention may look."""
    s = s.mul_(scale) if bias is None else torch.add(bias, s, alpha=scale)
    if mask is None:
        return s
    if mask.dtype == torch.bool:
        return s.masked_fill_(~mask, torch.finfo(s.dtype).min)
    return s.add_(mask)


def _attention(qkv: Tensor, mask: Tensor | None, bias: Tensor | None, now: Now) -> tuple[Tensor, *Seen]:
    """q, k, v (3, b, heads, t, dh) -> the output (b, heads, t, dh), and what backward needs: q, k, v, weights, mask."""
    _, b, heads, t, dh = shape = qkv.shape
    qkv = qkv.reshape(3, b * heads, t, dh)
    s = torch.bmm(qkv[0], qkv[1].mT).view(b, heads, t, t)
    s = softmax(_add_bias(s, dh**-0.5, mask, bias)).view(-1, t, t)
    m = _mask(s, now.drops[0], (b, heads, t, t), now)
    return torch.bmm(s if m is None else s * m, qkv[2]).view(shape[1:]), qkv, s, m


def _fused(qkv: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, *Seen]:
    """The output alone, by torch's fused attention: faster forward, on CPU much slower backward (docs/decisions.md)."""
    given = bias if mask is None else mask
    if bias is not None and mask is not None:
        lowest = torch.finfo(bias.dtype).min
        given = bias.where(mask, lowest) if mask.dtype == torch.bool else bias + mask
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v, attn_mask=given), None, None, None


def _attention_back(dc: Tensor, qkv: Tensor, s: Tensor, m: Tensor | None, b: int) -> Tensor:
    """dc (n, d) -> the gradient of q, k, v (3, b heads, t, dh)."""
    q, k, v = qkv
    t, dh = q.shape[1:]
    dc = dc.view(b, t, -1, dh).transpose(1, 2).reshape(-1, t, dh)
    out = torch.empty_like(qkv)
    torch.bmm((s if m is None else s * m).mT, dc, out=out[2])
    ds = torch.bmm(dc, v.mT)  # (b heads, t, t)
    ds = ds if m is None else ds.mul_(m)
    if t > SHORT:
        ds = torch._softmax_backward_data(ds, s, -1, s.dtype)
    else:
        ds = ds.mul_(s)
        ds = ds.addcmul_(s, ds.sum(-1, keepdim=True), value=-1)
    ds = ds.mul_(dh**-0.5)
    torch.bmm(ds, k, out=out[0])
    torch.bmm(ds.mT, q, out=out[1])
    return out


def _mask(like: Tensor, p: float, shape: Sequence[int], now: Now) -> Tensor | None:
    """The mask of `like`, which holds a tensor (rows, ...) of that shape."""
    return dropout_mask(like.view(shape), p, now.streams).view_as(like) if p else None


def _add(x: Tensor, y: Tensor, m: Tensor | None) -> Tensor:
    """x + y m."""
    return torch.add(x, y) if m is None else torch.addcmul(x, y, m)


def _norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
        x, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )
    return out


def _norm_back(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: nn.LayerNorm) -> Tensor:
    given = (dy.contiguous(), x, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, [True, False, False])
    dx: Tensor = aten.native_layer_norm_backward(*given)[0]
    return dx


def _times(x: Tensor, m: Tensor | None) -> Tensor:
    return x if m is None else x * m


def _lows(flat: Sequence[Tensor | None]) -> list[list[Low]]:
    """The updates of each product's layers: q, k, v; o; up; down."""
    low = [None if (A := flat[i]) is None else Update(A, flat[i + 1], flat[i + 2]) for i in range(0, 18, 3)]  # type: ignore[arg-type]
    return [low[:3], low[3:4], low[4:5], low[5:]]
