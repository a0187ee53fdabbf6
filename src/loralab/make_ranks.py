"""Rank maps for a training loop of one's own: `rank_map` runs a rank policy on a model and batches of its user.

`loralab train` runs the same policies on the rows of a task (run/policies.py).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loralab.adapted import HANDLE
from loralab.adapters import Adapters, attach
from loralab.errors import UserError
from loralab.inputs import on_device
from loralab.install import spec_of
from loralab.optimizers import adamw
from loralab.policies import POLICIES
from loralab.rankmap import RankMap
from loralab.ranks.alora import alora
from loralab.ranks.drop import drop_map, importance, shapes
from loralab.ranks.groups import groups
from loralab.ranks.spectrum import error_map
from loralab.recipe import NAMED, Recipe, recipe
from loralab.targets import ALL, Targets, layer_at

NAME = "policy"  # of the adapter that is trained for a while
CLIP = 1.0  # largest norm of a gradient


@dataclass(frozen=True)
class Work:
    """What a policy may use."""

    model: nn.Module
    recipe: Recipe
    batches: list[dict[str, Any]]
    layers: Mapping[str, Any]  # targets and exclude
    head: Mapping[str, Any]  # head and labels
    seed: int
    options: Mapping[str, Any]  # those of the policy

    @property
    def rank(self) -> int:
        """The rank of the method."""
        return self.recipe.factors.rank  # type: ignore[union-attr,no-any-return]


def rank_map(
    model: nn.Module,
    method: str | Recipe = "lora-drop",
    batches: Iterable[Mapping[str, Any]] = (),
    *,
    targets: Targets = ALL,
    exclude: Sequence[str] = (),
    head: bool | Sequence[str] = False,
    labels: Sequence[str] = (),
    seed: int = 0,
    **settings: Any,
) -> RankMap:
    """Make the rank map of a policy for a model that has no adapters; `attach(model, method, ranks=...)` takes it.

    `method` is one with a policy (lora-drop, alora), or any with `policy=` among the settings; the other arguments are
    those of `attach`, and the adapter that gets the map must be given the same. `batches` are what `model(**batch)`
    takes, with labels; they are read once and kept in memory. A sample of a few hundred rows will do.

    Options of a policy, among the settings: `epochs` (3) and `keep` (0.9) for drop; `rounds` (1) and `scored`, the
    batch that scores the ranks (by default the last one, which then does not train), for alora; `least` (0) for
    error-spectrum, which needs a store and no batches; `span` for groups, which needs neither.

    drop and alora train an adapter on the batches for a while, with AdamW at the recipe's `lr`. Afterwards the model
    and torch's generator are as they were, bit for bit. Where the method keeps weights in fewer bits, they train a copy
    of the model.
    Raises UserError as `attach` and the policies do, and for batches that are missing, or give no loss.
    """
    known = {key for options in OPTIONS.values() for key in options}
    r = recipe(method, **{key: value for key, value in settings.items() if key not in known})
    if r.policy is None:
        named = ", ".join(name for name, (row, _) in NAMED.items() if row.policy)
        raise UserError(
            f"method {method!r} has no rank policy: choose {named}, or policy= one of {', '.join(POLICIES)}"
        )
    if r.ranks is not None:
        raise UserError("ranks are given already, so there is no map to make: leave them out")
    if hasattr(model, HANDLE):
        raise UserError("this model has adapters already: make the map before attach, or detach() them first")
    given = {key: value for key, value in settings.items() if key in known}
    if idle := sorted(given.keys() - OPTIONS[r.policy].keys()):
        its = ", ".join(OPTIONS[r.policy]) or "none"
        raise UserError(f"policy={r.policy!r} has no option {', '.join(idle)}: it has {its}")
    kept = list(on_device(model, batches))
    work = Work(
        model, r, kept, {"targets": targets, "exclude": exclude}, {"head": head, "labels": labels}, seed,
        {**OPTIONS[r.policy], **given},
    )  # fmt: skip
    return MAKERS[r.policy](work)


def _drop(work: Work) -> RankMap:
    """LoRA-drop: a short training, the importance of every layer, the map."""
    _need(work, 1)
    with _trial(work) as adapters:
        optimizer = adamw(adapters.parameter_groups())
        for _ in range(work.options["epochs"]):
            _train(adapters, work.batches, optimizer)
        scores = importance(adapters, NAME, work.batches)
        return drop_map(scores, shapes(adapters, NAME), work.rank, work.options["keep"])


def _alora(work: Work) -> RankMap:
    """ALoRA: rounds of an epoch, each followed by the scores of all ranks and a move of the worst."""
    scored = work.options["scored"]
    _need(work, 1 if scored is not None else 2)
    trained, scored = (work.batches, scored) if scored is not None else (work.batches[:-1], work.batches[-1])
    with _trial(work) as adapters:

        def train_epoch(_: int) -> None:
            _train(adapters, trained, adamw(adapters.parameter_groups()))

        return alora(adapters, NAME, train_epoch, scored, work.options["rounds"], seed=work.seed)[-1]


def _error_spectrum(work: Work) -> RankMap:
    """The map of the weights' rounding errors."""
    spec = spec_of(Adapters(work.model), NAME, replace(work.recipe, policy=None), {}, **work.layers, **work.head)
    layers = {path: layer_at(work.model, path) for path in spec.paths}
    return error_map(layers, work.recipe.store or "", work.rank, work.options["least"])


def _groups(work: Work) -> RankMap:
    """The map of the layers' paths and shapes."""
    return groups(work.model, rank=work.rank, span=work.options["span"], **work.layers)


OPTIONS: dict[str, dict[str, Any]] = {  # policy -> its options and their defaults
    "drop": {"epochs": 3, "keep": 0.9},
    "alora": {"rounds": 1, "scored": None},
    "error-spectrum": {"least": 0},
    "groups": {"span": None},
}
MAKERS: dict[str, Callable[[Work], RankMap]] = {
    "drop": _drop,
    "alora": _alora,
    "error-spectrum": _error_spectrum,
    "groups": _groups,
}


def _need(work: Work, least: int) -> None:
    """Raise UserError for too few batches."""
    if len(work.batches) < least:
        raise UserError(
            f"policy={work.recipe.policy!r} trains on data, and got {len(work.batches)} batches: pass {least} or more, "
            "each what model(**batch) takes, with labels"
        )


@contextmanager
def _trial(work: Work) -> Iterator[Adapters]:
    """Give the model a fresh adapter for a while; afterwards it is as it was, and torch's generator too."""
    model = copy.deepcopy(work.model) if work.recipe.store else work.model  # what is stored would stay rounded
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng():
        torch.manual_seed(work.seed)  # dropout
        adapters = attach(
            model, replace(work.recipe, policy=None), name=NAME, seed=work.seed, batches=work.batches, **work.layers,
            **work.head,
        )  # fmt: skip
        try:
            yield adapters
        finally:
            adapters.detach()
            for module, training in modes.items():
                module.training = training


def _train(adapters: Adapters, batches: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Train one epoch, with the loss that the model itself gives."""
    model = adapters.model.train()
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in batches:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise UserError(f"{type(model).__name__} gives no loss for these batches: put labels into each of them")
        loss.backward()
        nn.utils.clip_grad_norm_(learned, CLIP)
        optimizer.step()
        optimizer.zero_grad()
