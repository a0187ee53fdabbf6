"""Studies on Ray whose workers are killed, or whose node is lost: they go on, to the bits of undisturbed ones.

Each study runs in a process of its own, as a user's does: what a killed Ray leaves in a process may end it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from test_faults import assert_same
from test_study import carried_out, here, study, table  # noqa: F401  (fixture)

import loralab
from loralab import UserError
from loralab.study import load
from loralab.study.on_ray import cause

STUDY = """
import json, sys
from pathlib import Path
from loralab import UserError
from loralab.study.bar import StudyBar
from loralab.study.run_study import run_study
from loralab.study.runners import runner
from loralab.study.toml import define

try:
    run_study(define(json.loads(sys.argv[1]), "animals", Path()), Path("out"), runner("ray"), StudyBar())
except UserError as error:
    sys.exit(str(error))
"""
LONG = {"seeds": [0], "methods": [{"method": "lora", "epochs": 40}]}


@pytest.fixture
def workers(monkeypatch):
    """Workers of Ray import loralab from where this process has it."""
    pytest.importorskip("ray", reason="needs loralab[ray]")
    source = str(Path(loralab.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))))


@pytest.fixture
def killer(workers):
    """Kills the first process of each name once a run has a checkpoint; the list says when."""
    psutil = pytest.importorskip("psutil")
    killed = []

    over = threading.Event()

    def kill(names):
        while not over.wait(0.05):
            if not list(Path("runs/store").glob("*/checkpoint/progress.json")):
                continue
            with suppress(psutil.Error):  # a process that ends while it is looked at
                there = psutil.Process().children(recursive=True)
                found = [next((p for p in there if p.name().startswith(name)), None) for name in names]
                if None not in found:
                    for process in found:
                        process.send_signal(signal.SIGKILL)
                        killed.append(time.time())
                    return

    @contextmanager
    def killing(*names):
        thread = threading.Thread(target=kill, args=(names,))
        thread.start()
        try:
            yield killed
        finally:
            over.set()
            thread.join()

    return killing


def on_ray(tiny, own) -> subprocess.CompletedProcess:
    """The process of a study on Ray, after its end."""
    command = [sys.executable, "-c", STUDY, json.dumps(table(tiny, own, **LONG))]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def assert_undisturbed(tiny, own, done, **given):
    """Every run came to the bits of the study in turn in this process."""
    expected = carried_out(study(tiny, own, **given, store="elsewhere"), "other", on="in-turn").cells()
    for key, cell in done.cells().items():
        assert len(cell.runs) == len(expected[key].runs) > 0
        for run, other in zip(cell.runs, expected[key].runs, strict=True):
            assert_same(run.folder, other.folder)
            assert [row["validation"] for row in run.history] == [row["validation"] for row in other.history]
            assert run.result["metric"] == other.result["metric"]


@pytest.mark.slow
def test_a_worker_of_ray_that_is_killed_loses_nothing(tiny, own, here, killer, tally):  # noqa: F811
    with killer("ray::_work") as killed:
        ended = on_ray(tiny, own)
    assert ended.returncode == 0, ended.stderr
    done = load("out")
    (cell,) = done.cells().values()
    (run,) = cell.runs
    assert killed
    assert (run.folder / "run.json").stat().st_mtime < killed[0]  # it went on: a run that starts anew writes it again
    tally("workers and nodes")
    assert_undisturbed(tiny, own, done, **LONG)


@pytest.mark.slow
def test_when_ray_itself_is_killed_no_run_has_failed_and_the_same_command_goes_on(tiny, own, here, killer, tally):  # noqa: F811
    with killer("raylet", "ray::_work") as killed:
        ended = on_ray(tiny, own)
    assert killed
    assert ended.returncode != 0  # Ray may end the process that it is a library of, before the study can say a word
    if "Ray itself ended" in ended.stderr:
        assert "same command goes on" in ended.stderr.splitlines()[-1]
    assert not list(Path("runs/store").glob("*/failed.json"))
    assert on_ray(tiny, own).returncode == 0
    done = load("out")
    tally("workers and nodes")
    assert_undisturbed(tiny, own, done, **LONG)


@pytest.mark.slow
def test_a_lost_node_loses_nothing(tiny, own, here, workers, tally):  # noqa: F811
    """Two nodes on this machine, a run on each; one node goes with its run, which goes on at the other."""
    psutil = pytest.importorskip("psutil")
    from ray.cluster_utils import Cluster

    cluster, lost, over = Cluster(initialize_head=True, head_node_args={"num_cpus": 1}), [], threading.Event()
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    given = {"seeds": [0], "methods": [{"method": "lora", "epochs": 60}, {"method": "dora", "epochs": 60}]}

    def lose():
        while not over.wait(0.05):
            begun = [file.parents[1] for file in Path("runs/store").glob("*/checkpoint/progress.json")]
            if len(begun) == 2:
                pids = {folder: json.loads((folder / ".lock").read_text())["pid"] for folder in begun}
                raylet = node.all_processes["raylet"][0].process.pid
                there = [f for f, pid in pids.items() if raylet in {p.pid for p in psutil.Process(pid).parents()}]
                cluster.remove_node(node, allow_graceful=False)
                lost.extend(folder for folder in there if not (folder / "result.json").exists())
                return

    thread = threading.Thread(target=lose)
    try:
        thread.start()
        done = carried_out(study(tiny, own, **given), on=f"ray:{cluster.address}")
    finally:
        over.set()
        thread.join()
        cluster.shutdown()
    assert len(lost) == 1
    tally("workers and nodes")
    assert_undisturbed(tiny, own, done, **given)


def test_a_worker_of_ray_tells_its_cause():
    ray = pytest.importorskip("ray", reason="needs loralab[ray]")
    task_error = ray.exceptions.RayTaskError("_work", "Traceback ...", KeyError("layer.3"))
    assert cause(ray, task_error) == "KeyError: 'layer.3'"
    assert cause(ray, ray.exceptions.RayTaskError("_work", "Traceback ...", UserError("no task"))) == "no task"
    assert cause(ray, ray.exceptions.OutOfMemoryError("of 16 GB\nmore")).endswith("ran out of memory: of 16 GB")
    assert "died 6 times" in cause(ray, ray.exceptions.WorkerCrashedError())
    assert cause(ray, ray.exceptions.RuntimeEnvSetupError("no pip")).startswith("RuntimeEnvSetupError: ")
