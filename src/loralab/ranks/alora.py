"""ALoRA: during training, the ranks that matter least move to the layers that lost none (Liu et al., 2024).

The AB-LoRA score of rank i is S(M) - S(M without i) + S(M with only i), where S is minus the loss on one batch and each
rank is switched by a gate on its row of A. S(M) is the same for all ranks and left out. Each round removes n ranks, n
being the number of layers, and adds as many elsewhere, so the budget stays. A new rank starts with B = 0, and B is
rescaled where alpha / rank changes, so the ranks that remain act as before.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from loralab.adapted import AdaptedModel
from loralab.coverage import Coverage
from loralab.errors import UserError
from loralab.inputs import evaluating
from loralab.layer import Constants
from loralab.policies import fixed_ranks
from loralab.rankmap import LayerRank, RankMap
from loralab.ranks.groups import check_matrices

Scores = dict[str, list[float]]  # path -> one score for each of its ranks
Ranks = dict[str, int]


def alora(
    adapters: AdaptedModel,
    name: str,
    train_epoch: Callable[[int], None],
    score_batch: Mapping[str, Any],
    rounds: int = 8,
    train_more: Callable[[int], None] | None = None,
    seed: int = 0,
) -> list[RankMap]:
    """Train, score and reallocate `rounds` times; returns the map after each round. The adapter has the last of them.

    `train_epoch(round)` trains for an epoch and must make its optimizer anew from `adapters.parameter_groups()`, since
    the parameters of a round are other ones; `train_more(round)` trains after each round (the paper: a quarter epoch).
    `score_batch` is what `model(**score_batch)` takes, labels included; the paper takes 32 rows held out. A round costs
    two forward passes of it for each rank.
    """
    if len(adapters.spec(name).paths) < 2:
        raise UserError("ALoRA with one adapted layer: ranks move between layers, so none can move")
    generator, maps, guard = Generator().manual_seed(seed), [], _TrainingGuard(adapters, name)
    for number in range(rounds):
        guard.run(train_epoch, number)
        maps.append(reallocate(adapters, name, scores(adapters, name, score_batch), generator))
        if train_more is not None:
            train_more(number)
    return maps


def scores(adapters: AdaptedModel, name: str, batch: Mapping[str, Any]) -> Scores:
    """The AB-LoRA score of every rank less S(M): loss without it minus loss with only it, in evaluation."""
    _check(adapters, name)
    tensors: dict[str, Any] = {path: adapters.layers[path].adapters[name] for path in adapters.spec(name).paths}
    model: Any = adapters.model
    ones = {path: torch.ones_like(p["A"][:, 0]) for path, p in tensors.items()}  # (r,)

    def loss() -> float:
        return float(model(**batch).loss)

    out: Scores = {path: [] for path in tensors}
    with torch.no_grad(), evaluating(adapters.model), adapters.use(name):
        try:
            for path, p in tensors.items():
                p["gates"] = nn.Parameter(ones[path], requires_grad=False)
            gates = {path: p["gates"] for path, p in tensors.items()}  # (r,) each
            for path, gate in gates.items():
                for i in range(len(gate)):
                    gate[i] = 0
                    without = loss()
                    for other in gates.values():
                        other.zero_()
                    gate[i] = 1
                    out[path].append(without - loss())
                    for other in gates.values():
                        other.fill_(1)
        finally:
            for p in tensors.values():
                if "gates" in p:
                    del p["gates"]
    return out


def divide(scores: Scores, ranks: Ranks, most: Ranks) -> tuple[dict[str, list[int]], Ranks]:
    """(path -> indices of the ranks it loses, path -> number of ranks it gains); both sums are equal.

    The ranks with the n lowest scores of all layers are lost, n being the number of layers in `ranks`. The layers that
    lost none gain equally many each, the remainder goes to those of the highest mean score, and none gets more than
    `most`. If there is too little room, fewer ranks move.
    """
    order = sorted((score, path, i) for path, row in scores.items() for i, score in enumerate(row))
    for n in range(min(len(ranks), len(order)), 0, -1):
        lost: dict[str, list[int]] = {}
        for _, path, i in order[:n]:
            lost.setdefault(path, []).append(i)
        winners = [path for path in ranks if path not in lost and ranks[path] < most[path]]
        winners.sort(key=lambda path: -_mean(scores.get(path, [])))
        if sum(most[path] - ranks[path] for path in winners) < n:
            continue
        gained = dict.fromkeys(winners, 0)
        while sum(gained.values()) < n:
            for path in winners:
                if sum(gained.values()) < n and ranks[path] + gained[path] < most[path]:
                    gained[path] += 1
        return lost, {path: k for path, k in gained.items() if k}
    return {}, {}


def _mean(row: list[float]) -> float:
    return sum(row) / len(row) if row else -torch.inf  # a layer without ranks has no score, so it comes last


def reallocate(adapters: AdaptedModel, name: str, scored: Scores, generator: Generator) -> RankMap:
    """Move ranks as `divide` decides, in place, and return the new map; the ranks that remain act as before."""
    _check(adapters, name)
    spec = adapters.spec(name)
    paths = spec.paths if spec.recipe.ranks is None else list(spec.recipe.ranks.layers)
    ranks = {path: len(scored.get(path, [])) for path in paths}
    layers = {path: adapters.layers[path] for path in paths}
    most = {path: min(layer.out_features, layer.in_features) for path, layer in layers.items()}
    lost, gained = divide(scored, ranks, most)
    after = RankMap({path: LayerRank(k - len(lost.get(path, [])) + gained.get(path, 0)) for path, k in ranks.items()})
    recipe = replace(spec.recipe, ranks=after)
    for path, layer in layers.items():
        kept = [i for i in range(ranks[path]) if i not in lost.get(path, [])]
        if not after.layers[path].rank:
            if name in layer.recipes:
                layer.remove(name)
        elif kept != list(range(ranks[path])) or gained.get(path):
            _change_ranks(layer, name, recipe.at(path), kept, gained.get(path, 0), generator)
    adapters.specs[name] = replace(spec, recipe=recipe, coverage=_coverage(spec, after))
    return after


def _change_ranks(layer: Any, name: str, recipe: Any, kept: list[int], more: int, generator: Generator) -> None:
    """Keep these ranks of a layer and add `more` new ones, whose B is zero."""
    pairs: list[tuple[Tensor, Tensor]] = []  # A (k, in), B (out, k)
    if kept:
        p, scaling = layer.roles(name), layer.recipes[name].factors.scaling / recipe.factors.scaling
        pairs.append((p["A"].detach()[kept], p["B"].detach()[:, kept] * scaling))
    if more:
        fresh = replace(recipe.factors, rank=more).init(layer.out_features, layer.in_features, generator)
        pairs.append((fresh["A"].to(layer.device), fresh["B"].to(layer.device)))
    A, B = (torch.cat(tensors, axis) for axis, tensors in enumerate(zip(*pairs, strict=True)))
    layer.add(name, recipe, {"A": A, "B": B}, Constants({}))


def _coverage(spec: Any, ranks: RankMap) -> Coverage:
    """The layers that have an adapter now; one that had lost all its ranks comes back under its own path."""
    back = {path: [path] for path in ranks.adapted if path not in spec.paths}
    matched = {**spec.coverage.matched, **back}
    left = [path for path in spec.coverage.left if path not in back]
    return replace(spec.coverage, matched=matched, left=left).keep(ranks.adapted)  # type: ignore[no-any-return]


def _check(adapters: AdaptedModel, name: str) -> None:
    spec = adapters.spec(name)
    check_matrices({path: adapters.layers[path] for path in spec.paths}, "ALoRA")
    r = spec.recipe
    if wrong := fixed_ranks(r.factors, r.gain, r.start):
        raise UserError(f"adapter {name!r}: ALoRA does not go with {'; '.join(wrong)}")
    if r.ranks is not None and any(layer.share or layer.gates or layer.alpha for layer in r.ranks.layers.values()):
        reason = "ALoRA moves ranks from layer to layer, so none may have a share, gates or an alpha of its own"
        raise UserError(f"adapter {name!r}: {reason}")


class _TrainingGuard:
    """Notices a stale optimizer, which holds old parameters: layers that trained in the first round stop training."""

    def __init__(self, adapters: AdaptedModel, name: str) -> None:
        self.adapters, self.name = adapters, name
        self.trained: set[str] = set()

    def run(self, train: Callable[[int], None], number: int) -> None:
        before = self._versions()
        train(number)
        now = {path for path, version in self._versions().items() if version != before.get(path)}
        if number == 0:
            self.trained = now
        if stale := sorted(self.trained & before.keys() - now):
            raise UserError(
                f"round {number + 1} trained no tensor of {stale[0]} ({len(stale)} layers): make the optimizer anew in "
                "each round, from adapters.parameter_groups()"
            )

    def _versions(self) -> dict[str, int]:
        layers = {path: self.adapters.layers[path] for path in self.adapters.spec(self.name).paths}
        return {path: sum(t._version for t in layer.roles(self.name).values()) for path, layer in layers.items()}
