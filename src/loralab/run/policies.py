"""Run a rank policy: how a run gets its rank map before its first step, and what that costs.

`drop` is LoRA-drop: a short training on a sample stratified by label, the importance of every layer, the map. `alora`
is ALoRA: rounds of one epoch over such a sample, the scores of all ranks on rows left out of it, and a move of ranks.
The run itself then starts on a fresh model and head. `error-spectrum` uses the weights only, `groups` paths and shapes.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loralab import fast, models
from loralab.adapters import Adapters, attach
from loralab.data import Split, held_out
from loralab.data.batches import Rows, collate, epoch_batches, sorted_batches
from loralab.errors import UserError
from loralab.objectives import Objective
from loralab.optimizers import adamw
from loralab.rankmap import RankMap
from loralab.ranks.alora import alora
from loralab.ranks.drop import drop_map, importance, shapes
from loralab.ranks.groups import groups as layer_groups
from loralab.ranks.spectrum import error_map
from loralab.recipe import Recipe, from_json
from loralab.run.records import read_facts
from loralab.run.settings import Settings
from loralab.run.step import step
from loralab.targets import cover, layer_at

LEAST_ROWS, MOST_ROWS = 256, 1000  # limits of the sample, else a tenth of the training rows
EPOCHS = 3  # the paper says "a few" and no more
SCORED = 32  # rows of the sample that score ranks and do not train: the batch of ALoRA's section 3.3


@dataclass(frozen=True)
class PolicyInput:
    """What a policy may use."""

    settings: Settings
    recipe: Recipe
    objective: Objective
    rows: Rows  # the training rows
    sha256: str  # of the data
    labels: tuple[str, ...]
    tokenizer: Any
    fresh: Callable[[], nn.Module]  # loads the model anew
    start_data: Callable[[], dict[str, Any]]  # what `attach` takes for a start that looks at data


def with_ranks(work: PolicyInput) -> tuple[Recipe, dict[str, Any] | None]:
    """(the recipe with the rank map of its policy, what making it cost); a resumed run has both in its run.json.

    Raises UserError for several processes, and for a map that the policy can never change.
    """
    recipe, s = work.recipe, work.settings
    if recipe.policy is None or recipe.ranks is not None:
        return recipe, None
    if s.resume and (s.folder / "run.json").exists():
        before = read_facts(s.folder)
        return from_json(before.get("recipe") or {}), before.get("plan")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"policy={recipe.policy!r} runs in one process: make the map there, then give every process --ranks"
        )
    started = time.perf_counter()
    ranks, steps, rows = MAKERS[recipe.policy](work)
    cost = {"name": recipe.policy, "seconds": time.perf_counter() - started, "steps": steps, "rows": rows}
    return replace(recipe, ranks=ranks), cost


def note(recipe: Recipe) -> str:
    """The map that a policy gave, and whether it differs from having no policy."""
    ranks = recipe.ranks
    assert ranks is not None
    text = f"policy {recipe.policy} gave {ranks}"
    return f"{text}: no layer differs from another, as without a policy" if ranks.even else text


def drop(work: PolicyInput) -> tuple[RankMap, int, int]:
    """(map, optimizer steps, rows of the sample) of LoRA-drop."""
    s, sample = work.settings, _sample(work)
    with _trial_adapter(work) as adapters:
        steps = _train(adapters, work, sample, range(EPOCHS), s.precision == torch.bfloat16)
        lengths = work.rows.lengths[sample]
        batches = (_batch(work, sample, places, adapters) for places in sorted_batches(lengths, 2 * s.batch_size))
        scores = importance(adapters, "policy", batches)
    rank: int = work.recipe.factors.rank  # type: ignore[union-attr]
    return drop_map(scores, shapes(adapters, "policy"), rank, s.keep), steps, len(sample)


def move_ranks(work: PolicyInput) -> tuple[RankMap, int, int]:
    """(map, optimizer steps, rows of the sample) of ALoRA; a few rows of the sample score and do not train."""
    s, sample, steps = work.settings, _sample(work), 0
    if work.rows.sequences > 1:
        raise UserError(
            f"policy='alora' with objective {work.objective.name}: the model itself has no loss of its rows"
        )
    trained, scored = _split(work, sample, 0.5, SCORED)  # at most a half of a very small sample

    def train_epoch(number: int) -> None:
        nonlocal steps
        steps += _train(adapters, work, trained, [number], autocast)

    with _trial_adapter(work) as adapters:
        autocast = fast.enable(adapters.model, s.precision, s.speed).autocast  # hundreds of passes score
        batch = _batch(work, scored, list(range(len(scored))), adapters)
        device = batch["input_ids"].device
        batch.setdefault("labels", work.rows.labels[scored].to(device))  # those of tokens are there already
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            maps = alora(adapters, "policy", train_epoch, batch, s.rounds, seed=s.seed)
    return maps[-1], steps, len(sample)


def error_spectrum(work: PolicyInput) -> tuple[RankMap, int, int]:
    """(map, 0, 0) of the weights' rounding errors."""
    s, recipe, model = work.settings, work.recipe, work.fresh()
    heads = attach(model, "head", head=True).spec(None).heads
    assert recipe.store is not None
    layers = {path: layer_at(model, path) for path in cover(model, **s.chosen_layers, outside=heads).paths}
    return error_map(layers, recipe.store, recipe.factors.rank), 0, 0  # type: ignore[union-attr]


