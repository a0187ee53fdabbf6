"""The likelihood of tokens under a language model, without the logits of all tokens at once.

In float32 the logits of 4 rows of 256 tokens over a vocabulary of 49,152 and their gradient take 0.4 GB. Where a
model's logits are what its output layer gives for the base's hidden states, the layer runs on a few hundred tokens at a
time. Whether that is so is asked of the model, by watching one forward pass; a model that scales or caps its logits
afterwards, or whose output layer is adapted, gives them all.
"""

from collections.abc import Iterator, Mapping
from inspect import signature
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loralab.errors import UserError

Places = tuple[Tensor, Tensor]  # sequence and token of each

PIECE_BYTES = 64e6  # of logits that exist at once, as if they were float32
CACHE_BYTES = 6e6  # of float32 logits that a CPU handles at once: what stays in its cache is not written to memory

_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether a model's logits are its output layer's


def prepare(model: Any) -> None:
    """Find out how a plain model makes its logits: call it before adapters are attached."""
    _PLAIN[model] = _is_plain(model)


@torch.no_grad()
def _is_plain(model: Any) -> bool:
    """Watch a forward pass: is the output layer's input the base's output, and its output the logits?

    And can the logits be left out?
    """
    head, seen = model.get_output_embeddings(), {}
    if head is None or model.base_model is model or "logits_to_keep" not in signature(model.forward).parameters:
        return False

    def base_gives(module: Any, args: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def head_takes(module: Any, args: Any, output: Any) -> None:
        seen["input"], seen["logits"] = args[0], output

    hooks = [model.base_model.register_forward_hook(base_gives), head.register_forward_hook(head_takes)]
    try:
        ids = torch.ones(1, 3, dtype=torch.long, device=head.weight.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    hidden, taken = seen.get("hidden"), seen.get("input")
    if hidden is None or taken is None or hidden.shape != taken.shape:
        return False
    if logits is not seen["logits"] or hidden.untyped_storage()._cdata != taken.untyped_storage()._cdata:
        return False
    return _leaves_logits_out(model, ids)


def _leaves_logits_out(model: Any, ids: Tensor) -> bool:
    """Whether a model takes the places of its logits as a tensor, as those of transformers do."""
    try:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=_no_place()).logits
    except (TypeError, ValueError, IndexError, RuntimeError):  # one that takes their number alone
        return False
    return not logits.numel()


def _no_place() -> Tensor:
    """No place in a row: the logits of one would cost more than its product.

    It is a slice of the hidden states, and for a slice torch copies a frozen output layer once for each row. On the
    CPU, from where an index is good on whatever device the hidden states are.
    """
    return torch.empty(0, dtype=torch.long)


def likelihoods(model: Any, inputs: Mapping[str, Tensor], at: Places, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) the negative log-likelihood of each wanted token, and (n,) whether it has the largest logit.

    The token at `at` (n,), (n,) predicts the wanted one (n,). The second is found where no gradient is wanted, else it
    is all 0.
    """
    head = model.get_output_embeddings()
    if not _PLAIN.get(model) or type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        logits = model(**inputs, use_cache=False).logits  # (sequences, t, vocabulary)
        return _of_logits(logits[at], wanted)
    hidden = _hidden(model, inputs)[at]  # (n, d)
    size = max(1, int(PIECE_BYTES / 4 / len(head.weight)))
    pieces = zip(hidden.split(size), wanted.split(size), strict=True)
    if not torch.is_grad_enabled():
        found = [_of_logits(rows, y) for h, ys in pieces for rows, y in _few(head(h), ys)]
    elif any(p.requires_grad for p in head.parameters()):
        found = [checkpoint(_of_layer, head, h, y, use_reentrant=False) for h, y in pieces]
    else:
        frozen: Any = Frozen.apply
        found = [(frozen(h, head.weight, head.bias, y), y.new_zeros(len(y))) for h, y in pieces]
    nll, right = zip(*found, strict=True) if found else ((hidden.sum(1),), (wanted,))
    return torch.cat(nll).float(), torch.cat(right)


def _hidden(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the last hidden states (sequences, t, d) of a forward pass of the whole model, without logits.

    The whole model runs because adapters and others have hooks on it.
    """
    seen, thread = [], get_ident()

    def base_gives(module: Any, args: Any, output: Any) -> None:
        if get_ident() == thread:
            seen.append(output[0])

    hook = model.base_model.register_forward_hook(base_gives)
    try:
        model(**inputs, use_cache=False, logits_to_keep=_no_place())
    finally:
        hook.remove()
    (hidden,) = seen
    return hidden  # type: ignore[no-any-return]


def _few(logits: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (n, vocabulary) and wanted tokens (n,) a few rows at a time on a CPU, elsewhere as they are."""
    few = max(1, int(CACHE_BYTES / 4 / logits.shape[1]))
    whole = logits.device.type != "cpu"
    return zip(*((t,) if whole else t.split(few) for t in (logits, wanted)), strict=True)


def _of_layer(head: nn.Module, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return _of_logits(head(hidden), wanted)


def _of_logits(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) negative log-likelihoods and (n,) hits of logits (n, vocabulary)."""
    nll = F.cross_entropy(logits.float(), wanted, reduction="none")
    hits = wanted.new_zeros(len(wanted)) if logits.requires_grad else (logits.argmax(1) == wanted).to(wanted.dtype)
    return nll, hits


class Frozen(torch.autograd.Function):
    """Negative log-likelihood under a frozen output layer.

    The gradient of the hidden states is made in the forward pass, while the logits are there: d nll / d hidden =
    (softmax(logits) - one_hot(wanted)) W. Backward scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> Tensor:
        """Take hidden (n, d), weight (vocabulary, d), bias (vocabulary,), wanted (n,); return (n,) float32."""
        logits = F.linear(hidden, weight, bias)  # (n, vocabulary)
        found = []
        for rows, y in _few(logits, wanted):
            kept = torch.log_softmax(rows.float(), 1)  # (few, vocabulary)
            found.append(-kept.gather(1, y[:, None]).squeeze(1))
            slope = kept.exp_()
            slope[torch.arange(len(y)), y] -= 1
            rows.copy_(slope)  # the logits become the slopes
        product = logits.to(weight.dtype) @ weight  # (n, d), in bfloat16 under autocast as the logits are
        ctx.save_for_backward(product.to(hidden.dtype))  # (n, d)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale the kept gradient by that of each token (n,)."""
        if torch.is_grad_enabled():
            raise UserError("create_graph=True: this loss gives one gradient and no second derivative")
        (slope,) = ctx.saved_tensors
        return gradient[:, None].to(slope.dtype) * slope, None, None, None
