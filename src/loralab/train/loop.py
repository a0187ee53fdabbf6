"""One run: the training loop, evaluation each epoch, selection, checkpoints, and the result.

Each optimizer step takes one batch of rows that seed and epoch decide. Its loss is the mean over those rows however
they are divided among processes and parts, so one process, many processes and accumulation take the same step.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from torch.nn import functional as F
from transformers import get_scheduler

from loralab import speed
from loralab.errors import UserError
from loralab.tasks import is_constant, score
from loralab.train.batches import Rows, collate, epoch_batches, sorted_batches
from loralab.train.folder import RunFolder
from loralab.train.memory import Peak, ledger, saved_activations
from loralab.train.prepare import Run, facts, prepare
from loralab.train.progress import Reporter, Silent
from loralab.train.result import result_of
from loralab.train.settings import Settings


@dataclass
class Progress:
    """How far a run has come; with the tensors beside it, all that a checkpoint holds."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches done in the epoch under way
    step: int = 0  # optimizer steps
    loss: float = 0.0  # sum of row losses in the epoch under way
    seconds: float = 0.0  # of training, evaluation left out
    tokens: int = 0  # padding left out
    activations: int = 0  # bytes kept for the backward pass of the first step
    best: int = -1  # index of the selected epoch in history
    history: list[dict[str, Any]] = field(default_factory=list)


def train(settings: Settings, reporter: Reporter | None = None) -> dict[str, Any]:
    """Runs, resumes, or returns the finished run of `settings.folder`; the result is that of result.json."""
    folder = RunFolder(settings.folder)
    if done := folder.check(settings.to_json(), settings.resume):
        return done
    peak = Peak()
    run = prepare(settings)
    return Trainer(run, folder, reporter or Silent(), peak).run()


