"""Plans: what a run does before its first step to get its rank map, with what that cost.

`drop` is LoRA-drop: a short training on a sample stratified by label, the importance of every layer, the map. `alora`
is ALoRA: rounds of an epoch over such a sample, the scores of all ranks on rows left out of it, and a move of ranks.
The run then begins anew, on a fresh model and head. `error-spectrum` looks at the weights only,
`groups` at paths and shapes.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loralab import fast, models
from loralab.adapters import Adapters, attach
from loralab.data import Split, held_out
from loralab.data.batches import Rows, collate, epoch_batches, sorted_batches
from loralab.disk import read_header
from loralab.errors import UserError
from loralab.optimizers import adamw
from loralab.rankmap import RankMap
from loralab.ranks.alora import alora
from loralab.ranks.drop import drop_map, importance, shapes
from loralab.ranks.groups import groups as layer_groups
from loralab.ranks.spectrum import error_map
from loralab.recipe import Recipe, from_json
from loralab.run.settings import Settings
from loralab.run.step import step
from loralab.targets import cover

LEAST_ROWS, MOST_ROWS = 256, 1000  # of the sample, which is a tenth of the training rows between these
EPOCHS = 3  # "a few", and LoRA-drop's text does not say more
SCORED = 32  # rows of the sample that score ranks and do not train: the batch of ALoRA's section 3.3


@dataclass(frozen=True)
class Work:
    """What a plan may use."""

    settings: Settings
    recipe: Recipe
    rows: Rows  # the training rows
    sha256: str  # of the data
    labels: tuple[str, ...]
    tokenizer: Any
    fresh: Callable[[], nn.Module]  # loads the model anew
    seen: Callable[[], Iterable[Mapping[str, Any]]]  # batches for a start that looks at data


def planned(work: Work) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with its rank map, and what making it cost; a run that goes on has both in its run.json."""
    recipe, s = work.recipe, work.settings
    if recipe.policy is None or recipe.ranks is not None:
        return recipe, None
    if s.resume and (s.folder / "run.json").exists():
        before = read_header(s.folder / "run.json")
        return from_json(before["recipe"]), before["plan"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"policy={recipe.policy!r} runs in one process: make the map there, then give every process --ranks"
        )
    started = time.perf_counter()
    ranks, steps, rows = POLICIES[recipe.policy](work)
    cost = {"name": recipe.policy, "seconds": time.perf_counter() - started, "steps": steps, "rows": rows}
    return replace(recipe, ranks=ranks), cost


def drop(work: Work) -> tuple[RankMap, int, int]:
    """(map, optimizer steps, rows of the sample) of LoRA-drop."""
    s, sample = work.settings, _sample(work)
    with _begun(work) as adapters:
        steps = _train(adapters, work, sample, range(EPOCHS), s.precision == torch.bfloat16)
        lengths = work.rows.lengths[sample]
        batches = (_batch(work, sample, places, adapters) for places in sorted_batches(lengths, 2 * s.batch_size))
        scores = importance(adapters, "policy", batches)
    rank: int = work.recipe.factors.rank  # type: ignore[union-attr]
    return drop_map(scores, shapes(adapters, "policy"), rank, s.keep), steps, len(sample)


def moved(work: Work) -> tuple[RankMap, int, int]:
    """(map, optimizer steps, rows of the sample) of ALoRA; a few rows of the sample score and do not train."""
    s, sample, steps = work.settings, _sample(work), 0
    trained, scored = _divided(work, sample, 0.5, SCORED)  # a half of a very small sample

    def train_epoch(number: int) -> None:
        nonlocal steps
        steps += _train(adapters, work, trained, [number], autocast)

    with _begun(work) as adapters:
        _, autocast = fast.quicken(adapters.model, s.speed, s.precision)  # hundreds of passes score
        batch = _batch(work, scored, list(range(len(scored))), adapters)
        device = batch["input_ids"].device
        batch["labels"] = work.rows.labels[scored].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            maps = alora(adapters, "policy", train_epoch, batch, s.rounds, seed=s.seed)
    return maps[-1], steps, len(sample)


def error_spectrum(work: Work) -> tuple[RankMap, int, int]:
    """(map, 0, 0): the weights alone decide."""
    s, recipe, model = work.settings, work.recipe, work.fresh()
    heads = attach(model, "head", head=True).spec(None).heads
    assert recipe.store is not None
    layers = {path: model.get_submodule(path) for path in cover(model, s.targets, heads).paths}
    return error_map(layers, recipe.store, recipe.factors.rank), 0, 0  # type: ignore[union-attr]


def groups(work: Work) -> tuple[RankMap, int, int]:
    """(map, 0, 0): the layers' paths and shapes alone decide."""
    s = work.settings
    with torch.device("meta"):  # sizes without weights
        model = models.blank(s.model, len(work.labels))
    return layer_groups(model, s.targets, work.recipe.factors.rank, s.span), 0, 0  # type: ignore[union-attr]


POLICIES: dict[str, Callable[[Work], tuple[RankMap, int, int]]] = {
    "drop": drop,
    "alora": moved,
    "error-spectrum": error_spectrum,
    "groups": groups,
}


@contextmanager
def _begun(work: Work) -> Iterator[Adapters]:
    """A fresh model with a fresh adapter, "policy"; what is drawn meanwhile leaves torch's generator as it was."""
    s = work.settings
    with torch.random.fork_rng():
        torch.manual_seed(s.seed)  # dropout
        model = work.fresh().to("cuda" if torch.cuda.is_available() else "cpu")
        given: dict[str, Any] = {"targets": s.targets, "labels": work.labels, "seed": s.seed, "batches": work.seen()}
        yield attach(model, replace(work.recipe, policy=None), name="policy", head=True, **given)


def _sample(work: Work) -> list[int]:
    """A tenth of the training rows, stratified by label."""
    every = list(range(len(work.rows)))
    if len(every) <= LEAST_ROWS:
        return every
    return _divided(work, every, max(0.1, LEAST_ROWS / len(every)), MOST_ROWS)[1]


def _divided(work: Work, rows: list[int], fraction: float, most: int) -> tuple[list[int], list[int]]:
    """(the others, a fraction of the rows but at most so many), both stratified by label."""
    labels = work.rows.labels[rows]
    split = Split([()] * len(rows), labels.tolist())
    kept, out = held_out(split, work.sha256, not labels.is_floating_point(), fraction, most)
    return [rows[i] for i in kept], [rows[i] for i in out]


def _batch(work: Work, sample: list[int], places: list[int], adapters: Adapters) -> dict[str, torch.Tensor]:
    device = next(adapters.model.parameters()).device
    return collate(work.rows, [sample[i] for i in places], work.tokenizer, device)


def _train(adapters: Adapters, work: Work, sample: list[int], epochs: Iterable[int], autocast: bool) -> int:
    """Passes over the sample with one optimizer at a constant learning rate; returns its steps."""
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
            step(model, batch, labels, optimizer, learned, s.clip, autocast)
            steps += 1
    return steps