def groups(work: PolicyInput) -> tuple[RankMap, int, int]:
    """(map, 0, 0) of the layers' paths and shapes."""
    s = work.settings
    with torch.random.fork_rng(), FakeTensorMode():  # sizes without weights
        model = models.blank(s.model, len(work.labels) if work.objective.new_head else None, work.objective.task_type)
    return layer_groups(model, s.targets, work.recipe.factors.rank, s.span, exclude=s.exclude), 0, 0  # type: ignore[union-attr]


# name of a policy -> (map, optimizer steps, rows)
MAKERS: dict[str, Callable[[PolicyInput], tuple[RankMap, int, int]]] = {
    "drop": drop,
    "alora": move_ranks,
    "error-spectrum": error_spectrum,
    "groups": groups,
}


@contextmanager
def _trial_adapter(work: PolicyInput) -> Iterator[Adapters]:
    """A fresh model with a fresh adapter named "policy"; torch's global generator is restored afterwards."""
    s = work.settings
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)  # dropout
        model = work.fresh().to("cuda" if s.gpu else "cpu")
        common: dict[str, Any] = {**s.chosen_layers, "labels": work.labels, "seed": s.seed, **work.start_data()}
        yield attach(model, replace(work.recipe, policy=None), name="policy", head=work.objective.new_head, **common)


def _sample(work: PolicyInput) -> list[int]:
    """A tenth of the training rows, stratified by label."""
    rows = list(range(len(work.rows)))
    if len(rows) <= LEAST_ROWS:
        return rows
    return _split(work, rows, max(0.1, LEAST_ROWS / len(rows)), MOST_ROWS)[1]


def _split(work: PolicyInput, rows: list[int], fraction: float, most: int) -> tuple[list[int], list[int]]:
    """(the other rows, a fraction of the rows but at most `most`), both stratified by label."""
    labels = work.rows.labels[rows]
    split = Split([()] * len(rows), labels.tolist())
    kept, out = held_out(split, work.sha256, not labels.is_floating_point(), fraction, most)
    return [rows[i] for i in kept], [rows[i] for i in out]


def _batch(work: PolicyInput, sample: list[int], places: list[int], adapters: Adapters) -> dict[str, torch.Tensor]:
    device = next(adapters.model.parameters()).device
    return collate(work.rows, [sample[i] for i in places], work.tokenizer, device)


def _train(adapters: Adapters, work: PolicyInput, sample: list[int], epochs: Iterable[int], autocast: bool) -> int:
    """Train on the sample for some epochs with one optimizer at a constant learning rate; returns the steps."""
    s, steps = work.settings, 0
    groups = adapters.parameter_groups(lr=s.lr, weight_decay=s.weight_decay, head_lr=s.head_lr)
    optimizer = adamw(groups)
    learned = [p for group in groups for p in group["params"]]
    model = adapters.model.train()
    for epoch in epochs:
        for places in epoch_batches(work.rows.lengths[sample], s.batch_size, s.seed, epoch):
            batch = _batch(work, sample, places, adapters)
            device = batch["input_ids"].device
            labels = work.rows.labels[[sample[i] for i in places]].to(device)
            weight = work.rows.weight([sample[i] for i in places])
            step(model, work.objective, batch, labels, weight, optimizer, learned, s.clip, autocast)
            steps += 1
    return steps
