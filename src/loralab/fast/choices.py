"""What `enable` and `prepare` chose for a model: each piece, whether it is used now, and why or why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from torch import nn

from loralab.fast.block import Block
from loralab.fast.code import Obstacle
from loralab.rounded import Rounded


@dataclass(frozen=True)
class Choice:
    """One piece: whether it is used, and why or why not."""

    piece: str
    used: bool
    reason: str


class Choices(Sequence[Choice]):
    """The choices for one model. They follow it: read again later, they say what holds then."""

    def __init__(
        self,
        model: nn.Module,
        fixed: Sequence[Choice],
        blocks: Sequence[Block],
        why: str,
        store: str | None,
        rounded: Rounded,
    ) -> None:
        """`fixed` are the choices; with `blocks` that of the block is made anew, with `why` as its reason if used.

        `store` is what frozen tensors, which `rounded` knows, were rounded to; None if they were not.
        """
        self.model, self.fixed, self.blocks, self.why = model, list(fixed), list(blocks), why
        self._store, self._rounded, self._autocast = store, rounded, False

    @property
    def store(self) -> str | None:
        """What the frozen tensors of the model are rounded to."""
        return None if self._rounded.given_back else self._store

    @property
    def autocast(self) -> bool:
        """Whether bfloat16 was wanted and the model is not kept in it, so forward passes need autocast."""
        return self._autocast or (self._store == "bfloat16" and self._rounded.given_back)

    @autocast.setter
    def autocast(self, wanted: bool) -> None:
        self._autocast = wanted

    def __len__(self) -> int:
        return len(self.fixed)

    @overload
    def __getitem__(self, index: int) -> Choice: ...
    @overload
    def __getitem__(self, index: slice) -> list[Choice]: ...
    def __getitem__(self, index: int | slice) -> Choice | list[Choice]:
        return self._now()[index]

    def __str__(self) -> str:
        """One line for each piece."""
        width = max(len(choice.piece) for choice in self.fixed)
        lines = [f"{c.piece:{width}}  {'on ' if c.used else 'off'}  {c.reason}" for c in self._now()]
        if self.store is not None:
            lines.append(f"{'store':{width}}  on   frozen tensors are rounded to {self.store}, what learns is not")
        if self.autocast:
            lines.append(f"{'store':{width}}  off  run the model under torch.autocast(..., torch.bfloat16)")
        return "\n".join(lines)

    __repr__ = __str__

    def _now(self) -> list[Choice]:
        return [self._of_blocks() if choice.piece == "block" and self.blocks else choice for choice in self.fixed]

    def _of_blocks(self) -> Choice:
        plain = [(block.layer, why) for block in self.blocks if (why := block.why_plain()) is not None]
        if not plain:
            return Choice("block", True, self.why)
        first = _told(self.model, *plain[0])
        if len(plain) == len(self.blocks):
            return Choice("block", False, first)
        return Choice("block", True, f"{len(plain)} of {len(self.blocks)} layers take their own forward: {first}")


def _told(model: nn.Module, layer: nn.Module, obstacle: Obstacle) -> str:
    """The obstacle with the path of its module."""
    if obstacle.module is None:
        return obstacle.text
    root = next((path for path, module in model.named_modules() if module is layer), "")
    path = next((path for path, module in layer.named_modules() if module is obstacle.module), "")
    joint = "." if obstacle.text.endswith(" learns") else " "
    return f"{'.'.join(filter(None, (root, path)))}{joint}{obstacle.text}"
