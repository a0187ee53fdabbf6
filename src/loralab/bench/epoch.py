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

from loralab import models, objectives
from loralab.bench.backends import CLIP, under_peft
from loralab.bench.cases import EpochCase
from loralab.objectives import Encoding
from loralab.run.bar import Silent
from loralab.run.folder import RunFolder
from loralab.run.loop import Loop
from loralab.run.memory import Peak
from loralab.run.setup import prepare_together, splits, task_of
from loralab.run.state import RunState

Timed = tuple[int, float]  # rows, seconds
RATES = (1.0, 0.5, 0.25, 2.0)  # times the method's learning rate, where runs share passes


def peft_epoch(case: EpochCase) -> Timed:
    """An epoch of PEFT in Trainer."""
    task = task_of(case)
    regression = task.labels is None
    model, tokenizer = models.classifier(case.model, task.num_outputs, regression, torch.float32, 0)
    train = splits(task, case)[0]["train"]
    rows = objectives.of(task).encode(task, train, tokenizer, Encoding(case.max_length, train=True))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=under_peft(model, case).model,
            args=arguments(case, folder),
            train_dataset=rows_of_trainer({**rows.columns, "labels": rows.labels.tolist()}),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[clock],
        )
        trainer.train()
    return len(rows), clock.seconds


def rows_of_trainer(columns: dict[str, list[Any]]) -> Any:
    """The rows as a list, which Trainer reads without decoding them again at each access."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def arguments(case: EpochCase, folder: str) -> TrainingArguments:
    """Trainer's arguments for one epoch, without evaluation, logs or checkpoints."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=case.batch_size,
        learning_rate=case.recipe().lr,
        max_grad_norm=CLIP,
        bf16=case.precision == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
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


class TrainingOnly(Loop):
    """The loop of a run without the evaluation after an epoch."""

    def _evaluate(self, due: Sequence[RunState]) -> None:
        for state in due:
            state.progress.epoch += 1


def loralab_epoch(case: EpochCase) -> Timed:
    """An epoch of `case.together` runs that share passes, over four learning rates and as many seeds as that takes.

    The rows are those of all runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        first, lr = replace(case, out=Path(folder), clip=CLIP), case.recipe().lr
        many = [replace(first, seed=i // len(RATES), lr=lr * RATES[i % len(RATES)]) for i in range(case.together)]
        runs = prepare_together(many)
        loop = TrainingOnly(runs, [RunFolder(Path(folder))] * len(runs), Silent(), Peak())
        started = time.perf_counter()
        while loop.step():
            pass
        return sum(len(run.train) for run in runs), time.perf_counter() - started


EPOCHS: dict[str, Callable[[EpochCase], Timed]] = {"peft": peft_epoch, "loralab": loralab_epoch}
