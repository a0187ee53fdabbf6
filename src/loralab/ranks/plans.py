"""Plans: the ways to make a rank map before a run, and what each asks of a recipe; train/plan.py runs them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loralab.factors.lora import LoRA
from loralab.starts import STARTS

if TYPE_CHECKING:
    from loralab.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    does: str
    shares: bool = False
    """Layers of its maps may share one A and B."""
    moves: bool = False
    """Ranks move from layer to layer while the adapter trains."""
    stored: bool = False
    """It goes by what a store of few bits rounds away."""


PLANS = {
    "drop": Plan("LoRA-drop: a short run, then layers whose update says little share one pair per kind", shares=True),
    "alora": Plan("ALoRA: short rounds, and after each the ranks that matter least go to other layers", moves=True),
    "error-spectrum": Plan("ranks go where a store of few bits errs most; no training", stored=True),
    "groups": Plan("layers of one kind and shape share, for superlora as one group; no training", shares=True),
}


def problems(r: "Recipe") -> list[str]:
    """Why a recipe cannot have its plan, whatever the model, one phrase each."""
    if r.plan is None:
        return []
    if r.plan not in PLANS:
        return [f"plan={r.plan!r}: choose one of {', '.join(PLANS)}"]
    if r.factors is None:
        return [f"plan={r.plan!r} with factors=None: no layer is adapted"]
    plan = PLANS[r.plan]
    wrong = [f"plan={r.plan!r} with {told}" for told in fixed(r)] if plan.moves else []
    if plan.stored and r.store is None:
        wrong.append(f"plan={r.plan!r} with store=None: no weight is rounded, so there is no error to go by")
    return wrong


def fixed(r: "Recipe") -> list[str]:
    """What of a recipe keeps its ranks from moving: only s B A, from B = 0 on, acts as before when a rank comes."""
    wrong = []
    if r.factors is None or type(r.factors).lower is not LoRA.lower or r.factors.stepped:
        wrong.append(f"factors={type(r.factors).__name__}: only the ranks of plain s B A move")
    if r.gain:
        wrong.append(f"gain={r.gain}: a layer that loses all its ranks would lose its gain")
    if r.start in STARTS and not STARTS[r.start].zero:
        wrong.append(f"start={r.start!r}: a rank that comes starts from zero, so all must")
    return wrong