class Trainer:
    """Holds what changes while a run goes on: optimizer, schedule, progress and the best state so far."""

    def __init__(self, run: Run, folder: RunFolder, reporter: Reporter, peak: Peak) -> None:
        s = run.settings
        self.settings, self.parts, self.folder, self.peak = s, run, folder, peak
        narrow = s.precision == torch.bfloat16
        held = narrow and s.speed != "off" and speed.frozen(run.model) is None  # then products need no autocast
        self.choices = speed.prepare(run.model, s.speed, "bfloat16" if held else None)
        self.accelerator = _accelerator(s, run, autocast=narrow and not held)
        self.reporter = reporter if self.accelerator.is_main_process else Silent()
        set_seed(s.seed)
        groups = run.adapters.parameter_groups(lr=s.lr, weight_decay=s.weight_decay, head_lr=s.head_lr)
        self.model, self.optimizer = self.accelerator.prepare(run.model, torch.optim.AdamW(groups, fused=True))
        self.steps = s.steps(len(run.train))
        self.schedule = get_scheduler(s.schedule, self.optimizer, round(s.warmup * self.steps), self.steps)
        self.learned = [p for p in run.model.parameters() if p.requires_grad]
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}  # state of the selected epoch
        self.said: dict[str, Tensor] = {}  # by validation split, what the selected epoch says of each row

    def run(self) -> dict[str, Any]:
        s, main = self.settings, self.accelerator.is_main_process
        if s.resume:
            self._load_checkpoint()
        elif main:
            self.folder.begin(facts(self.parts) | {"speed": [vars(choice) for choice in self.choices]})
        if s.track:
            self.accelerator.init_trackers("loralab", {k: str(v) for k, v in s.to_json().items()})
        if coverage := self.parts.adapters.entry(None).coverage:
            self.reporter.say(f"adapts {coverage}")
        for note in self.parts.notes:
            self.reporter.say(f"note: {note}")
        rows = len(self.parts.train)
        done = self.progress.epoch * rows + self.progress.batch * s.batch_size
        self.reporter.start(f"{self.parts.task.name} {s.method} seed {s.seed}", s.epochs * rows, done)
        try:
            while self.progress.epoch < s.epochs and not self._out_of_patience():
                self._epoch()
        finally:
            self.reporter.stop()
        self.accelerator.end_training()
        return self._finish()

    def _epoch(self) -> None:
        s, p, rows = self.settings, self.progress, self.parts.train
        self.model.train()
        batches = epoch_batches(rows.lengths, s.batch_size, s.seed, p.epoch)
        for chosen in batches[p.batch :]:
            started = time.perf_counter()
            loss = self._step(chosen)
            p.seconds += time.perf_counter() - started
            p.loss += loss * len(chosen)
            p.tokens += int(rows.lengths[chosen].sum())
            p.batch += 1
            self.reporter.advance(len(chosen), loss)
            if s.checkpoint_every and p.step % s.checkpoint_every == 0 and p.batch < len(batches):
                self._save_checkpoint()
        self._end_epoch()

    def _step(self, chosen: list[int]) -> float:
        """One optimizer step on the chosen rows; returns their mean loss."""
        s, p, n = self.settings, self.progress, self.accelerator.num_processes
        mine = chosen[self.accelerator.process_index :: n]
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(s.accumulate):
            rows = mine[part :: s.accumulate]
            last = part == s.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._row_losses(rows or chosen[:1]).sum() / len(chosen) * bool(rows)
                self.accelerator.backward(loss * n)  # processes average their gradients: n times the part is the sum
            total += loss.detach()
        value = float(self.accelerator.reduce(total, "sum"))
        if not np.isfinite(value):
            raise UserError(self._not_finite(value))
        if s.clip:
            self.accelerator.clip_grad_norm_(self.learned, s.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        p.step += 1
        return value

    def _row_losses(self, chosen: list[int]) -> Tensor:
        rows = self.parts.train
        batch = collate(rows, chosen, self.parts.tokenizer, self.accelerator.device)
        with saved_activations(self.parts.model, on=self.progress.step == 0) as kept:
            logits = self.model(**batch).logits.float()  # (rows, outputs)
            losses = row_losses(logits, rows.labels[chosen].to(logits.device))
        self.progress.activations = max(self.progress.activations, sum(kept.values()))
        return losses

    def _not_finite(self, loss: float) -> str:
        p, there = self.progress, self.folder.checkpoint
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        last = f"the last good checkpoint is {there}" if there.exists() else "there is no checkpoint yet"
        return f"loss is {loss} at step {p.step + 1} (epoch {p.epoch + 1}), lr {lr:.2g}; {last}: try a lower --lr"

    def _end_epoch(self) -> None:
        s, p, parts = self.settings, self.progress, self.parts
        held = parts.held_out
        held_out = None if held is None else score(parts.task.metrics, self._logits(held), held.labels.numpy())
        record = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "train_loss": p.loss / len(parts.train),
            "held_out": held_out,
            "validation": {},
            "seconds": p.seconds - sum(row["seconds"] for row in p.history),
        }
        said = {}
        for i, (key, rows) in enumerate(parts.validation.items()):
            logits = self._logits(rows)
            said |= {f"{key}/logits": torch.from_numpy(logits), f"{key}/labels": rows.labels}
            scores = score(parts.task.metrics, logits, rows.labels.numpy())
            record["validation"] |= {name if i == 0 else f"{key}/{name}": value for name, value in scores.items()}
            record["one_class"] = not parts.regression and is_constant(logits)
        p.history.append(record)
        p.epoch, p.batch, p.loss = p.epoch + 1, 0, 0.0
        if p.best < 0 or self._selecting(-1) > self._selecting(p.best) or s.selection == "last":
            p.best = len(p.history) - 1
            self.best = {key: t.detach().clone() for key, t in parts.adapters.state().items()}
            self.said = said
        if s.track:
            self.accelerator.log({"train_loss": record["train_loss"], **record["validation"]}, step=p.step)
        if self.accelerator.is_main_process:
            self.folder.write_metrics(p.history)
        if p.epoch < s.epochs:
            self._save_checkpoint()
        self.reporter.epoch(record, s.epochs, parts.task.metrics[0])  # last, as it may end the run, which can go on

    def _logits(self, rows: Rows) -> Any:
        """(rows, outputs) as a numpy array, in the order of `rows`; processes share the work."""
        self.model.eval()
        mine, process = [], self.accelerator.process_index
        with torch.no_grad():
            for i, chosen in enumerate(sorted_batches(rows.lengths, 2 * self.settings.batch_size)):
                if i % self.accelerator.num_processes == process:
                    batch = collate(rows, chosen, self.parts.tokenizer, self.accelerator.device)
                    mine.append((chosen, self.model(**batch).logits.float().cpu().numpy()))
        parts = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        logits = np.concatenate([part for _, part in parts])
        out = np.empty_like(logits)
        out[np.concatenate([chosen for chosen, _ in parts])] = logits
        return out

    def _selecting(self, index: int) -> float:
        record, metric = self.progress.history[index], self.parts.task.metrics[0]
        return float((record["held_out"] or record["validation"])[metric])

    def _out_of_patience(self) -> bool:
        return 0 < self.settings.patience < len(self.progress.history) - self.progress.best

    def _save_checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return
        p = self.progress
        tensors = {f"live/{key}": t for key, t in self.parts.adapters.state().items()}
        tensors |= {f"best/{key}": t for key, t in self.best.items()}
        tensors |= {f"said/{key}": t for key, t in self.said.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}": t for key, t in state.items()}
        tensors |= {f"steps/{key}": t for key, t in self.parts.adapters.steps.state_dict().items()}
        tensors["random"] = torch.get_rng_state()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.folder.write_checkpoint(vars(p) | {"learning_rates": rates}, tensors)

    def _load_checkpoint(self) -> None:
        found = self.folder.read_checkpoint()
        if found is None:
            self.reporter.say("no checkpoint yet: the run starts anew")
            return
        saved, tensors = found
        rates = saved.pop("learning_rates")
        self.progress = Progress(**saved)
        with torch.no_grad():
            for key, t in self.parts.adapters.state().items():
                t.copy_(tensors[f"live/{key}"])
        self.best = {key.removeprefix("best/"): t for key, t in tensors.items() if key.startswith("best/")}
        self.said = {key.removeprefix("said/"): t for key, t in tensors.items() if key.startswith("said/")}
        stepped = {key.removeprefix("steps/"): t for key, t in tensors.items() if key.startswith("steps/")}
        self.parts.adapters.steps.load_state_dict(stepped)
        state: dict[int, dict[str, Tensor]] = {}
        for key, t in tensors.items():
            if key.startswith("optimizer/"):
                _, i, role = key.split("/")
                state.setdefault(int(i), {})[role] = t
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.schedule.last_epoch = self.progress.step
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        torch.set_rng_state(tensors["random"])
        self.reporter.say(f"going on at epoch {self.progress.epoch + 1}, step {self.progress.step + 1}")

    def _finish(self) -> dict[str, Any]:
        with torch.no_grad():
            for key, t in self.parts.adapters.state().items():
                t.copy_(self.best[key])
        parts = ledger(self.parts.model, self.optimizer, self.progress.activations)
        result = result_of(self.parts, vars(self.progress), {"peak_bytes": self.peak.bytes, "ledger": parts})
        for warning in result["warnings"]:
            self.reporter.say(f"warning: {warning}")
        if self.accelerator.is_main_process:
            self.parts.adapters.save(self.folder.path / "adapter")
            self.folder.finish(result, self.said)
        self.accelerator.wait_for_everyone()
        return result


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,): cross-entropy for int64 labels, squared error for float labels; logits (rows, outputs)."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def _accelerator(settings: Settings, run: Run, autocast: bool) -> Accelerator:
    # a process may run several settings in turn, and Accelerate keeps the precision of the first in a singleton
    AcceleratorState._reset_state()
    # full fine-tuning reaches tensors that a forward pass need not use (a pooler, say)
    unused = DistributedDataParallelKwargs(
        find_unused_parameters=run.adapters.entry(None).recipe.learn_base is not None
    )
    return Accelerator(
        mixed_precision="bf16" if autocast else "no",
        cpu=not torch.cuda.is_available(),
        log_with=settings.track,
        project_dir=str(settings.folder) if settings.track else None,
        kwargs_handlers=[unused],
    )
