"""Frozen tensors of a base that were rounded for speed; they get their own dtype back once one of them learns."""

import copy
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor


class RoundedNote(UserWarning):
    """A rounded tensor learns, so the base has its own dtype again."""


class Rounded:
    """Tensors that were rounded, each with the dtype that it had before; they are not kept alive."""

    def __init__(self) -> None:
        self.held: list[tuple[ref[Tensor], torch.dtype]] = []
        self.given_back = False  # whether they have their own dtype again

    def round(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Put tensors into a dtype, parameters stay the same objects; a wider one than theirs rounds nothing."""
        self.given_back = False
        for t in tensors:
            if torch.promote_types(t.dtype, dtype) != dtype:
                self.held.append((ref(t), t.dtype))
            t.data = t.data.to(dtype)

    def learning(self) -> Tensor | None:
        """One of them that learns now, in steps that may be smaller than what its dtype tells apart."""
        return next((t for held, _ in self.held if (t := held()) is not None and t.requires_grad), None)

    def give_back(self) -> None:
        """Give all of them the dtype that they had; their values stay rounded."""
        for held, dtype in self.held:
            if (t := held()) is not None:
                t.data = t.data.to(dtype)
        self.held, self.given_back = [], True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rounded":
        twin = Rounded()
        there = [(t, dtype) for held, dtype in self.held if (t := held()) is not None]
        twin.held = [(ref(copy.deepcopy(t, memo)), dtype) for t, dtype in there]  # in `memo`: of the model's copy
        twin.given_back = self.given_back
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"held": [], "given_back": self.given_back}  # another process has tensors of its own
