"""Where A and B come from. A method is one file with a frozen dataclass and one row here."""

from loralab.factors.adalora import AdaLoRA
from loralab.factors.base import Factors as Factors
from loralab.factors.delta import DeltaLoRA
from loralab.factors.dylora import DyLoRA
from loralab.factors.lora import LoRA
from loralab.factors.precond import PreconditionedLoRA
from loralab.factors.superlora import SuperLoRA
from loralab.factors.vera import VeRA

FACTORS: dict[str, type[Factors]] = {
    "lora": LoRA,
    "vera": VeRA,
    "dylora": DyLoRA,
    "delta-lora": DeltaLoRA,
    "adalora": AdaLoRA,
    "lora-fa-precond": PreconditionedLoRA,
    "superlora": SuperLoRA,
}
