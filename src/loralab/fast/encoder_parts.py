"""Parts of encoder layers that are computed in one: attention by products, dropout and LayerNorm, with their backward.

Which parts a layer has, and in which order, is in encoder_layer.py (norms after) and pre_norm_layer.py (norms before).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.fast.shared import SHORT, LayerCall, add_mask, blank_rows, dropout_of, softmax

aten = torch.ops.aten

# ---- attention -------------------------------------------------------------------------------------------------------

OfAttention = tuple[Tensor | None, Tensor | None, Tensor | None]  # what backward needs: q k v; weights; dropout mask


def _add_bias(s: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """scale s + mask + bias for scores s (b, heads, t, t)."""
    return add_mask(s.mul_(scale) if bias is None else torch.add(bias, s, alpha=scale), mask)


def attention(
    qkv: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None, call: LayerCall
) -> tuple[Tensor, *OfAttention]:
    """q, k, v (3, b, heads, t, dh) -> the output (b, heads, t, dh), and what backward needs."""
    _, b, heads, t, dh = shape = qkv.shape
    qkv = qkv.reshape(3, b * heads, t, dh)
    s = torch.bmm(qkv[0], qkv[1].mT).view(b, heads, t, t)
    s = blank_rows(softmax(_add_bias(s, scale, mask, bias)), mask).view(-1, t, t)  # (b heads, t, t)
    m = dropout_mask(s, call.dropout[0], (b, heads, t, t), call)  # (b heads, t, t)
    return torch.bmm(s if m is None else s * m, qkv[2]).view(shape[1:]), qkv, s, m


def fused_attention(qkv: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, *OfAttention]:
    """The output alone, by torch's fused attention: faster forward, on CPU much slower backward (docs/decisions.md)."""
    both = bias is not None and mask is not None
    added = bias + mask if both else mask if bias is None else bias  # type: ignore[operator]
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale), None, None, None


def attention_backward(dc: Tensor, qkv: Tensor, scale: float, s: Tensor, m: Tensor | None, b: int) -> Tensor:
    """dc (n, d) -> the gradient of q, k, v (3, b heads, t, dh)."""
    q, k, v = qkv
    t, dh = q.shape[1:]
    dc = dc.view(b, t, -1, dh).transpose(1, 2).reshape(-1, t, dh)  # (b heads, t, dh)
    out = torch.empty_like(qkv)
    torch.bmm((s if m is None else s * m).mT, dc, out=out[2])
    ds = torch.bmm(dc, v.mT)  # (b heads, t, t)
    ds = ds if m is None else ds.mul_(m)
    if t > SHORT:
        ds = torch._softmax_backward_data(ds, s, -1, s.dtype)
    else:
        ds = ds.mul_(s)
        ds = ds.addcmul_(s, ds.sum(-1, keepdim=True), value=-1)
    ds = ds.mul_(scale)
    torch.bmm(ds, k, out=out[0])
    torch.bmm(ds.mT, q, out=out[1])
    return out


# ---- dropout and LayerNorm -------------------------------------------------------------------------------------------


def probability(module: nn.Dropout | None) -> float:
    """Return the probability that dropout has now."""
    return module.p if module is not None and module.training else 0.0


def dropout_mask(like: Tensor, p: float, shape: Sequence[int], call: LayerCall) -> Tensor | None:
    """The dropout mask of `like`, which holds a tensor (rows, ...) of that shape; None where nothing is dropped."""
    mask = dropout_of(like.view(shape), p, call.streams)
    return None if mask is None else mask.view_as(like)


def masked(x: Tensor, m: Tensor | None) -> Tensor:
    return x if m is None else x * m


def add_masked(x: Tensor, y: Tensor, m: Tensor | None) -> Tensor:
    """x + y m."""
    return torch.add(x, y) if m is None else torch.addcmul(x, y, m)


def _affine(norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias (d,) of a LayerNorm in that dtype."""
    weight, bias = norm.weight, norm.bias
    return None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (n, d), with mean and 1 / std (n, 1)."""
    out: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
        x, norm.normalized_shape, *_affine(norm, x.dtype), norm.eps
    )
    return out


def norm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The gradient of the input (n, d)."""
    affine = _affine(norm, x.dtype)
    arguments = (dy.contiguous(), x, norm.normalized_shape, mean, rstd, *affine, [True, False, False])
    dx: Tensor = aten.native_layer_norm_backward(*arguments)[0]
    return dx
