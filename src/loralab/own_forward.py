"""An adapted layer that is more than a product: an embedding, a convolution. Its own forward computes every part.

Rows of several adapters are computed for each adapter in turn, over the whole input, and put together by row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from loralab.active import Active
from loralab.errors import UserError
from loralab.kinds import is_product
from loralab.kinds.by_forward import ByForward
from loralab.layer import Adapted, LikeOriginal


class OwnForward(LikeOriginal, Adapted):
    """y = g * (W x + B A x) + b, with whatever arguments the original layer takes for x."""

    base: ByForward

    @property
    def weight(self) -> Tensor:
        """The weight in the layer's own shape; with the update in use, where the model reads it itself."""
        return self.base.as_weight(self.in_use()) if self.read_past else self.base.weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the original answers to these arguments, with the update in use; rows may come as one for all."""
        names, ids = self.active.names, self.active.ids
        self.active.check(0 if ids is None else len(ids), replica="_is_replica" in self.__dict__)
        if ids is None or not any(name in self.recipes for name in names):
            return self._one(args, kwargs)
        outs = []
        for place in range(len(names)):
            with self.active.only(place):
                outs.append(self._one(args, kwargs))
        if (wrong := outs[0].shape[0]) not in (1, len(ids)):
            raise UserError(f"{self.path} answers {wrong} rows, but ids name an adapter for {len(ids)} rows")
        rows = [outs[i][row if len(outs[i]) > 1 else 0] for row, i in enumerate(ids.tolist())]
        return torch.stack(rows)  # (rows, ...)

    def _one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output with one adapter, or none, for all rows."""
        u = self.active_update()
        if u is None:
            return self.base(*args, **kwargs)  # type: ignore[no-any-return]
        return self.base.adapted(u, self.dropout(self.active.names[0]), *args, **kwargs)


def adapted(original: nn.Module, store: str | None, active: Active, path: str) -> Adapted:
    """The adapted layer for a layer of any kind; a store keeps the weights of products only."""
    if is_product(original):
        return Adapted(original, store, active, path)
    return OwnForward(original, None, active, path)
