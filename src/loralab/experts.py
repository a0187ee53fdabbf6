"""The module of a mixture's experts, with adapters on its stacks of weights (see kinds/stack.py)."""

import torch
from torch import Tensor, nn

from loralab.active import Active
from loralab.errors import UserError
from loralab.kinds.by_forward import twin
from loralab.kinds.stack import Stack, stacks_of
from loralab.layer import Adapted, LikeOriginal


class AdaptedStack(Adapted):
    """V = g * (W + B A) (n, out, in) over a frozen stack, with the parameters of any number of adapters."""

    base: Stack

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.base.count


class AdaptedExperts(LikeOriginal, nn.Module):
    """A module of experts whose own forward computes with adapted weights; its other tensors stay its own."""

    def __init__(self, original: nn.Module, active: Active, path: str) -> None:
        super().__init__()
        self.active, self.path = active, path
        stacks = stacks_of(original)
        for name, p in original.named_parameters(recurse=False):
            if name in stacks:
                stack = AdaptedStack(Stack(original, name), None, active, f"{path}.{name}")
                self.add_module(name, stack.train(original.training))
            else:
                self.register_parameter(name, p)
        for name, module in original.named_children():
            self.add_module(name, module)
        self.original = (original,)  # last: before it is there, no attribute is taken for the model's

    def forward(self, *args: Tensor) -> Tensor:
        """What the original answers for tokens (t, in) and what goes with each; rows have as many tokens each."""
        ids = self.active.ids
        if ids is None:
            return self._one(args)
        tokens = len(args[0])
        if tokens % len(ids):
            raise UserError(
                f"{self.path}: {tokens} tokens are no equal rows, but ids name an adapter for {len(ids)} rows"
            )
        of_token = ids.repeat_interleave(tokens // len(ids)).to(args[0].device)  # (t,)
        outs, order = [], []
        for place in ids.unique().tolist():
            where = (of_token == place).nonzero().squeeze(1)
            with self.active.only(place):
                outs.append(self._one(tuple(t[where] for t in args)))
            order.append(where)
        return torch.cat(outs)[torch.cat(order).argsort()]  # (t, out)

    def _one(self, args: tuple[Tensor, ...]) -> Tensor:
        """The output with one adapter, or none, for all tokens."""
        weights = {key: m.base.own(m.in_use()) for key, m in self._modules.items() if isinstance(m, AdaptedStack)}
        original = self.original[0]
        out: Tensor = type(original).forward(twin(original, **self._parameters, **weights), *args)
        return out

    def plain(self, name: str | None, dtype: torch.dtype | None) -> nn.Module:
        """The original, with the update of one adapter merged in if it has one."""
        original = self.original[0]
        for module in self.children():
            if isinstance(module, AdaptedStack):
                module.plain(name, dtype)
        for key, p in self._parameters.items():
            original.register_parameter(key, p)
        return original


def open_stack(model: nn.Module, path: str) -> Stack | None:
    """The stack at the path of a parameter, if it is one of a module that is not adapted yet; else None."""
    above, _, name = path.rpartition(".")
    try:
        holder = model.get_submodule(above)
    except AttributeError:
        return None
    return Stack(holder, name) if name in stacks_of(holder) and not isinstance(holder, AdaptedExperts) else None
