"""One run as it goes on: its optimizer, schedule, progress and best state so far, and how they are kept on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from loralab.data import is_constant, score
from loralab.data.batches import epoch_batches
from loralab.errors import UserError
from loralab.optimizers import adamw
from loralab.run.folder import RunFolder
from loralab.run.memory import Layers, by_layer, of_adapter
from loralab.run.setup import Run
from loralab.run.step import apply_gradients


@dataclass
class Progress:
    """How far a run has come; with the tensors beside it, all that a checkpoint holds."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches done in the epoch under way
    step: int = 0  # optimizer steps
    loss: float = 0.0  # sum of row losses in the epoch under way
    seconds: float = 0.0  # of training, evaluation left out; of a pass that runs share, an equal part
    tokens: int = 0  # padding left out
    counted: int = 0  # tokens of the largest padded part of the first batch, in which
    activations: dict[str, int] = field(default_factory=dict)  # these bytes were kept for backward, by layer
    best: int = -1  # index of the selected epoch in history
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def room(self) -> float:
        """Bytes of activations for each token of a padded batch."""
        return sum(self.activations.values()) / max(1, self.counted)


class Member:
    """A run among those that share a model; `generator` is the stream of its dropout."""

    def __init__(self, run: Run, folder: RunFolder, accelerator: Accelerator, generator: torch.Generator) -> None:
        s = run.settings
        self.run, self.settings, self.folder, self.generator = run, s, folder, generator
        self.accelerator = accelerator
        groups = run.adapters.parameter_groups(s.lr, s.weight_decay, s.head_lr, run.name)
        self.learned = [p for group in groups for p in group["params"]]
        self.optimizer = accelerator.prepare(adamw(groups, fused=True))
        self.steps = s.steps(len(run.train))
        self.schedule = get_scheduler(s.schedule, self.optimizer, round(s.warmup * self.steps), self.steps)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}  # state of the selected epoch
        self.said: dict[str, Tensor] = {}  # by validation split, what the selected epoch says of each row
        self.batches: list[list[int]] = []  # of the epoch under way
        self.problem: UserError | None = None  # why it cannot go on

    # ---- steps ---------------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        s, p = self.settings, self.progress
        patient = not 0 < s.patience < len(p.history) - p.best
        return self.problem is None and p.epoch < s.epochs and patient

    def next(self) -> list[int]:
        """The training rows of its next step."""
        s, p = self.settings, self.progress
        if not self.batches:
            self.batches = epoch_batches(self.run.train.lengths, s.batch_size, s.seed, p.epoch)
        return self.batches[p.batch]

    @property
    def ends_epoch(self) -> bool:
        return self.progress.batch == len(self.batches)

    def step(self, loss: float, chosen: list[int]) -> None:
        """One optimizer step; gradients are there, and `loss` is the mean over the chosen rows."""
        p = self.progress
        if not np.isfinite(loss):
            self.problem = UserError(self._not_finite(loss))
            self.optimizer.zero_grad(set_to_none=True)
            return
        apply_gradients(
            self.optimizer, self.learned, self.settings.clip, self.accelerator.clip_grad_norm_, self.schedule
        )
        p.step += 1
        p.batch += 1
        p.loss += loss * len(chosen)
        p.tokens += int(self.run.train.lengths[chosen].sum())

    def _not_finite(self, loss: float) -> str:
        p, there = self.progress, self.folder.checkpoint
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        last = f"the last good checkpoint is {there}" if there.exists() else "there is no checkpoint yet"
        return f"loss is {loss} at step {p.step + 1} (epoch {p.epoch + 1}), lr {lr:.2g}; {last}: try a lower --lr"

    # ---- epochs --------------------------------------------------------------------------------------------------

    def end_epoch(self, held_out: Any, validation: Mapping[str, Any]) -> dict[str, Any]:
        """Takes down an epoch from its logits (rows, outputs): of the held-out rows or None, and of each split."""
        s, p, run = self.settings, self.progress, self.run
        metrics = run.task.metrics
        record = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "train_loss": p.loss / len(run.train),
            "held_out": None if run.held_out is None else score(metrics, held_out, run.held_out.labels.numpy()),
            "validation": self.scores(validation),
            "seconds": p.seconds - sum(row["seconds"] for row in p.history),
        }
        said: dict[str, Tensor] = {}
        for key, rows in run.validation.items():
            logits = validation[key]
            said |= {f"{key}/logits": torch.from_numpy(logits), f"{key}/labels": rows.labels}
            record["one_class"] = not run.regression and is_constant(logits)
        p.history.append(record)
        p.epoch, p.batch, p.loss, self.batches = p.epoch + 1, 0, 0.0, []
        if p.best < 0 or self._selecting(-1) > self._selecting(p.best) or s.selection == "last":
            p.best = len(p.history) - 1
            self.best = {key: t.detach().clone() for key, t in self.state().items()}
            self.said = said
        return record

    def scores(self, validation: Mapping[str, Any]) -> dict[str, float]:
        """Every metric of the task, from the logits (rows, outputs) of each split; the first split's by its name."""
        found: dict[str, float] = {}
        for i, (key, rows) in enumerate(self.run.validation.items()):
            scores = score(self.run.task.metrics, validation[key], rows.labels.numpy())
            found |= {name if i == 0 else f"{key}/{name}": value for name, value in scores.items()}
        return found

    def _selecting(self, index: int) -> float:
        record, metric = self.progress.history[index], self.run.task.metrics[0]
        return float((record["held_out"] or record["validation"])[metric])

    def state(self) -> dict[str, Tensor]:
        return self.run.adapters.state(self.run.name)

    def layers(self) -> Layers:
        """What its memory is made of; of the model every tensor that is no other run's."""
        handle = self.run.adapters
        others = [t for name in handle.names if name != self.run.name for t in handle.state(name).values()]
        held = of_adapter(self.run.model, self.run.name, without=others)
        return by_layer(self.run.model, held, self.learned, self.optimizer, self.progress.activations)

    def take_best(self) -> None:
        """The adapter becomes what it was at the selected epoch."""
        with torch.no_grad():
            for key, t in self.state().items():
                t.copy_(self.best[key])

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        tensors = {f"live/{key}": t for key, t in self.state().items()}
        tensors |= {f"best/{key}": t for key, t in self.best.items()}
        tensors |= {f"said/{key}": t for key, t in self.said.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}": t for key, t in state.items()}
        tensors |= {f"steps/{key}": t for key, t in self.run.adapters.steps.state_dict(self.run.name).items()}
        tensors["random"] = self.generator.get_state()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.folder.write_checkpoint(vars(self.progress) | {"learning_rates": rates}, tensors)

    def load_checkpoint(self) -> bool:
        """Goes on where its folder says; False if there is no checkpoint."""
        found = self.folder.read_checkpoint()
        if found is None:
            return False
        saved, tensors = found
        rates = saved.pop("learning_rates")
        self.progress = Progress(**saved)
        with torch.no_grad():
            for key, t in self.state().items():
                t.copy_(tensors[f"live/{key}"])
        self.best, self.said = _under("best", tensors), _under("said", tensors)
        self.run.adapters.steps.load_state_dict(_under("steps", tensors), self.run.name)
        state: dict[int, dict[str, Tensor]] = {}
        for key, t in _under("optimizer", tensors).items():
            i, role = key.split("/")
            state.setdefault(int(i), {})[role] = t
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.schedule.last_epoch = self.progress.step
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.generator.set_state(tensors["random"])
        return True


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix + "/"): t for key, t in tensors.items() if key.startswith(prefix + "/")}
