"""AdaLoRA: y = W x + s B diag(E) A x; a layer's rank is what a shrinking budget leaves of it (Zhang et al., 2023).

A (r, in) and B (out, r) start random, the gates E (r,) at zero, so a row of A, a gate and a column of B are a triplet
like one of an SVD. A penalty on |A A^T - I| and |B^T B - I| keeps the triplets orthogonal. After each step every value
p with gradient g has a sensitivity |p g|. The score of a value is the running mean of this times the running mean
deviation. The score of a triplet is that of its gate plus the averages over its row and its column. The triplets of all
layers with the lowest scores, beyond the budget, have their gates set to zero. Formulas and order are those of PEFT and
of the authors' code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, empty, zeros

from loralab.errors import UserError
from loralab.methods.base import Factors, Roles, divided_as, not_whole, whole
from loralab.methods.lora import LoRA

FEW_CHOICES = 10  # steps with a choice of gates, below which a run says so


@dataclass(frozen=True)
class AdaLoRA(LoRA):
    rank: int = 12
    """Rank of every layer at the start; half as much again as what is left at the end gives the choice some room."""
    target_rank: int | None = None
    """Rank that is left at the end, on average over the layers; two thirds of `rank` (8 of 12) by default."""
    total_steps: int | None = None
    """Optimizer steps of the whole training, by which the budget falls; `loralab train` knows them."""
    tinit: int | None = None
    """Steps before the budget falls; a tenth of all by default, near the authors' GLUE scripts."""
    tfinal: int | None = None
    """Last steps, with the layers' ranks settled; half of all by default, near the authors' GLUE scripts."""
    every: int = 1
    """Steps between two choices; the authors use 1 on small tasks, 100 on large ones, to save time."""
    beta1: float = 0.85
    """How much of a value's mean sensitivity is kept at each step; the paper's."""
    beta2: float = 0.85
    """How much of a value's mean deviation is kept at each step; the paper's."""
    orthogonality: float = 0.5
    """Weight of the penalty, an average over all A and B; PEFT's (the paper uses 0.1 to 0.5)."""

    kind: ClassVar[str] = "adalora"
    roles: ClassVar[tuple[str, ...]] = ("A", "B", "E")
    learn: ClassVar[tuple[str, ...]] = ("A", "B", "E")
    stepped: ClassVar[bool] = True

    @property
    def scaling(self) -> float:
        return self.alpha / ((math.sqrt(self.rank) if self.stabilized else self.rank) + 1e-5)

    @property
    def target(self) -> int:
        return max(1, round(self.rank * 2 / 3)) if self.target_rank is None else self.target_rank

    @property
    def phases(self) -> tuple[int, int]:
        """(steps before the budget falls, step at which the ranks are settled)."""
        if self.total_steps is None:
            raise UserError(
                "adalora spreads its budget over the whole training: pass total_steps, the number of optimizer steps"
            )
        first = self.total_steps // 10 if self.tinit is None else self.tinit
        return first, self.total_steps - (self.total_steps // 2 if self.tfinal is None else self.tfinal)

    def problems(self) -> list[str]:
        wrong = super().problems()
        if not wrong and not (isinstance(self.target, int) and 1 <= self.target <= self.rank):
            wrong.append(f"target_rank={self.target_rank!r}: expected 1 to rank={self.rank}")
        for name, least in {"total_steps": 1, "tinit": 0, "tfinal": 0, "every": 1}.items():
            if name == "every" or getattr(self, name) is not None:
                wrong += not_whole(name, getattr(self, name), least)
        if not self.orthogonality >= 0:
            wrong.append(f"orthogonality={self.orthogonality!r}: expected 0 or more")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            wrong.append(f"beta1={self.beta1!r}, beta2={self.beta2!r}: expected both between 0 and 1")
        if not wrong and self.total_steps is not None and self.phases[0] >= self.phases[1]:
            settings = f"tinit={self.tinit}, tfinal={self.tfinal}, total_steps={self.total_steps}"
            wrong.append(
                f"{settings}: the budget falls from step {self.phases[0]} to {self.phases[1]}, which is no step"
            )
        return wrong

    def for_steps(self, total_steps: int) -> "AdaLoRA":
        made = self if self.total_steps is not None else replace(self, total_steps=total_steps)
        if wrong := made.problems():
            raise UserError("; ".join(wrong))
        made.draw()
        first = next(iter(made.choices), made.phases[1])
        if first > total_steps:
            raise UserError(
                f"total_steps={made.total_steps}, tinit={made.tinit}, every={made.every} with a run of {total_steps} "
                f"steps: the first gate would close after step {first}; leave total_steps out"
            )
        return made

    def notes(self, total_steps: int) -> list[str]:
        if self.target == self.rank:
            return [f"adalora: target_rank={self.target} is the rank, so no gate closes"]
        if self.total_steps is None:
            return []
        _, settled = self.phases
        if settled > total_steps:
            return [f"adalora: the ranks settle after step {settled}, and the run has {total_steps}"]
        if (count := len(self.choices) + 1) < FEW_CHOICES:
            return [f"adalora: the ranks fall from {self.rank} to {self.target} in {count} of {total_steps} steps"]
        return []

    @property
    def choices(self) -> range:
        """The steps before the ranks settle after which gates are closed; one more choice settles the ranks."""
        first, settled = self.phases
        return range((first // self.every + 1) * self.every, settled, self.every)

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        A = empty(self.rank, in_features).normal_(0, 0.02, generator=generator)
        B = empty(out_features, self.rank).normal_(0, 0.02, generator=generator)
        return {"A": A, "B": B, "E": zeros(self.rank)}

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {**super().sizes(out_features, in_features), "E": self.rank}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        return p["E"].unsqueeze(-1) * p["A"], p["B"] * self.scaling

    def memory(self, p: Roles) -> dict[str, Tensor]:
        kept = torch.ones_like(p["E"], dtype=torch.bool)  # (r,): gates that the last choice left open
        names = [f"{role}.{statistic}" for role in self.roles for statistic in ("mean", "spread")]
        return {**{name: torch.zeros_like(p[name.partition(".")[0]]) for name in names}, "kept": kept}

    def draw(self, generator: Generator | None = None) -> None:
        """Draw nothing. Raises UserError if the length of training is unknown, or too short to choose gates."""
        if self.phases[1] < 2:
            raise UserError(
                f"adalora with total_steps={self.total_steps} would settle the ranks after step {self.phases[1]}, "
                "before it has seen which matter: train 3 steps or more"
            )

    def before_step(self, layers: Mapping[str, Roles], drawn: Any, own: Mapping[str, Factors]) -> None:
        """Add the penalty's gradient: that of |P P^T - I| is 2 (P P^T - I) P / |P P^T - I|."""
        learned = {id(p[role]): (role, p[role]) for p in layers.values() for role in "AB" if p[role].requires_grad}
        for role, t in learned.values() if self.orthogonality else []:
            P = whole(t.detach())  # (r, in) or (out, r)
            P = P if role == "A" else P.mT  # (r, in) or (r, out)
            off = P @ P.mT - torch.eye(len(P), dtype=P.dtype, device=P.device)  # (r, r)
            push = off @ P * (2 * self.orthogonality / len(learned) / off.norm().clamp_min(1e-12))
            push = divided_as(t, (push if role == "A" else push.mT).contiguous())
            t.grad = push if t.grad is None else t.grad.add_(push)

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, Roles], drawn: Any, before: Any, step: int) -> None:
        first, settled = self.phases
        if step < settled:
            for p in layers.values():
                self._observe(p)
        if step == settled or (first < step < settled and step % self.every == 0):
            self._choose(layers, step)
        if step >= settled:
            for p in layers.values():
                p["E"].masked_fill_(~p["kept"], 0.0)

    def _observe(self, p: Roles) -> None:
        """Update the statistics of sensitivity of a layer."""
        for role in self.roles:
            mean, spread = p[f"{role}.mean"], p[f"{role}.spread"]
            grad = p[role].grad
            now = torch.zeros_like(p[role]) if grad is None else (p[role] * grad).abs()
            mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            spread.mul_(self.beta2).add_((now - mean).abs(), alpha=1 - self.beta2)

    def _choose(self, layers: Mapping[str, Roles], step: int) -> None:
        """Close the gates of the triplets beyond the budget; equal scores at the border all go, as in PEFT."""
        scores = [_triplets(p) for p in layers.values()]  # (r,) each
        over = self.rank * len(layers) - self.budget(step, len(layers))
        border = torch.cat(scores).kthvalue(over).values if over else -torch.inf
        for p, score in zip(layers.values(), scores, strict=True):
            p["kept"].copy_(divided_as(p["kept"], score > border))
            p["E"].masked_fill_(~p["kept"], 0.0)

    def budget(self, step: int, layers: int) -> int:
        """Triplets that may stay in all layers together after `step`."""
        (first, settled), most, least = self.phases, self.rank * layers, self.target * layers
        if step <= first:
            return most
        left = max(0.0, 1 - (step - first) / (settled - first))
        return int((most - least) * left**3 + least)


def _triplets(p: Roles) -> Tensor:
    """(r,): the score of each triplet of a layer."""
    A, B, E = (whole(p[f"{role}.mean"] * p[f"{role}.spread"]) for role in "ABE")
    return E + (A.mean(1) + B.mean(0))


def kept_gates(layers: Mapping[str, Roles]) -> dict[str, list[bool]]:
    """Path -> which gates of the layer are open after training; `layers` maps path -> role -> tensor."""
    return {path: (whole(p["E"]) != 0).tolist() for path, p in layers.items()}
