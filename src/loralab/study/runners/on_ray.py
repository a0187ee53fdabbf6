"""Runs as tasks of Ray, on this machine or a cluster that shares the store's file system.

A worker that dies in the middle of a run loses at most an epoch: Ray starts the task again, and the run goes on from
its checkpoint. A task takes `threads` cores (one by default), and a GPU where the cluster has any.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from loralab.errors import UserError
from loralab.study.bar import StudyBar
from loralab.study.runners.one import run
from loralab.train import Outcome, Settings

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
            yield from _results(ray, runs, adapters)
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
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--on ray:{address}: {str(error).splitlines()[0]}; is the cluster up? (ray start --head)"
        ) from error


def _results(ray: ModuleType, runs: Sequence[Settings], adapters: bool) -> Iterator[tuple[Settings, Outcome]]:
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(max_retries=RETRIES)(_work)
    left: dict[Any, Settings] = {}
    for settings in runs:
        threads = settings.threads or 1
        at = replace(settings, out=settings.folder.absolute(), threads=threads)
        left[task.options(num_cpus=threads, num_gpus=gpus).remote(at, adapters)] = settings
    while left:
        (done,), _ = ray.wait(list(left), num_returns=1)
        settings = left.pop(done)
        try:
            yield settings, ray.get(done)
        except ray.exceptions.RayError as error:
            yield settings, UserError(f"the worker died {RETRIES + 1} times: {str(error).splitlines()[0]}")


def _work(settings: Settings, adapters: bool) -> Outcome:
    return run(settings, None, adapters)
