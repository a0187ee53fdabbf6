"""What was computed from tensors, kept until one of them changes; only where no gradient is wanted.

A change is seen by the tensor's version, which operations in place count, by its address, which is new where `t.data`
was set, and by the count of optimizer steps, as torch's fused AdamW leaves versions as they were. Writing into `t.data`
by hand leaves no trace; every forward with gradients on forgets all, so a training loop that does it is safe.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes


class Known(NamedTuple):
    value: Any
    marks: list[tuple[int, int]]  # address and version of each tensor, and the optimizer steps so far
    held: list[Tensor]  # the tensors, so that no other gets an address of theirs


@cache
def steps() -> list[int]:
    """The number of optimizer steps since this was first called, in a list that a hook counts up."""
    count = [0]

    def up(*_: Any) -> None:
        count[0] += 1

    register_optimizer_step_post_hook(up)
    return count


def constants(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` of hashable arguments, kept; its tensors have values, even where `loralab plan` asks for them first."""

    @lru_cache(maxsize=8)
    @wraps(make)
    def made(*args: Hashable) -> Any:
        with _disable_current_modes():
            return make(*args)

    return made


class Cache:
    def __init__(self, most: int | None = None) -> None:
        steps()
        self.most = most  # values kept at once
        self.known: dict[Hashable, Known] = {}

    def get(self, key: Hashable, of: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave before for this key if the tensors `of` are what they were."""
        if torch.is_grad_enabled():
            self.known.clear()
            return make()
        try:
            marks = [(steps()[0], 0), *((t.data_ptr(), t._version) for t in of)]
        except RuntimeError:  # tensors made in inference mode have no version
            return make()
        found = self.known.get(key)
        if found is None or found.marks != marks:
            self.known.pop(key, None)
            while self.most is not None and len(self.known) >= self.most:
                del self.known[next(iter(self.known))]
            with torch.inference_mode(False), torch.no_grad():  # what is kept has a version, and serves everywhere
                self.known[key] = found = Known(make(), marks, [t.detach() for t in of])
        return found.value

    def forget(self, name: Hashable) -> None:
        """Drops what has `name` in its key."""
        for key in [key for key in self.known if name in key]:  # type: ignore[operator]
            del self.known[key]

    def __deepcopy__(self, memo: Any) -> "Cache":
        return Cache(self.most)

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "known": {}}
