"""The training loop: runs over one model, all of whose batches go through it in one pass. One run is a group of one.

Each optimizer step of a run takes one batch of rows that its seed and epoch decide. Its loss is the mean over those
rows however they are divided among processes and parts, so one process, many processes and accumulation take the same
step. Runs that share a pass share nothing else: head, optimizer, schedule, clipping, order of rows, dropout and
stopping are each run's own, so a run comes to what it would come to alone, to rounding.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from loralab import fast
from loralab.data.batches import Rows, sorted_batches, width
from loralab.errors import UserError
from loralab.run.bar import Reporter, Silent, named
from loralab.run.folder import RunFolder
from loralab.run.memory import Peak, ledger, saved_by_layer
from loralab.run.passes import forward, of_like_rows, passes
from loralab.run.result import result_of
from loralab.run.settings import Settings
from loralab.run.setup import Run, facts, prepare_together
from loralab.run.state import Member
from loralab.run.step import row_losses

Outcome = dict[str, Any] | UserError  # the result of a run, or why there is none


def train(settings: Settings, reporter: Reporter | None = None) -> dict[str, Any]:
    """Runs, resumes, or returns the finished run of `settings.folder`; the result is that of result.json."""
    (outcome,) = train_together([settings], reporter)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def train_together(many: Sequence[Settings], reporter: Reporter | None = None) -> list[Outcome]:
    """The runs of all settings in one pass over one model, each as `train` would do it (see together.py for which may).

    A run whose loss is no number ends with its UserError, and the others go on.
    """
    folders = [RunFolder(s.folder) for s in many]
    outcomes: list[Outcome | None] = [f.check(s.to_json(), s.resume) for f, s in zip(folders, many, strict=True)]
    left = [i for i, done in enumerate(outcomes) if done is None]
    if left:
        peak = Peak()
        runs = prepare_together([many[i] for i in left])
        loop = Loop(runs, [folders[i] for i in left], reporter or Silent(), peak)
        for i, outcome in zip(left, loop.run(), strict=True):
            outcomes[i] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


class Loop:
    """Takes runs over one model to their ends."""

    def __init__(self, runs: Sequence[Run], folders: Sequence[RunFolder], reporter: Reporter, peak: Peak) -> None:
        s = runs[0].settings
        self.alone, self.peak = len(runs) == 1, peak
        self.adapters, model = runs[0].adapters, runs[0].model
        # a process may run several settings in turn, and Accelerate keeps the precision of the first in a singleton
        AcceleratorState._reset_state()
        device = PartialState(cpu=not torch.cuda.is_available()).device
        self.choices, autocast = fast.quicken(model.to(device), s.speed, s.precision)
        if not self.alone:
            _check_streams(self.choices)
        self.accelerator = _accelerator(runs[0], autocast)
        self.reporter = reporter if self.accelerator.is_main_process else Silent()
        if self.alone:
            set_seed(s.seed)
        self.model = self.accelerator.prepare(model)
        self.members = [Member(r, f, self.accelerator, self._stream(r)) for r, f in zip(runs, folders, strict=True)]

    def _stream(self, run: Run) -> torch.Generator:
        """Where a run's dropout comes from: alone it is torch's own generator, which the plain path draws from too."""
        return torch.default_generator if self.alone else torch.Generator().manual_seed(run.settings.seed)

    def run(self) -> list[Outcome]:
        first = self.members[0]
        for member in self.members:
            self._begin(member)
        if first.settings.track:
            self.accelerator.init_trackers("loralab", {k: str(v) for k, v in first.settings.to_json().items()})
        self._introduce()
        try:
            while self.step():
                pass
        finally:
            self.reporter.stop()
        self.accelerator.end_training()
        return [member.problem or self._finish(member) for member in self.members]

    def step(self) -> bool:
        """One optimizer step of every run that goes on, and the end of an epoch after its last; False if none does."""
        going = [member for member in self.members if member.goes_on]
        if going:
            self._step(going)
        if ended := [member for member in going if member.problem is None and member.ends_epoch]:
            self._end_epochs(ended)
        return bool(going)

    def _begin(self, member: Member) -> None:
        if member.settings.resume:
            found, p = member.load_checkpoint(), member.progress
            there = f"going on at epoch {p.epoch + 1}, step {p.step + 1}"
            self.reporter.say(named(self._name(member), there if found else "no checkpoint yet: the run starts anew"))
        elif self.accelerator.is_main_process:
            chosen = {"speed": [vars(choice) for choice in self.choices], "together": len(self.members)}
            member.folder.begin(facts(member.run) | chosen)

    def _introduce(self) -> None:
        for member in self.members:
            coverage = self.adapters.spec(member.run.name).coverage
            told = [f"adapts {coverage}"] if coverage else []
            for text in (*told, *(f"note: {note}" for note in member.run.notes)):
                self.reporter.say(named(self._name(member), text))
        rows = [len(m.run.train) for m in self.members]
        done = [
            m.progress.epoch * n + m.progress.batch * m.settings.batch_size
            for m, n in zip(self.members, rows, strict=True)
        ]
        s = self.members[0].settings
        label = f"{self.members[0].run.task.name} {s.method} seed {s.seed}"
        more = "" if self.alone else f" and {len(self.members) - 1} more"
        whole = sum(m.settings.epochs * n for m, n in zip(self.members, rows, strict=True))
        self.reporter.start(label + more, whole, sum(done))

    def _name(self, member: Member) -> str:
        return "" if self.alone else member.settings.folder.name

    # ---- one step ------------------------------------------------------------------------------------------------

    def _step(self, going: Sequence[Member]) -> None:
        """One optimizer step of each member, on its own next rows."""
        started, n = time.perf_counter(), self.accelerator.num_processes
        if not self.model.training:
            self.model.train()
        chosen = [member.next() for member in going]
        mine = [rows[self.accelerator.process_index :: n] for rows in chosen]
        parts = going[0].settings.accumulate
        total = torch.zeros(len(going), device=self.accelerator.device)
        for places in passes(going, chosen):
            at = [going[i] for i in places]
            for part in range(parts):
                own = [mine[i][part::parts] for i in places]
                with nullcontext() if part == parts - 1 else self.accelerator.no_sync(self.model):
                    losses = self._losses(at, own, [chosen[i] for i in places])  # (members of the pass,)
                    self.accelerator.backward(losses.sum() * n)  # processes average: n times the part is the sum
                total[places] += losses.detach()
        values = self.accelerator.reduce(total, "sum").tolist()
        for member, loss, rows in zip(going, values, chosen, strict=True):
            member.step(loss, rows)
        seconds = (time.perf_counter() - started) / len(going)
        for member in going:
            member.progress.seconds += seconds
        self.reporter.advance(sum(map(len, chosen)), float(np.mean(values)))
        for member in going:
            every = member.settings.checkpoint_every
            if every and member.progress.step % every == 0 and not member.ends_epoch and member.problem is None:
                self._checkpoint(member)

    def _losses(self, going: Sequence[Member], own: Sequence[list[int]], chosen: Sequence[list[int]]) -> Tensor:
        """(members,): of each the part of its mean loss that its own rows have in its chosen ones."""
        # a process without rows takes one, whose loss is then multiplied by 0
        taken = [rows or whole[:1] for rows, whole in zip(own, chosen, strict=True)]
        first = going[0].progress
        tokens = len(taken[0]) * width(going[0].run.train, taken[0]) if first.step == 0 else 0
        counting = tokens > first.counted
        with saved_by_layer(self.adapters.model, on=counting) as kept:
            logits = self._pass(going, [(m.run.train, rows) for m, rows in zip(going, taken, strict=True)])
            losses = [
                row_losses(out[:, : m.run.task.num_outputs], m.run.train.labels[rows].to(out.device)).sum()
                for out, m, rows in zip(logits, going, taken, strict=True)
            ]
        if counting:
            first.activations, first.counted = kept, tokens
        return torch.stack(
            [loss / len(whole) * bool(rows) for loss, rows, whole in zip(losses, own, chosen, strict=True)]
        )

    def _pass(self, members: Sequence[Member], parts: Sequence[tuple[Rows, list[int]]]) -> list[Tensor]:
        return forward(self.model, self.adapters, members, parts, self.accelerator.device)

    # ---- after an epoch ------------------------------------------------------------------------------------------

    def _end_epochs(self, ended: Sequence[Member]) -> None:
        """Those with the same rows to predict do it together."""
        for few in of_like_rows(ended):
            held_out = self._logits(few, few[0].run.held_out)
            validation = {key: self._logits(few, rows) for key, rows in few[0].run.validation.items()}
            for i, member in enumerate(few):
                self._end_epoch(member, held_out[i], {key: said[i] for key, said in validation.items()})

    def _end_epoch(self, member: Member, held_out: Any, validation: dict[str, Any]) -> None:
        run, s, record = member.run, member.settings, member.end_epoch(held_out, validation)
        if s.track:
            values = {"train_loss": record["train_loss"], **record["validation"]}
            self.accelerator.log(values, step=member.progress.step)
        if self.accelerator.is_main_process:
            member.folder.write_metrics(member.progress.history)
        if member.progress.epoch < s.epochs:
            self._checkpoint(member)
        # last, as it may end the run, which can go on
        self.reporter.epoch(record, s.epochs, run.task.metrics[0], self._name(member))

    def _checkpoint(self, member: Member) -> None:
        if self.accelerator.is_main_process:
            member.save_checkpoint()

    def _logits(self, members: Sequence[Member], rows: Rows | None) -> list[Any]:
        """Of each member (rows, outputs) as a numpy array, in the order of `rows`; processes share the work."""
        if rows is None:
            return [None] * len(members)
        self.model.eval()
        mine, process = [], self.accelerator.process_index
        with torch.no_grad():
            for i, chosen in enumerate(sorted_batches(rows.lengths, 2 * members[0].settings.batch_size)):
                if i % self.accelerator.num_processes == process:
                    said = self._pass(members, [(rows, chosen)] * len(members))
                    mine.append((chosen, torch.stack(said, 1).cpu().numpy()))  # (rows, members, outputs)
        parts = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        logits = np.concatenate([part for _, part in parts])
        out = np.empty_like(logits)
        out[np.concatenate([chosen for chosen, _ in parts])] = logits
        return [out[:, i, : m.run.task.num_outputs].copy() for i, m in enumerate(members)]

    def _finish(self, member: Member) -> dict[str, Any]:
        member.take_best()
        run, p = member.run, member.progress
        layers = member.layers()
        memory = {"peak_bytes": self.peak.bytes, "ledger": ledger(layers), "layers": layers}
        result = result_of(run, vars(p), memory, together=len(self.members), by_rank=self._by_rank(member))
        for warning in result["warnings"]:
            self.reporter.say(named(self._name(member), f"warning: {warning}"))
        if self.accelerator.is_main_process:
            self.adapters.save(member.folder.path / "adapter", run.name, saved_as=run.adapter_name)
            member.folder.finish(result, member.said)
        self.accelerator.wait_for_everyone()
        return result

    def _by_rank(self, member: Member) -> dict[str, dict[str, float]]:
        """The validation scores at each rank that the one training gives, where it gives several."""
        run, found = member.run, {}
        factors = self.adapters.spec(run.name).recipe.factors
        for rank in () if factors is None else factors.ranks:
            with self.adapters.active.changed(chosen={run.name: rank}):
                said = {key: self._logits([member], rows)[0] for key, rows in run.validation.items()}
            found[str(rank)] = member.scores(said)
        return found


def _check_streams(choices: Sequence[fast.Choice]) -> None:
    """Attention outside a block draws its dropout from torch's own generator, for all rows at once."""
    reasons = [choice.reason for choice in choices if choice.piece in ("block", "dropout") and not choice.used]
    if reasons:
        raise UserError(f"these runs cannot share passes: {reasons[0]}")


def _accelerator(run: Run, autocast: bool) -> Accelerator:
    settings = run.settings
    # full fine-tuning reaches tensors that a forward pass need not use (a pooler, say)
    unused = DistributedDataParallelKwargs(
        find_unused_parameters=run.adapters.spec(run.name).recipe.learn_base is not None
    )
    return Accelerator(
        mixed_precision="bf16" if autocast else "no",
        cpu=not torch.cuda.is_available(),
        log_with=settings.track,
        project_dir=str(settings.folder) if settings.track else None,
        kwargs_handlers=[unused],
    )
