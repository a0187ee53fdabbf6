"""The shapes of what a forward and a backward pass make."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {f"aten.{name}" for name in ("t", "transpose", "detach", "view", "_unsafe_view", "alias", "permute", "expand")}


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is made; a view of another is none."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and str(function.overloadpacket) not in VIEWS:
            self.made.add(tuple(out.shape))
        return out


def made(model, x):
    with Shapes() as seen:
        model(x).sum().backward()
    return seen.made
