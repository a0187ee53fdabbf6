"""sha256 of tensors: of one as it is stored, and of a whole base."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, as safetensors stores them."""
    return hashlib.sha256(_bytes(tensor.detach().cpu())).hexdigest()


def fingerprint(tensors: Iterable[tuple[str, Tensor]], exact: bool = False) -> str:
    """sha256 over names, shapes and values rounded to bfloat16: one base loaded in float32 or bfloat16 is one base.

    `exact` takes the values as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor.detach().to("cpu", tensor.dtype if exact else torch.bfloat16)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The memory of a CPU tensor, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
