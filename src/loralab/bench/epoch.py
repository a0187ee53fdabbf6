"""A whole epoch of a task on each side, in batches of rows of like length, padded to the longest of a batch.

PEFT runs in Hugging Face's Trainer as its users run it (bf16=True for bfloat16, rows grouped by length), loralab in the
loop of `loralab train`. The clock runs from before the first batch is drawn to after the last step, without evaluation.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from loralab import data, models
from loralab.bench.cases import EpochCase
from loralab.bench.sides import CLIP, under_peft
from loralab.data.batches import Rows, encode
from loralab.recipe import recipe
from loralab.run import Settings
from loralab.run.bar import Silent
from loralab.run.folder import RunFolder
from loralab.run.loop import Loop
from loralab.run.memory import Peak
from loralab.run.setup import prepare_together
from loralab.run.state import Member

Timed = tuple[int, float]  # rows, seconds
TIMES = (1.0, 0.5, 0.25, 2.0)  # of the method's rate, where runs share passes


def peft_epoch(case: EpochCase) -> Timed:
    import datasets

    none: dict[str, Any] = {"text": (), "label": None, "validation": None}
    task = data.load(case.task, Path(case.data) if case.data else None, **none, regression=None)
    regression = task.labels is None
    model, tokenizer = models.classifier(case.model, task.num_outputs, regression, torch.float32, 0)
    rows = limited(encode(task.train, tokenizer, case.max_length, regression), case.rows)
    rows_of_trainer = datasets.Dataset.from_dict({**rows.columns, "labels": rows.labels.tolist()})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=under_peft(model, case).model,
            args=arguments(case, folder),
            train_dataset=rows_of_trainer,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[clock],
        )
        trainer.train()
    return len(rows), clock.seconds


def arguments(case: EpochCase, folder: str) -> TrainingArguments:
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=case.batch_size,
        learning_rate=recipe(case.method).lr,
        max_grad_norm=CLIP,
        bf16=case.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of the epoch."""

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started


class Unscored(Loop):
    """The loop of a run without the evaluation after an epoch."""

    def _end_epochs(self, ended: Sequence[Member]) -> None:
        for member in ended:
            member.progress.epoch += 1


def loralab_epoch(case: EpochCase) -> Timed:
    """Of as many runs as share passes, of four rates and the seeds that this takes; their rows together."""
    with tempfile.TemporaryDirectory() as folder:
        first = Settings(
            task=case.task,
            data=Path(case.data) if case.data else None,
            model=case.model,
            method=case.method,
            targets=case.targets,
            dtype=case.dtype,  # type: ignore[arg-type]
            batch_size=case.batch_size,
            max_length=case.max_length,
            clip=CLIP,
            epochs=1,
            selection="last",
            out=Path(folder),
        )
        lr = recipe(case.method).lr
        many = [replace(first, seed=i // len(TIMES), lr=lr * TIMES[i % len(TIMES)]) for i in range(case.together)]
        runs = [replace(run, train=limited(run.train, case.rows)) for run in prepare_together(many)]
        loop = Unscored(runs, [RunFolder(Path(folder))] * len(runs), Silent(), Peak())
        started = time.perf_counter()
        while loop.step():
            pass
        return sum(len(run.train) for run in runs), time.perf_counter() - started


def limited(rows: Rows, count: int | None) -> Rows:
    """The first rows; all where no count is given."""
    columns = {key: column[:count] for key, column in rows.columns.items()}
    return replace(rows, columns=columns, labels=rows.labels[:count])


SIDES: dict[str, Callable[[EpochCase], Timed]] = {"peft": peft_epoch, "loralab": loralab_epoch}
