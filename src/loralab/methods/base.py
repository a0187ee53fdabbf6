"""What a method must say of itself; the defaults are those of a method without constants and without per-step work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from loralab.errors import UserError

Roles = Mapping[str, Tensor]  # role -> tensor of one layer


@dataclass(frozen=True)
class Factors:
    """The settings of a method (a frozen dataclass), and how its parameters become A (r, in) and B (out, r)."""

    kind: ClassVar[str]  # what files call the method
    roles: ClassVar[tuple[str, ...]]  # names of the parameters of a layer
    learn: ClassVar[tuple[str, ...]]  # those that learn unless a recipe says otherwise
    low_rank: ClassVar[bool] = True  # whether `lower` says it; if not, `dense` does
    drops: ClassVar[bool] = True  # whether dropout on x leaves the method what it is
    stepped: ClassVar[bool] = False  # whether `draw`, `before_step` and `after_step` must run in training
    shared: ClassVar[tuple[str, ...]] = ()  # roles that layers of one share have in common; none: it takes no shares

    def problems(self) -> list[str]:
        """What is wrong with the settings, one phrase each."""
        return []

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a layer of this size cannot take the method, or None."""
        return None

    def placed(self, index: int, count: int) -> "Factors":
        """The method in one of the `count` layers of a share; by default what they share says the same in each."""
        return self

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(out, in) of the weight that the parameters of a layer of this size are for: its own, or a larger one."""
        return out_features, in_features

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """Role -> its start in one layer; the update they lower to is zero."""
        raise NotImplementedError

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        """(A, B), scaling folded in. `drawn` is what `draw` gave for this step, None in evaluation."""
        raise NotImplementedError

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        """The update (..., out, in) itself, scaling folded in, of a method whose update is no low-rank product."""
        raise NotImplementedError

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        """Role -> number of values in one layer, in closed form, for every role that can learn."""
        raise NotImplementedError

    def constants(self, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Frozen tensors that all layers share, from the `shape` of every adapted layer."""
        return {}

    def local(self, constants: Roles, out_features: int, in_features: int) -> dict[str, Tensor]:
        """The part of the constants that one layer uses; `lower` sees it in `p`."""
        return {}

    def for_steps(self, total_steps: int) -> "Factors":
        """The same method with what depends on the length of training filled in."""
        return self

    def memory(self, p: Roles) -> dict[str, Tensor]:
        """What one layer, with parameters `p`, keeps from step to step: fresh tensors that `before_step` and
        `after_step` find beside its roles and change in place. A checkpoint holds them, an adapter file does not."""
        return {}

    def draw(self, generator: Generator) -> Any:
        """Drawn once per optimizer step, for all layers alike; raises UserError if training cannot begin."""
        return None

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that one training gives, each of which `lower` takes as drawn; none if it is for one rank."""
        return ()

    def at(self, rank: int) -> int:
        """What `lower` takes as drawn to evaluate at one of `ranks`; raises UserError for another."""
        if not self.ranks:
            raise UserError(f"rank={rank}: this method was trained for one rank; dylora trains many")
        if rank not in self.ranks:
            least, most = self.ranks[0], self.ranks[-1]
            raise UserError(f"rank={rank}: this adapter was trained for ranks {least} to {most}, choose one of them")
        return rank

    def before_step(self, layers: Mapping[str, Roles], drawn: Any) -> Any:
        """Runs before the optimizer's step, gradients present; what it returns goes to `after_step`."""
        return None

    def after_step(self, layers: Mapping[str, Roles], drawn: Any, kept: Any) -> None:
        """Runs after the optimizer's step, gradients still present. `layers`: path -> role -> tensor."""
