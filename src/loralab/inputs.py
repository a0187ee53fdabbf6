"""What the inputs x of a layer span: the eigenvectors of the sum of x x^T (in, in) over tokens.

They are the right singular vectors of all inputs stacked (n, in), found without keeping the inputs. The eva start
begins with them (Paischer et al., 2024).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loralab.active import first_row
from loralab.errors import UserError
from loralab.methods.starts import InputDirections

Batches = Iterable[Mapping[str, Any]]  # each is what `model(**batch)` takes; its attention_mask tells the padding
IGNORED = -100  # the label of a token that is not learned


@torch.no_grad()
def observe(model: nn.Module, batches: Batches, ranks: Mapping[str, int]) -> dict[str, InputDirections]:
    """Path -> the directions that the inputs of that layer span, without padding, from forward passes over `batches`.

    `ranks`: path -> how many directions. Nothing in the model changes. The SVD is of the inputs as they are, their mean
    is not subtracted. The shares can decide how a budget of ranks is divided.
    Raises UserError if a layer sees fewer tokens than its rank.
    """
    grams: dict[str, Tensor] = {}  # (in, in): sums of x x^T
    counts = dict.fromkeys(ranks, 0)

    def add(path: str, x: Tensor) -> None:
        x = x.float()
        gram = (x.T @ x).double()  # (in, in); sums over many batches keep their digits
        grams[path] = grams[path] + gram if path in grams else gram
        counts[path] += len(x)

    with evaluating(model):
        each_input(model, on_device(model, batches), {path: model.get_submodule(path) for path in ranks}, add)
    if few := [path for path, rank in ranks.items() if counts[path] < rank]:
        raise UserError(
            f"rank {ranks[few[0]]} for {few[0]} needs as many tokens to look at, it saw {counts[few[0]]} "
            f"({len(few)} of {len(ranks)} layers saw too few): pass more batches"
        )
    return {path: _span(grams[path], rank) for path, rank in ranks.items()}


def on_device(model: nn.Module, batches: Batches) -> Iterator[dict[str, Any]]:
    """The batches with their tensors on the device of a model."""
    device = next(model.parameters()).device
    for batch in batches:
        yield {key: t.to(device) if isinstance(t, Tensor) else t for key, t in batch.items()}


def each_input(
    model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> None:
    """Call `see(path, x)` with the real tokens x (n, in) of every input of the `layers`, over forward passes."""
    encoder = _encoder(model)
    inside = set(map(id, (model if encoder is None else encoder).modules()))
    states: list[Tensor] = []  # (rows, t, in) that the encoder gave, which layers of the decoder read too
    turned: frozenset[str] | None = None  # layers that get inputs (t, rows, in); asked where a mask does not tell

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        states[:] = [out if isinstance(out, Tensor) else out[0]]

    def look(source: Tensor | None, target: Tensor | None, turned: frozenset[str], path: str, x: Tensor) -> None:
        reads = id(layers[path]) in inside or any(x.data_ptr() == t.data_ptr() for t in states)
        see(path, real_tokens(x, source if reads else target, path in turned))

    hook = None if encoder is None else encoder.register_forward_hook(keep)
    try:
        for batch in batches:
            source, target = batch.get("attention_mask"), _target_mask(batch)
            if turned is None and any(mask is not None and _is_square(mask) for mask in (source, target)):
                turned = _turned(model, batch, layers)
            with _watching(layers, partial(look, source, target, turned or frozenset())):
                model(**batch)
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def _watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call `see(path, x)` with every input of the layers inside the block."""

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(path, inputs[0])

        return hook

    hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a transformers model that has a decoder too."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    return None if encoder is model else encoder


def _target_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """The mask (rows, t) of a decoder's inputs: as given, or where there are labels to write, or that of the source
    where the model makes the inputs from it."""
    labels = batch.get("labels")
    if (given := batch.get("decoder_attention_mask")) is not None:
        return given  # type: ignore[no-any-return]
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return labels != IGNORED
    own = any(batch.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
    return None if own else batch.get("attention_mask")


def _is_square(mask: Tensor) -> bool:
    return mask.ndim == 2 and mask.shape[0] == mask.shape[1] > 1


def _turned(model: nn.Module, batch: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """The layers that get inputs (t, rows, in), seen with one row of a batch of as many rows as tokens."""
    first: dict[str, int] = {}
    rows = len(next(t for t in batch.values() if isinstance(t, Tensor)))
    with _watching(layers, lambda path, x: first.setdefault(path, len(x))):
        model(**{key: first_row(value, rows) for key, value in batch.items()})
    return frozenset(path for path, size in first.items() if size == rows)


def real_tokens(x: Tensor, mask: Tensor | None, turned: bool = False) -> Tensor:
    """The rows (n, in) of a layer's input that are tokens of the batch and no padding; mask (rows, t).

    With `turned` a square input is (t, rows, in). A pooler's (rows, in) has no padding; an input of other rows
    (relative positions, say) is no token at all.
    """
    flat, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    if mask is None:
        return flat
    if mask.ndim == 2 and shape == mask.mT.shape and (turned or shape != mask.shape):
        mask = mask.mT
    if shape in (mask.shape, (mask.numel(),)):
        return flat[mask.bool().flatten()]
    return flat if len(x) == len(mask) else flat[:0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _span(gram: Tensor, rank: int) -> InputDirections:
    squares, V = torch.linalg.eigh(gram.cpu())  # (in,) rising, (in, in)
    squares, V = squares.flip(0).clamp_min(0), V.flip(1).T
    sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()  # (in, 1): the largest entry is positive
    return InputDirections((V * sign)[:rank].float(), (squares / squares.sum()).float())
