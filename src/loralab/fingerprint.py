"""sha256 of a base's tensors, so that an adapter refuses a base it was not made for."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and values rounded to bfloat16: one base loaded in float32 or bfloat16 is one base."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        bits = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(bits.numpy().data)
    return digest.hexdigest()
