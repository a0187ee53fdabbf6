"""sha256 of tensors: of a base's, so that an adapter refuses one it was not made for, and of what a seed draws."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]], exact: bool = False) -> str:
    """sha256 over names, shapes and values rounded to bfloat16: one base loaded in float32 or bfloat16 is one base.

    `exact` takes the values as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        kept = tensor.detach().to("cpu", tensor.dtype if exact else torch.bfloat16)
        bits = kept.contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(bits.numpy().data)
    return digest.hexdigest()
