"""Fit a training step into a given memory, by what costs least: smaller parts of the batch, recomputed activations,
smaller weights.

    *_, chosen = fit(settings, room=2_000_000_000)
    train(replace(settings, **chosen.settings))

Parts and recomputing leave the gradient as it is, up to rounding; a smaller store of the weights does not. The batch of
an optimizer step stays the same in all of them. Evaluation takes parts too, of twice the rows, and keeps nothing for
backward.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from loralab import objectives
from loralab.data.batches import batch_width
from loralab.disk import size_text
from loralab.errors import UserError
from loralab.run.estimate import Estimate, EstimateSettings, estimate
from loralab.run.records import read_facts
from loralab.run.settings import Settings
from loralab.run.setup import task_of, training_rows

WAYS: tuple[dict[str, Any], ...] = (  # changes beside the number of parts, in the order in which they are tried
    {},
    {"checkpointing": True},
    {"store": "int8"},
    {"store": "nf4-dq"},
    {"store": "nf4-dq", "checkpointing": True},
)


@dataclass(frozen=True)
class Rung:
    """One way to take a step."""

    changes: dict[str, Any]  # settings that differ from those that were given, without the number of parts
    parts: int  # of the batch of a step
    rows: int  # of the largest part
    estimate: Estimate
    fits: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What a run has to set."""
        return {**self.changes, "accumulate": self.parts}

    def __str__(self) -> str:
        """The changes in words that a message names settings with."""
        each = f"{self.rows} row{'s' * (self.rows > 1)} at a time"
        of = f"accumulate={self.parts}, {each}" if self.parts > 1 else "the whole batch at once"
        return ", ".join([of, *(f"{key}={value!r}" for key, value in self.changes.items())])


def ladder(
    step: EstimateSettings, room: int, parts: int = 1, sequences: int = 1, divisible: bool = True
) -> Iterator[Rung]:
    """Yield what is tried until something fits in `room` bytes, that last; every try, if nothing does.

    `step` has the rows of a whole optimizer step as its batch size, each of so many `sequences`; they are in `parts`
    already. Of a way that does not fit with a row at a time no other number of parts is tried. What model or method do
    not allow is left out. Raises UserError for a step that cannot be.
    """

    def rung(changes: dict[str, Any], count: int) -> Rung:
        part = -(-step.batch_size // count)  # rows
        found = estimate(replace(step, **changes, batch_size=part * sequences))
        return Rung(changes, count, part, found, found.peak <= room)

    counts = _counts(step.batch_size, parts, divisible)
    for changes in WAYS:
        if any(getattr(step, key) not in (None, False) for key in changes):
            continue  # it was given
        try:
            yield (first := rung(changes, counts[0]))
        except UserError:
            if not changes:
                raise
            continue
        if first.fits:
            return
        last = rung(changes, counts[-1])
        for count in counts[1:-1] if last.fits else ():
            yield (between := rung(changes, count))
            if between.fits:
                return
        if len(counts) > 1:
            yield last
        if last.fits:
            return


def _counts(rows: int, parts: int, divisible: bool) -> list[int]:
    """Return numbers of parts that a batch can be in: as given, then twice as many again and again."""
    counts = [parts]
    while divisible and counts[-1] < rows:
        counts.append(min(2 * counts[-1], rows))
    return counts


def fit(settings: Settings, room: int) -> list[Rung]:
    """Return what was tried to keep a run within `room` bytes; the last fits. It reads the rows, and no weights.

    Of several processes each has its share of the rows. Raises UserError, with the least that the run needs, if nothing
    fits.
    """
    task = task_of(settings)
    rows, *_ = training_rows(settings)
    objective, widest = objectives.of(task), min(batch_width(int(rows.lengths.max())), rows.max_length)
    mine = -(-settings.batch_size // int(os.environ.get("WORLD_SIZE", "1")))  # rows of this process
    step = EstimateSettings.of_run(settings, objective.outputs(task) or 1, task.objective, mine, widest)
    divisible = not objective.whole(task)
    tried = list(ladder(step, room, settings.accumulate, rows.sequences, divisible))
    if tried[-1].fits:
        return tried
    least = min(tried, key=lambda rung: rung.estimate.peak)
    raise UserError(
        f"memory={size_text(room)!r} is too little: a step of {settings.batch_size} rows of up to {step.max_length} "
        f"tokens takes about {size_text(least.estimate.peak)} at least ({least}): give it that, a smaller max_length "
        "or a smaller model"
    )


def began_with(settings: Settings) -> dict[str, Any] | None:
    """Return what was chosen when the run that `settings` resume began; None if none is there.

    An estimate varies a little, and a run goes on with its own settings.
    """
    if not (settings.resume and (settings.folder / "run.json").is_file()):
        return None
    before = read_facts(settings.folder).get("settings", {})
    return {key: before[key] for key in ("accumulate", "checkpointing", "store") if key in before}
