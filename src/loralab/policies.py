"""Rank policies: the ways to make a rank map before a run, and which recipes each fits. run/policies.py runs them."""

from dataclasses import dataclass

from loralab.methods.base import Factors
from loralab.methods.lora import LoRA
from loralab.methods.starts import STARTS


@dataclass(frozen=True)
class Policy:
    """One way to make a rank map."""

    meaning: str
    shares: bool = False
    """Layers of its maps may share one A and B."""
    moves: bool = False
    """Ranks move from layer to layer while the adapter trains."""
    stored: bool = False
    """It needs the rounding error of a store of few bits."""


POLICIES = {
    "drop": Policy("LoRA-drop: a short run, then layers of small output share one pair per kind", shares=True),
    "alora": Policy("ALoRA: short rounds, and after each the ranks that matter least go to other layers", moves=True),
    "error-spectrum": Policy("ranks go where a store of few bits errs most; no training", stored=True),
    "groups": Policy("layers of one kind and shape share, for superlora as one group; no training", shares=True),
}


def problems(policy: str | None, factors: Factors | None, gain: bool, start: str, store: str | None) -> list[str]:
    """Why a recipe cannot have its policy, whatever the model, one phrase each."""
    if policy is None:
        return []
    if policy not in POLICIES:
        return [f"policy={policy!r}: choose one of {', '.join(POLICIES)}"]
    if factors is None:
        return [f"policy={policy!r} with factors=None: no layer is adapted"]
    wanted = POLICIES[policy]
    wrong = [f"policy={policy!r} with {reason}" for reason in fixed_ranks(factors, gain, start)] if wanted.moves else []
    if wanted.stored and store is None:
        wrong.append(
            f"policy={policy!r} with store=None: no weight is rounded, so there is no rounding error to measure"
        )
    return wrong


def fixed_ranks(factors: Factors | None, gain: bool, start: str) -> list[str]:
    """Why the ranks of a recipe cannot move: only s B A with B = 0 at the start stays the same when a rank is added."""
    wrong = []
    if factors is None or type(factors).lower is not LoRA.lower or factors.stepped:
        wrong.append(f"factors={type(factors).__name__}: only the ranks of plain s B A move")
    if gain:
        wrong.append(f"gain={gain}: a layer that loses all its ranks would lose its gain")
    if start in STARTS and not STARTS[start].zero:
        wrong.append(f"start={start!r}: an added rank starts from zero, so all must")
    return wrong
