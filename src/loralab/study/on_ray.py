"""Groups of runs as tasks of Ray, on this machine or a cluster that shares the store's file system.

A worker that dies in the middle of its runs loses at most an epoch of them: Ray starts the task again, and each run
goes on from its checkpoint. A task takes `threads` cores (one by default), and a GPU where the cluster has any; runs
that can share passes do (see `together`), in no larger groups than keep every core busy.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from loralab.errors import UserError
from loralab.run import Outcome, Settings
from loralab.run.sharing import MOST, grouped
from loralab.study.bar import StudyBar
from loralab.study.stored import run_stored_together

LOOKS = 5.0  # seconds after which the study says again that it waits
RETRIES = 5  # deaths of a worker that one run outlives; more is a broken machine or too little memory
INSTALL = "--on ray needs Ray: pip install 'loralab[ray]'"


@dataclass(frozen=True)
class OnRay:
    address: str | None = None  # of a cluster; None starts Ray on this machine
    wide: bool = True  # all runs of a stage at once, over models and tasks

    def run(self, runs: Sequence[Settings], bar: StudyBar, adapters: bool) -> Iterator[tuple[Settings, Outcome]]:
        ray = library()
        _connect(ray, self.address)
        try:
            yield from _results(ray, runs, bar, adapters)
        finally:
            ray.shutdown()  # ends the workers; their runs go on from their checkpoints next time


def library() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError(INSTALL) from None
    return ray  # type: ignore[no-any-return]


def _connect(ray: ModuleType, address: str | None) -> None:
    try:
        ray.init(
            address=address or "local",  # None would join what the last Ray on this machine left, dead or alive
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--on ray:{address}: {str(error).splitlines()[0]}; is the cluster up? (ray start --head)"
        ) from error


def _results(
    ray: ModuleType, runs: Sequence[Settings], bar: StudyBar, adapters: bool
) -> Iterator[tuple[Settings, Outcome]]:
    resources = ray.cluster_resources()
    gpus = 1 if resources.get("GPU") else 0
    task = ray.remote(max_retries=RETRIES)(_work)
    ready = [replace(s, out=s.folder.absolute(), threads=s.threads or 1) for s in runs]
    original = {at.folder: settings for at, settings in zip(ready, runs, strict=True)}
    left: dict[Any, tuple[Settings, ...]] = {}
    workers = max(1, resources.get("GPU") or resources.get("CPU", 1))
    for group in grouped(ready, min(MOST, math.ceil(len(runs) / workers))):
        threads = group.runs[0].threads
        left[task.options(num_cpus=threads, num_gpus=gpus).remote(group.runs, adapters)] = group.runs
    while left:
        bar.elsewhere(f"{len(left)} tasks of Ray")
        finished, _ = ray.wait(list(left), num_returns=1, timeout=LOOKS)
        if not finished:
            continue
        (done,) = finished
        group_runs = left.pop(done)
        try:
            outcomes = ray.get(done)
        except ray.exceptions.LocalRayletDiedError as error:  # no fault of the runs
            raise UserError(f"Ray itself ended: {str(error).splitlines()[0]} The same command goes on.") from error
        except ray.exceptions.RayError as error:
            outcomes = [UserError(cause(ray, error))] * len(group_runs)
        yield from zip((original[s.folder] for s in group_runs), outcomes, strict=True)


def _work(many: Sequence[Settings], adapters: bool) -> list[Outcome]:
    return run_stored_together(many, None, adapters)


def cause(ray: ModuleType, error: Exception) -> str:
    """Why Ray has no outcome: what the task raised, or how its worker ended."""
    if isinstance(error, ray.exceptions.RayTaskError):
        raised = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
        text = " ".join(str(raised).split())
        return text if isinstance(raised, UserError) else f"{type(raised).__name__}: {text}"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return f"Ray ended the worker as its machine ran out of memory: {first}"
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return f"the worker died {RETRIES + 1} times: {first}"
    return f"{type(error).__name__}: {first}"
