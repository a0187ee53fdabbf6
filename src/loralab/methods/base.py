"""What a method defines: its settings, the parameters of a layer, and how these become the update of a weight.

The defaults here are those of a method without shared constants and without work at each optimizer step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Generator, Tensor

from loralab.errors import UserError

Roles = Mapping[str, Tensor]  # role -> tensor of one layer


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has divided among processes, put together, for which all of them must ask; else the tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def divided_as(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, divided among them as `like` is; itself where that is not divided."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Factors:
    """The settings of a method (a frozen dataclass), and how its parameters become A (r, in) and B (out, r)."""

    kind: ClassVar[str]  # name of the method's class in files
    roles: ClassVar[tuple[str, ...]]  # names of the tensors of a layer
    learn: ClassVar[tuple[str, ...]]  # roles that learn unless a recipe says otherwise
    low_rank: ClassVar[bool] = True  # whether `lower` gives the update; if not, `dense` does
    sees_weight: ClassVar[bool] = False  # whether `dense` finds the frozen weight as W (out, in) in `p`
    drops: ClassVar[bool] = True  # whether the method allows dropout on x
    gains: ClassVar[bool] = True  # whether the method allows a gain on its output
    stepped: ClassVar[bool] = False  # whether `draw`, `before_step` and `after_step` must run in training
    one_alpha: ClassVar[bool] = False  # whether all layers of a share need one alpha
    counter: ClassVar[str | None] = None  # role that counts optimizer steps; the step hooks keep it
    shared: ClassVar[tuple[str, ...]] = ()  # roles that the layers of a share hold in common; none: no shares allowed
    revision: ClassVar[int] = 1  # raised when a default changes its meaning; addresses of runs carry it above 1

    def problems(self) -> list[str]:
        """What is wrong with the settings, one phrase each."""
        return []

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a layer of this size cannot take the method, or None."""
        return None

    def placed(self, index: int, count: int) -> "Factors":
        """The method in layer `index` of the `count` layers of a share; the same in each of them by default."""
        return self

    def on(self, path: str) -> "Factors":
        """The method in the layer of that path; the same in each of them by default."""
        return self

    def strangers(self, paths: Sequence[str]) -> list[str]:
        """Names among the settings that none of the adapted layers has, one phrase each."""
        return []

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(out, in) of the weight that the parameters of a layer of this size are for: its own, or a larger one."""
        return out_features, in_features

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        """Role -> starting tensor of one layer; the update that these give must be zero."""
        raise NotImplementedError

    def from_base(self, base: Any) -> dict[str, Tensor]:
        """Role -> starting tensor in the place of that of `init`, for roles that start from the frozen weight."""
        return {}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        """(A (..., r, in), B (..., out, r)), scaling included. `drawn` comes from `draw`; None in evaluation."""
        raise NotImplementedError

    def dense(self, p: Roles, out_features: int, in_features: int, drawn: Any = None) -> Tensor:
        """The update (..., out, in) itself, scaling included, of a method whose update is no low-rank product."""
        raise NotImplementedError

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        """Role -> number of values in one layer, in closed form, for every role that can learn."""
        raise NotImplementedError

    def constants(self, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Frozen tensors that all layers share, made from the `shape` of every adapted layer."""
        return {}

    def local(self, constants: Roles, out_features: int, in_features: int) -> dict[str, Tensor]:
        """The part of the constants that one layer uses; `lower` finds it in `p`."""
        return {}

    def for_steps(self, total_steps: int) -> "Factors":
        """The method for a run of that many optimizer steps, with every setting that depends on the length filled in.

        Raises UserError if the run is so short that the method would be another one.
        """
        return self

    def notes(self, total_steps: int) -> list[str]:
        """What a user should know before a run of that many steps, such as a phase that is very short."""
        return []

    def memory(self, p: Roles) -> dict[str, Tensor]:
        """Fresh tensors that a layer with parameters `p` keeps from step to step.

        `before_step` and `after_step` find them beside the roles and change them in place. A checkpoint holds them, an
        adapter file does not.
        """
        return {}

    def draw(self, generator: Generator) -> Any:
        """The random choice of a step, the same for all layers. Raises UserError if training cannot begin."""
        return None

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that one training gives, each a valid `drawn` of `lower`; empty for a method of one rank."""
        return ()

    def at(self, rank: int) -> int:
        """What `lower` takes as `drawn` to evaluate at one of `ranks`. Raises UserError for another rank."""
        if not self.ranks:
            raise UserError(f"rank={rank}: this method was trained for one rank; dylora trains many")
        if rank not in self.ranks:
            least, most = self.ranks[0], self.ranks[-1]
            raise UserError(f"rank={rank}: this adapter was trained for ranks {least} to {most}, choose one of them")
        return rank

    def before_step(self, layers: Mapping[str, Roles], drawn: Any, own: Mapping[str, "Factors"]) -> Any:
        """Run before the optimizer's step, with gradients present; the result goes to `after_step` as `before`.

        `own` is path -> the method in that layer, whose alpha a rank map may have changed.
        """
        return None

    def after_step(self, layers: Mapping[str, Roles], drawn: Any, before: Any, step: int) -> None:
        """Run after the optimizer's step, with gradients still present.

        `layers` maps path -> role -> tensor; `step` counts the optimizer steps of this adapter, this one included.
        """


def not_whole(name: str, value: Any, least: int) -> list[str]:
    """One problem if a setting is no whole number of at least `least`, else none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return [] if whole and value >= least else [f"{name}={value!r}: expected a whole number, {least} or more"]


def ends_in(path: str, name: str) -> bool:
    """Whether a path is `name` or ends in its whole components."""
    return f".{path}".endswith(f".{name}")


@lru_cache(maxsize=1024)
def nearest_divisor(number: int, wanted: int, least: int) -> int:
    """The divisor of a number, of at least `least`, that is nearest to the wanted one; the smaller of two."""
    divisors = (k for k in range(least, number + 1) if number % k == 0)
    return min(divisors, key=lambda k: (abs(k - wanted), k))
