"""AdaLoRA: y = W x + s B diag(E) A x; a layer's rank is what a shrinking budget leaves of it (Zhang et al., 2023).

A (r, in) and B (out, r) start random, the gates E (r,) at zero, so one (row of A, gate, column of B) is a triplet like
one of an SVD. A penalty on |A A^T - I| and |B^T B - I| keeps the triplets apart. After each step every value p with
gradient g gets a sensitivity |p g|, smoothed to its mean and to its spread about that mean; mean * spread is its score.
A triplet scores that of its gate plus the averages over its row and column, and the triplets of all layers that score
lowest, beyond the budget, have their gates set to zero. Formulas and order are those of PEFT and of the authors' code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, empty, zeros

from loralab.errors import UserError
from loralab.methods.base import Roles
from loralab.methods.lora import LoRA


@dataclass(frozen=True)
class AdaLoRA(LoRA):
    rank: int = 12
    """Rank of every layer at the start; half as much again as what is left gives the choice some room."""
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
    """How much of the spread about that mean is kept at each step; the paper's."""
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
        if not wrong and not 1 <= self.target <= self.rank:
            wrong.append(f"target_rank={self.target_rank!r}: expected 1 to rank={self.rank}")
        least = {"total_steps": 1, "tinit": 0, "tfinal": 0, "every": 1, "orthogonality": 0}
        given = {key: getattr(self, key) for key in least if getattr(self, key) is not None}
        low = [f"{key}={value!r}: expected {least[key]} or more" for key, value in given.items() if value < least[key]]
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            low.append(f"beta1={self.beta1!r}, beta2={self.beta2!r}: expected both between 0 and 1")
        if not low and self.total_steps is not None and self.phases[0] >= self.phases[1]:
            told = f"tinit={self.tinit}, tfinal={self.tfinal}, total_steps={self.total_steps}"
            low.append(f"{told}: the budget falls from step {self.phases[0]} to {self.phases[1]}, which is no step")
        return wrong + low

    def for_steps(self, total_steps: int) -> "AdaLoRA":
        return self if self.total_steps is not None else replace(self, total_steps=total_steps)

    def init(self, out_features: int, in_features: int, generator: Generator) -> dict[str, Tensor]:
        A = empty(self.rank, in_features).normal_(0, 0.02, generator=generator)
        B = empty(out_features, self.rank).normal_(0, 0.02, generator=generator)
        return {"A": A, "B": B, "E": zeros(self.rank)}

    def sizes(self, out_features: int, in_features: int) -> dict[str, int]:
        return {**super().sizes(out_features, in_features), "E": self.rank}

    def lower(self, p: Roles, drawn: Any = None) -> tuple[Tensor, Tensor]:
        return p["E"].unsqueeze(-1) * p["A"], p["B"] * self.scaling

    def memory(self, p: Roles) -> dict[str, Tensor]:
        kept = torch.ones_like(p["E"], dtype=torch.bool)  # what the last choice left
        smooth = {f"{role}.{part}": torch.zeros_like(p[role]) for role in self.roles for part in ("mean", "spread")}
        return {**smooth, "kept": kept, "step": zeros((), dtype=torch.int64)}

    def draw(self, generator: Generator) -> None:
        _ = self.phases  # known before the first step, or an error

    def before_step(self, layers: Mapping[str, Roles], drawn: Any) -> None:
        """Adds the penalty's gradient: that of |P P^T - I| is 2 (P P^T - I) P / |P P^T - I|."""
        learned = {id(p[role]): (role, p[role]) for p in layers.values() for role in "AB" if p[role].requires_grad}
        for role, t in learned.values() if self.orthogonality else []:
            P = t.detach() if role == "A" else t.detach().mT  # (r, in) or (r, out)
            off = P @ P.mT - torch.eye(len(P), dtype=P.dtype, device=P.device)  # (r, r)
            push = off @ P * (2 * self.orthogonality / len(learned) / off.norm().clamp_min(1e-12))
            push = push if role == "A" else push.mT
            t.grad = push.contiguous() if t.grad is None else t.grad.add_(push)

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, Roles], drawn: Any, kept: Any) -> None:
        first, settled = self.phases
        for p in layers.values():
            p["step"] += 1
        step = int(next(iter(layers.values()))["step"])
        if step < settled:
            for p in layers.values():
                self._observe(p)
        if step == settled or (first < step < settled and step % self.every == 0):
            self._choose(layers, step)
        if step >= settled:
            for p in layers.values():
                p["E"].masked_fill_(~p["kept"], 0.0)

    def _observe(self, p: Roles) -> None:
        for role in self.roles:
            mean, spread = p[f"{role}.mean"], p[f"{role}.spread"]
            grad = p[role].grad
            now = torch.zeros_like(p[role]) if grad is None else (p[role] * grad).abs()
            mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            spread.mul_(self.beta2).add_((now - mean).abs(), alpha=1 - self.beta2)

    def _choose(self, layers: Mapping[str, Roles], step: int) -> None:
        """Closes the gates of the triplets beyond the budget; equal scores at the border all go, as in PEFT."""
        scores = [_triplets(p) for p in layers.values()]  # (r,) each
        over = self.rank * len(layers) - self.budget(step, len(layers))
        border = torch.cat(scores).kthvalue(over).values if over else -torch.inf
        for p, score in zip(layers.values(), scores, strict=True):
            p["kept"].copy_(score > border)
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
    A, B, E = (p[f"{role}.mean"] * p[f"{role}.spread"] for role in "ABE")
    return E + (A.mean(1) + B.mean(0))


def kept_gates(layers: Mapping[str, Roles]) -> dict[str, list[bool]]:
    """path -> which gates of the layer are open; `layers`: path -> role -> tensor, as training left them."""
    return {path: (p["E"] != 0).tolist() for path, p in layers.items()}
