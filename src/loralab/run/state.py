"""The state of one run while it trains: optimizer, schedule, progress and best epoch so far; and its checkpoints."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from loralab.data.batches import epoch_batches
from loralab.data.metrics import upward
from loralab.errors import UserError
from loralab.optimizers import adamw
from loralab.run import generators
from loralab.run.folder import RunFolder
from loralab.run.memory import Layers, by_layer, of_adapter
from loralab.run.room import ADVICE, is_out_of_memory
from loralab.run.settings import seconds
from loralab.run.setup import PreparedRun
from loralab.run.step import apply_gradients


class RunFailed(UserError):
    """A run ended by an exception that is no fault of its settings; `traceback` is its text."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class OutOfMemory(RunFailed):
    """A run ended because its process had too little memory, with no other run beside it in the process."""


def failure(error: Exception, folder: RunFolder) -> UserError:
    """Return what a run that raised `error` comes to; the traceback of an unexpected one is kept in its folder."""
    if isinstance(error, UserError):
        return error
    text = "".join(traceback.format_exception(error))
    file = folder.write_traceback(text)
    message = " ".join(str(error).split())
    where = "its traceback cannot be written" if file is None else f"its traceback is in {file}"
    said = f"{folder.path} failed: {type(error).__name__}: {message[:300]}"
    if is_out_of_memory(error):
        return OutOfMemory(f"{said}; {ADVICE}; {where}", text)
    return RunFailed(f"{said}; {where}", text)


@dataclass
class Progress:
    """How far a run has come. A checkpoint holds this and tensors."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches done in the current epoch
    step: int = 0  # optimizer steps
    loss: float = 0.0  # sum of the losses of rows since the last evaluation
    weight: int = 0  # what these rows weigh
    rows: int = 0  # trained on
    seconds: float = 0.0  # of training, without evaluation; of a shared pass an equal share
    tokens: int = 0  # trained on, without padding
    counted: int = 0  # tokens, with padding, of the largest part of the first batch, for which
    activations: dict[str, int] = field(default_factory=dict)  # these bytes were kept for backward, by layer
    best: int = -1  # index of the selected epoch in history
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of activations for each token of a padded batch."""
        return sum(self.activations.values()) / max(1, self.counted)


