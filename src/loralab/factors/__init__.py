"""Where A and B come from. A method is one file with a frozen dataclass (`init`, `lower`, `count`) and one row here."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Generator, Tensor

from loralab.factors.lora import LoRA


class Factors(Protocol):
    """The settings of a method, and how its parameters become A (r, in) and B (out, r)."""

    roles: ClassVar[tuple[str, ...]]  # names of the parameters of a layer
    learn: ClassVar[tuple[str, ...]]  # those that learn unless a recipe says otherwise
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def problems(self) -> list[str]: ...  # what is wrong with the settings, one phrase each
    def misfit(self, out_features: int, in_features: int) -> str | None: ...  # why a layer of this size cannot take it
    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]: ...
    def lower(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]: ...
    def count(self, out_features: int, in_features: int) -> int: ...


FACTORS: dict[str, type[Factors]] = {"lora": LoRA}
