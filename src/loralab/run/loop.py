"""The training loop: runs over one model, whose batches share passes through it. A single run is a group of one.

A step of a run takes one batch, which its seed and epoch decide. Its loss is the mean over the rows of the batch,
however they are divided among processes and parts, so that one process, many processes and accumulation take the same
step. Runs that share a pass share nothing else: head, optimizer, schedule, clipping, order of rows, dropout and
stopping are each run's own, so a run gives the result that it gives alone, up to rounding.

An exception in the work of one run ends that run and no other. In a pass of several runs nobody can say whose it was,
so each of them goes on alone, from its last checkpoint; if it was for want of memory, they go on in halves.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from loralab import fast, model_card
from loralab.data import tables
from loralab.data.batches import Rows, sorted_batches, width
from loralab.disk import write_text
from loralab.errors import UserError, hint
from loralab.model_names import public_name
from loralab.objectives import learned, ragged, saved
from loralab.run import card, written
from loralab.run.bar import Reporter, Silent, named
from loralab.run.folder import RunFolder
from loralab.run.memory import Peak, ledger, saved_by_layer, trim
from loralab.run.records import read_result
from loralab.run.result import facts, lost_classes, result_of, skipped_rows
from loralab.run.room import is_out_of_memory
from loralab.run.settings import Settings
from loralab.run.setup import PreparedRun, prepare_together, recompute, reported
from loralab.run.sharing import Outputs, forward, passes, with_same_rows
from loralab.run.state import RunState, failure
from loralab.run.step import Forward

Outcome = dict[str, Any] | UserError  # the result of a run, or why there is none


def train(settings: Settings, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train, resume, or read the finished run of `settings.folder`; return the content of result.json.

    Raises UserError for what a user can mend, RunInterrupted (one) if the run can be resumed later, and RunFailed (one)
    after any other exception, whose traceback is then in the run folder.
    """
    (outcome,) = train_together([settings], reporter)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def train_together(many: Sequence[Settings], reporter: Reporter | None = None) -> list[Outcome]:
    """Train runs over one model, each as `train` does it; return the outcome of each (sharing.py: which may share).

    A run that fails has its UserError as its outcome, and the others go on.
    """
    outcomes: dict[int, Outcome] = {}
    folders = [RunFolder(s.folder) for s in many]
    with ExitStack() as stack:
        for i in sorted(range(len(many)), key=lambda i: many[i].folder):
            try:
                result = _open(folders[i], many[i])
            except UserError as error:
                outcomes[i] = error
                continue
            stack.callback(folders[i].close)
            if result is not None:
                outcomes[i] = result
        left = [i for i in range(len(many)) if i not in outcomes]
        runs = _train([many[i] for i in left], [folders[i] for i in left], reporter or Silent()) if left else []
        outcomes |= zip(left, runs, strict=True)
    return [outcomes[i] for i in range(len(many))]


def _device_state(settings: Settings) -> PartialState:
    """Return what Accelerate knows of this process and its device; it keeps the first device unless it is reset."""
    state = PartialState(cpu=not settings.gpu)
    if state.num_processes == 1 and (state.device.type == "cpu") == settings.gpu:
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=not settings.gpu)
    return state


def check_tracker(name: str | None) -> None:
    """Raise UserError for a tracker that does not exist or is not installed: before anything is trained."""
    if name is None or name in map(str, get_available_trackers()):
        return
    names = [str(key) for key in LOGGER_TYPE_TO_CLASS]
    if name not in names:
        raise UserError(f"track={name!r} is no tracker{hint(name, names)}: there are {', '.join(names)}")
    raise UserError(f"track={name!r}: the package {name} is not installed, pip install {name}, or leave it out")


def _open(folder: RunFolder, settings: Settings) -> dict[str, Any] | None:
    """Lock a folder and return its result if it is finished. Of several processes the first one locks it for all."""
    check_tracker(settings.track)
    if _device_state(settings).is_main_process:
        return folder.open(settings.to_json(), settings.resume)
    return read_result(folder.path) if settings.resume and folder.result.is_file() else None