class RunState:
    """A run that trains, alone or beside others over the same model; its dropout draws from `generator`."""

    def __init__(self, run: PreparedRun, folder: RunFolder, accelerator: Accelerator, generator: torch.Generator):
        s = run.settings
        self.run, self.settings, self.folder, self.generator = run, s, folder, generator
        self.accelerator = accelerator
        groups = run.adapters.parameter_groups(s.lr, s.weight_decay, s.head_lr, run.name)
        self.learned = [p for group in groups for p in group["params"]]
        self.optimizer = accelerator.prepare(adamw(groups, fused=True))
        self.steps = s.steps(len(run.train))
        self.schedule = get_scheduler(s.schedule, self.optimizer, round(s.warmup * self.steps), self.steps)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}  # adapter and head at the selected epoch
        self.predictions: dict[str, Tensor] = {}  # at the selected epoch: SPLIT/logits (rows, ...), SPLIT/labels
        self.batches: list[list[int]] = []  # of the current epoch
        self.problem: UserError | None = None  # why the run cannot go on
        self.leaves = False  # whether it goes on alone, because a pass that it shared failed

    # ---- steps ---------------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        s, p = self.settings, self.progress
        patient = not 0 < s.patience < len(p.history) - p.best
        return not self.stopped and p.epoch < s.epochs and patient and not self.out_of_steps

    @property
    def out_of_steps(self) -> bool:
        """Whether the run has had its last step or all its time."""
        limit = self.settings.max_time and seconds(self.settings.max_time)
        return self.progress.step >= self.steps or (bool(limit) and self.progress.seconds >= float(limit or 0))

    @property
    def is_evaluated(self) -> bool:
        """Whether an evaluation is due after the last step."""
        every, step = self.settings.eval_every, self.progress.step
        return self.ends_epoch or self.out_of_steps or bool(every and step % every == 0)

    @property
    def stopped(self) -> bool:
        """Whether the run ended before its last epoch."""
        return self.problem is not None or self.leaves

    @property
    def ends_epoch(self) -> bool:
        return self.progress.batch == len(self.batches)

    def next_rows(self) -> list[int]:
        """Return the training rows of the next step."""
        s, p = self.settings, self.progress
        if not self.batches:
            self.batches = epoch_batches(self.run.train.lengths, s.batch_size, s.seed, p.epoch)
        return self.batches[p.batch]

    def step(self, loss: float, chosen: list[int]) -> None:
        """Take an optimizer step with the gradients there are; `loss` is that of the chosen rows."""
        p = self.progress
        if not np.isfinite(loss):
            self.problem = UserError(self._not_finite(loss))
            self.drop_gradients()
            return
        apply_gradients(
            self.optimizer, self.learned, self.settings.clip, self.accelerator.clip_grad_norm_, self.schedule
        )
        p.step += 1
        p.batch += 1
        weight = self.run.train.weight(chosen)
        p.loss += loss * weight
        p.weight += weight
        p.rows += len(chosen)
        p.tokens += self.run.train.tokens(chosen)

    def fail(self, error: Exception) -> None:
        """End the run because of an exception."""
        self.drop_gradients()
        self.problem = failure(error, self.folder)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _not_finite(self, loss: float) -> str:
        p, checkpoint = self.progress, self.folder.checkpoint
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        last = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        return f"loss is {loss} at step {p.step + 1} (epoch {p.epoch + 1}), lr {lr:.2g}; {last}: try a lower --lr"

    # ---- epochs --------------------------------------------------------------------------------------------------

    def record(self, held_out: Any, validation: Mapping[str, Any]) -> dict[str, Any]:
        """Record an evaluation from its predictions (rows, ...), of the held-out rows or None and of each split.

        The adapter is remembered if it is the best so far. Returns the record, a line of metrics.jsonl.
        """
        s, p, run = self.settings, self.progress, self.run
        record = {
            "epoch": p.epoch + 1 if self.ends_epoch else round(p.epoch + p.batch / len(self.batches), 4),
            "step": p.step,
            "train_loss": p.loss / p.weight,
            "held_out": None
            if run.held_out is None
            else run.objective.score(run.task, held_out, run.held_out.labels.numpy()),
            "validation": self.scores(validation),
            "seconds": p.seconds - sum(row["seconds"] for row in p.history),
            "one_class": self._one_class(validation, held_out),
        }
        if run.held_out is not None:
            record["one_class_held_out"] = self._one_class({}, held_out)
            threshold = run.objective.threshold(run.task.metrics[0], held_out, run.held_out.labels.numpy())
            record |= {} if threshold is None else {"threshold": threshold}
        p.history.append(record)
        p.loss, p.weight = 0.0, 0
        if self.ends_epoch:
            p.epoch, p.batch, self.batches = p.epoch + 1, 0, []
        if p.best < 0 or self._selecting(-1) > self._selecting(p.best) or s.selection == "last":
            p.best = len(p.history) - 1
            self.best = {key: t.detach().clone() for key, t in self.tensors().items()}
            self.predictions = self._predictions(validation)
        return record

    def report(self, validation: Mapping[str, Any]) -> None:
        """Record the predictions (rows, ...) of the validation splits, which the selected epoch alone has."""
        record = self.progress.history[self.progress.best]
        record |= {"validation": self.scores(validation), "one_class": self._one_class(validation)}
        self.predictions = self._predictions(validation)

    def _one_class(self, validation: Mapping[str, Any], held_out: Any = None) -> bool:
        """Tell whether all rows of the last of these splits, or of the held-out rows, are predicted the same."""
        rows, found = self.run.held_out, held_out
        if validation:
            name, found = list(validation.items())[-1]
            rows = self.run.validation[name]
        assert rows is not None
        return self.run.objective.collapsed(found, rows.labels.numpy())

    def _predictions(self, validation: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            f"{key}/{what}": tensor
            for key, logits in validation.items()
            for what, tensor in (("logits", torch.from_numpy(logits)), ("labels", self.run.validation[key].labels))
        }

    def endpoints(self) -> dict[str, float]:
        """Return what a comparison may look at beside the metrics: of the reported split, at the selected epoch."""
        split, metric = next(iter(self.run.validation)), self.run.task.metrics[0]
        logits, labels = (self.predictions[f"{split}/{what}"].numpy() for what in ("logits", "labels"))
        threshold = self.progress.history[self.progress.best].get("threshold")
        return self.run.objective.endpoints(metric, logits, labels, threshold)

    def scores(self, validation: Mapping[str, Any]) -> dict[str, float]:
        """Return every metric from the predictions (rows, ...) of each split; those of the first under their names."""
        found: dict[str, float] = {}
        for i, key in enumerate(validation):
            rows = self.run.validation[key]
            scores = self.run.objective.score(self.run.task, validation[key], rows.labels.numpy())
            found |= {name if i == 0 else f"{key}/{name}": value for name, value in scores.items()}
        return found

    def _selecting(self, index: int) -> float:
        """Return the score of an evaluation that selection compares; more is better."""
        record, metric = self.progress.history[index], self.run.task.metrics[0]
        return upward(metric, float((record["held_out"] or record["validation"])[metric]))

    def restore_best(self) -> None:
        """Set adapter and head to the selected epoch."""
        self._set(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of adapter and head by name: they learn, and they are what `save` writes."""
        return self.run.adapters.state(self.run.name)

    def _set(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, t in self.tensors().items():
                t.copy_(values[key])

    def layers(self) -> Layers:
        """Return the memory of the run by layer: all that the model holds but other runs' tensors."""
        handle = self.run.adapters
        others = [t for name in handle.names if name != self.run.name for t in handle.state(name).values()]
        held = of_adapter(self.run.model, self.run.name, without=others)
        return by_layer(self.run.model, held, self.learned, self.optimizer, self.progress.activations)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write all that the next step depends on. Raises RunInterrupted."""
        tensors = {f"current/{key}": t for key, t in self.tensors().items()}
        tensors |= {f"best/{key}": t for key, t in self.best.items()}
        tensors |= {f"predictions/{key}": t for key, t in self.predictions.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}": t for key, t in state.items()}
        tensors |= {f"steps/{key}": t for key, t in self.run.adapters.steps.state_dict(self.run.name).items()}
        tensors["random"] = self.generator.get_state()
        tensors |= {f"generators/{device}": t for device, t in generators.states(self.run.model).items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.folder.write_checkpoint(vars(self.progress) | {"learning_rates": rates}, tensors)

    def load_checkpoint(self, say: Callable[[str], None] = lambda text: None) -> bool:
        """Go on from the folder's newest whole checkpoint; False if there is none. `say` is told of damaged ones.

        Raises UserError for a checkpoint that another version of loralab wrote.
        """
        found = self.folder.read_checkpoint(say)
        if found is None:
            return False
        try:
            missing = self._load(*found)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.folder.checkpoint} does not fit this run ({error}); another version may have written it: "
                "remove it to start the run anew"
            ) from error
        if missing:
            say(f"the checkpoint was written on another device: what {', '.join(missing)} draws begins anew")
        return True

    def _load(self, saved: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
        """Take what a checkpoint holds; return the devices whose generators it does not know."""
        rates = saved.pop("learning_rates")
        self.progress = Progress(**saved)
        self._set(_under("current", tensors))
        self.best, self.predictions = _under("best", tensors), _under("predictions", tensors)
        self.run.adapters.steps.load_state_dict(_under("steps", tensors), self.run.name)
        state: dict[int, dict[str, Tensor]] = {}
        for key, t in _under("optimizer", tensors).items():
            i, role = key.split("/")
            state.setdefault(int(i), {})[role] = t
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.schedule.last_epoch = self.progress.step
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        here, states = generators.states(self.run.model), _under("generators", tensors)
        generators.restore({device: state for device, state in states.items() if device in here})
        self.generator.set_state(tensors["random"])  # last: alone it is the CPU's own
        return [device for device in here if device not in states and device != "cpu"]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix + "/"): t for key, t in tensors.items() if key.startswith(prefix + "/")}