def _train(many: Sequence[Settings], folders: Sequence[RunFolder], reporter: Reporter) -> list[Outcome]:
    """Train runs whose folders are open, together as far as that is possible."""
    outcomes: list[Outcome | None] = [None] * len(many)
    short = False  # of memory
    try:
        peak = Peak(many[0].gpu)
        loop = Loop(prepare_together(many), folders, reporter, peak)
    except Exception as error:
        if len(many) == 1:
            if _device_state(many[0]).num_processes > 1:
                raise
            outcomes = [failure(error, folders[0])]
        short = is_out_of_memory(error)
    else:
        outcomes = loop.run()
        short = loop.short
        del loop  # and its model
    for places in _smaller([i for i, outcome in enumerate(outcomes) if outcome is None], short):
        trim()
        found = _train([replace(many[i], resume=True) for i in places], [folders[i] for i in places], reporter)
        for i, outcome in zip(places, found, strict=True):
            outcomes[i] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _smaller(places: list[int], short: bool) -> list[list[int]]:
    """Divide runs that go on without those that they were with: in halves if memory was short, else each alone.

    Alone a run shows what is wrong with it, if it is this one.
    """
    half = -(-len(places) // 2) if short else 1
    return [places[i : i + half] for i in range(0, len(places), half or 1)]


class Loop:
    """Trains runs over one model to their ends."""

    def __init__(
        self, runs: Sequence[PreparedRun], folders: Sequence[RunFolder], reporter: Reporter, peak: Peak
    ) -> None:
        s = runs[0].settings
        self.alone, self.peak = len(runs) == 1, peak
        self.short = False  # whether a pass that several runs shared ran out of memory
        self.adapters, model = runs[0].adapters, runs[0].model
        # a process may run several settings in turn, and Accelerate keeps the precision of the first in a singleton
        AcceleratorState._reset_state()
        self.choices = fast.enable(model.to(_device_state(s).device), s.precision, s.path)
        if s.checkpointing:
            recompute(model, s.model)
        if not self.alone:
            _check_streams(self.choices)
        self.accelerator = _accelerator(runs[0], self.choices.autocast)
        self.reporter = reporter if self.accelerator.is_main_process else Silent()
        if self.alone:
            set_seed(s.seed)
        self.adapters.synchronize(*(run.name for run in runs))
        self.model = self.accelerator.prepare(Forward(model, runs[0].objective.forward))
        self.states = [RunState(r, f, self.accelerator, self._stream(r)) for r, f in zip(runs, folders, strict=True)]

    def _stream(self, run: PreparedRun) -> torch.Generator:
        """Return the generator of a run's dropout. Alone it is torch's own, which the plain path draws from too."""
        return torch.default_generator if self.alone else torch.Generator().manual_seed(run.settings.seed)

    def run(self) -> list[Outcome | None]:
        """Train to the end; return the outcome of each run, None for one that has to go on alone."""
        first = self.states[0]
        for state in self.states:
            with self._failing([state]):
                self._begin(state)
        if first.settings.track and not first.stopped:
            self.accelerator.init_trackers("loralab", {k: str(v) for k, v in first.settings.to_json().items()})
        self._introduce()
        try:
            with self.adapters.caching(training=True):
                while self.step():
                    pass
        finally:
            self.reporter.stop()
        self.accelerator.end_training()
        return [self._outcome(state) for state in self.states]

    def step(self) -> bool:
        """Take a step of every run that goes on, and evaluate those that are due; False if none goes on."""
        going = [state for state in self.states if state.goes_on]
        if going:
            self._step(going)
        if due := [state for state in going if not state.stopped and state.is_evaluated]:
            self._evaluate(due)
        return bool(going)

    @contextmanager
    def _failing(self, states: Sequence[RunState]) -> Iterator[None]:
        """End a run whose work in the block raises; of several runs each leaves the others, to go on without them.

        So does one run of several that is out of memory, which the others may have taken.

        Of several processes all have to take the same steps, so there the exception goes on.
        """
        try:
            yield
        except Exception as error:
            if self.accelerator.num_processes > 1:
                raise
            if len(states) == 1 and (self.alone or not is_out_of_memory(error)):
                states[0].fail(error)
                return
            self.short |= is_out_of_memory(error)
            for state in states:
                state.drop_gradients()
                state.leaves = True

    def _say(self, state: RunState, text: str) -> None:
        self.reporter.say(named(self._name(state), text))

    def _name(self, state: RunState) -> str:
        return "" if self.alone else state.settings.folder.name

    # ---- the beginning -------------------------------------------------------------------------------------------

    def _begin(self, state: RunState) -> None:
        """Start a run in its folder, or go on with the one that is there. Raises UserError."""
        folder, main = state.folder, self.accelerator.is_main_process
        together = {"speed": [vars(choice) for choice in self.choices], "together": len(self.states)}
        if not (state.settings.resume and folder.started):
            if main:
                folder.begin(facts(state.run) | together, skipped_rows(state.run.task))
            return
        folder.check_same(facts(state.run))
        found, p = state.load_checkpoint(lambda text: self._say(state, text)), state.progress
        place = f"going on at epoch {p.epoch + 1}, step {p.step + 1}"
        self._say(state, place if found else "no checkpoint yet: the run starts anew")
        if main:
            folder.write_metrics(p.history)

    def _introduce(self) -> None:
        """Tell the reporter what is trained, and how many rows are done."""
        for state in self.states:
            coverage = self.adapters.spec(state.run.name).coverage
            for text in ([f"adapts {coverage}"] if coverage else []) + [f"note: {note}" for note in state.run.notes]:
                self._say(state, text)
        first, more = self.states[0], "" if self.alone else f" and {len(self.states) - 1} more"
        label = f"{first.run.task.name} {first.settings.method} seed {first.settings.seed}{more}"
        done = whole = 0
        for state in self.states:
            rows, s = len(state.run.train), state.settings
            whole += min(s.epochs * rows, state.steps * s.batch_size)
            done += state.progress.rows
        self.reporter.start(label, whole, done)

    # ---- one step ------------------------------------------------------------------------------------------------

    def _step(self, going: Sequence[RunState]) -> None:
        """Take an optimizer step of each run, on its own next rows."""
        started = time.perf_counter()
        if not self.model.training:
            self.model.train()
        chosen = [state.next_rows() for state in going]
        total = torch.zeros(len(going), device=self.accelerator.device)
        for places in passes(going, chosen, self.accelerator.device.type):
            states = [going[i] for i in places]
            with self._failing(states):
                total[places] = self._backward(states, [chosen[i] for i in places])
        losses = self.accelerator.reduce(total, "sum").tolist()
        for state, loss, rows in zip(going, losses, chosen, strict=True):
            if not state.stopped:
                with self._failing([state]):
                    state.step(loss, rows)
        seconds = self._agreed(time.perf_counter() - started) / len(going)
        for state in going:
            state.progress.seconds += seconds
        self.reporter.advance(sum(map(len, chosen)), float(np.mean(losses)))
        for state in going:
            every = state.settings.checkpoint_every
            if every and state.progress.step % every == 0 and not state.is_evaluated and not state.stopped:
                self._checkpoint(state)

    def _agreed(self, seconds: float) -> float:
        """Return the mean over processes: with --max-time all have to end at the same step."""
        if self.accelerator.num_processes == 1:
            return seconds
        taken = torch.tensor([seconds], dtype=torch.float32, device=self.accelerator.device)
        return float(self.accelerator.reduce(taken, "mean"))

    def _backward(self, states: Sequence[RunState], chosen: Sequence[list[int]]) -> Tensor:
        """Add up the gradients of a pass, part by part; return (runs,), this process's share of each loss."""
        n, parts = self.accelerator.num_processes, states[0].settings.accumulate
        mine = [rows[self.accelerator.process_index :: n] for rows in chosen]
        total = torch.zeros(len(states), device=self.accelerator.device)
        for part in range(parts):
            own = [rows[part::parts] for rows in mine]
            with nullcontext() if part == parts - 1 else self.accelerator.no_sync(self.model):
                losses = self._losses(states, own, chosen)  # (runs,)
                self.accelerator.backward(losses.sum() * n)  # processes average: n times the part is the sum
            total += losses.detach()
        return total

    def _losses(self, states: Sequence[RunState], own: Sequence[list[int]], chosen: Sequence[list[int]]) -> Tensor:
        """Return (runs,): the share that a run's own rows have in the loss of its chosen rows."""
        # a process without rows takes one, whose loss is then multiplied by 0
        taken = [rows or whole[:1] for rows, whole in zip(own, chosen, strict=True)]
        first = states[0].progress
        tokens = len(taken[0]) * width(states[0].run.train, taken[0]) if first.step == 0 else 0
        counting = tokens > first.counted
        with saved_by_layer(self.adapters.model, on=counting) as saved:
            found = self._forward(states, [(s.run.train, rows) for s, rows in zip(states, taken, strict=True)])
            losses = [s.run.objective.loss(*out).sum() for out, s in zip(found, states, strict=True)]
        if counting:
            first.activations, first.counted = saved, tokens
        weights = [s.run.train.weight(whole) for s, whole in zip(states, chosen, strict=True)]
        return torch.stack(
            [loss / weight * bool(rows) for loss, rows, weight in zip(losses, own, weights, strict=True)]
        )

    def _forward(self, states: Sequence[RunState], parts: Sequence[tuple[Rows, list[int]]]) -> list[Outputs]:
        return forward(self.model, self.adapters, states, parts, self.accelerator.device)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, due: Sequence[RunState]) -> None:
        """Evaluate runs, those with the same rows together."""
        for states in with_same_rows(due):
            with self._failing(states):
                held_out = self._predictions(states, states[0].run.held_out)
                once = states[0].settings.reads_validation_once
                splits = {} if once else states[0].run.validation
                validation = {key: self._predictions(states, rows) for key, rows in splits.items()}
            for i, state in enumerate(states):
                if not state.stopped:
                    self._record(state, held_out[i], {key: found[i] for key, found in validation.items()})

    def _record(self, state: RunState, held_out: Any, validation: dict[str, Any]) -> None:
        """Record an evaluation of a run from its predictions (rows, ...) and write down how far it is."""
        s, p, record = state.settings, state.progress, {}
        with self._failing([state]):
            record = state.record(held_out, validation)
            if s.track:
                values = {"train_loss": record["train_loss"], **record["validation"]}
                self.accelerator.log(values, step=p.step)
            if self.accelerator.is_main_process:
                state.folder.write_metrics(p.history)
        if state.problem is None and p.epoch < s.epochs and not state.out_of_steps:
            self._checkpoint(state)
        if record:  # last, because the reporter may end the run, which can go on
            self.reporter.epoch(record, s.epochs, state.run.task.metrics[0], self._name(state))

    def _checkpoint(self, state: RunState) -> None:
        if self.accelerator.is_main_process:
            with self._failing([state]):
                state.save_checkpoint()

    def _predictions(self, states: Sequence[RunState], rows: Rows | None) -> list[Any]:
        """Return each run's predictions (rows, ...) as an array, in the order of `rows`; processes share the work."""
        if rows is None:
            return [None] * len(states)
        self.model.eval()
        mine: list[tuple[list[int], list[Any]]] = []  # rows, and each run's predictions of them
        process, s = self.accelerator.process_index, states[0].settings
        at_once = 2 * -(-s.batch_size // s.accumulate)  # rows; nothing is kept for backward
        with torch.no_grad(), self.adapters.caching():
            for i, chosen in enumerate(sorted_batches(rows.lengths, at_once)):
                if i % self.accelerator.num_processes == process:
                    found = self._forward(states, [(rows, chosen)] * len(states))
                    kept = [s.run.objective.predict(*out) for s, out in zip(states, found, strict=True)]
                    mine.append((chosen, [t.cpu().numpy() for t in kept]))
        gathered = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        order = np.argsort(np.concatenate([chosen for chosen, _ in gathered]))
        return [ragged([kept[i] for _, kept in gathered])[order] for i in range(len(states))]

    # ---- the end -------------------------------------------------------------------------------------------------

    def _outcome(self, state: RunState) -> Outcome | None:
        """Finish a run that has not ended before; None for one that goes on alone."""
        if state.leaves:
            why, how = ("memory ran out", "with fewer") if self.short else ("a pass that it shared failed", "alone")
            self._say(state, f"{why}: it goes on {how} from its last checkpoint")
            return None
        result: Outcome | None = None
        if state.problem is None:
            with self._failing([state]):
                result = self._finish(state)
        return state.problem or result

    def _finish(self, state: RunState) -> dict[str, Any]:
        """Save the adapter of the selected epoch and write the result. Raises RunInterrupted."""
        state.restore_best()
        run, p, s = state.run, state.progress, state.settings
        if s.reads_validation_once:
            state.report({key: self._predictions([state], rows)[0] for key, rows in run.validation.items()})
            if self.accelerator.is_main_process:
                state.folder.write_metrics(p.history)
        layers = state.layers()
        memory = {"peak_bytes": self.peak.bytes, "ledger": ledger(layers), "layers": layers}
        result = result_of(run, vars(p), memory, len(self.states), self._by_rank(state), state.endpoints())
        if run.asked:
            self._say(state, f"{len(run.asked)} answers are written, to score them")
        with self.accelerator.autocast():
            found = written.scores(self.adapters, run.name, run.asked, run.tokenizer, run.settings.generate_metric)
        result["metrics"] = {**result["metrics"], **found}
        split, wrong = next(iter(run.validation)), None
        predicted, truth = (state.predictions[f"{split}/{what}"].numpy() for what in ("logits", "labels"))
        result["learned"] = {"split": split, **learned.learned(run.task, predicted, truth)}
        result["warnings"] += lost_classes(result)
        if self.accelerator.is_main_process:
            with state.folder.writing():
                self.adapters.save(state.folder.path / "adapter", run.name, saved_as=run.adapter_name)
                base = public_name(s.model)
                saved.save(state.folder.path / "adapter", run.task, s.max_length, run.tokenizer, base)
                write_text(state.folder.path / "adapter" / model_card.FILE, card.card(run, result))
                wrong = learned.worst(run.task, reported(run.task, run.settings), run.validation[split], predicted)
            state.folder.finish(result, state.predictions, "" if wrong is None else tables.render(wrong, ".csv"))
        for warning in result["warnings"]:
            self._say(state, f"warning: {warning}")
        self.accelerator.wait_for_everyone()
        return result

    def _by_rank(self, state: RunState) -> dict[str, dict[str, float]]:
        """Evaluate at each rank an adapter that was trained for many; empty for any other."""
        run, scores = state.run, {}
        factors = self.adapters.spec(run.name).recipe.factors
        for rank in () if factors is None else factors.ranks:
            with self.adapters.active.changed(chosen={run.name: rank}):
                found = {key: self._predictions([state], rows)[0] for key, rows in run.validation.items()}
            scores[str(rank)] = state.scores(found)
        return scores


def _check_streams(choices: Sequence[fast.Choice]) -> None:
    """Refuse runs together where attention outside a block draws dropout for all rows from torch's own generator."""
    reasons = [choice.reason for choice in choices if choice.piece in ("block", "dropout") and not choice.used]
    if reasons:
        raise UserError(f"these runs cannot share passes: {reasons[0]}")


def _accelerator(run: PreparedRun, autocast: bool) -> Accelerator:
    settings = run.settings
    # full fine-tuning reaches tensors that a forward pass need not use (a pooler, say)
    unused = DistributedDataParallelKwargs(
        find_unused_parameters=run.adapters.spec(run.name).recipe.learn_base is not None
    )
    return Accelerator(
        mixed_precision="bf16" if autocast else "no",
        cpu=not settings.gpu,
        log_with=settings.track,
        project_dir=str(settings.folder) if settings.track else None,
        kwargs_handlers=[unused],
    )
