"""Studies: a file says all that is wrong with it, equal runs are one run, and what was done is not done again."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from loralab import UserError, objectives
from loralab.cli import main
from loralab.data.batches import batch_width
from loralab.recipe import recipe
from loralab.run import Settings
from loralab.run import loop as loop_module
from loralab.run.estimate import EstimateSettings
from loralab.run.estimate import estimate as memory
from loralab.run.setup import prepare
from loralab.study import load
from loralab.study.bar import StudyBar
from loralab.study.results import outline
from loralab.study.run_study import run_study
from loralab.study.runners import runner
from loralab.study.schedule import notes, schedule
from loralab.study.toml import define

STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(tiny, own, **given):
    """A study of two methods that takes seconds."""
    task = {"name": "animals", "task": str(own["class"]), "text": "sentence", "label": "label"}
    return {
        "tasks": [task],
        "models": [str(tiny)],
        "seeds": [0, 1],
        "protocol": {"epochs": 2, "max_length": 32, "batch_size": 20, "lr": 2e-2},
        "methods": [{"method": "lora", "rank": 3}, {"method": "head"}],
        **given,
    }


def study(tiny, own, **given):
    return define(table(tiny, own, **given), "animals", Path())


def carried_out(definition, out="out", on="in-turn", **given):
    return run_study(definition, Path(out), runner(on), StudyBar(), **given)


@pytest.fixture
def begun(monkeypatch) -> list[tuple[str, int]]:
    """(address, epochs done before) of every run that really trains."""
    run, found = loop_module.Loop.run, []

    def counted(self):
        for state in self.states:
            progress = state.folder.read_checkpoint()
            found.append((state.settings.folder.name, progress[0]["epoch"] if progress else 0))
        return run(self)

    monkeypatch.setattr(loop_module.Loop, "run", counted)
    return found


def test_a_study_without_a_terminal_says_how_far_it_is(tiny, own, here, capsys, monkeypatch):
    monkeypatch.setattr("loralab.run.bar.Pulse.every", 0.0)
    carried_out(study(tiny, own, seeds=[0]))
    lines = [line for line in capsys.readouterr().err.splitlines() if " rows, loss " in line]
    assert lines
    form = r"\d/2 runs(, (\d+ min )?\d+ s left)?; .*: \d+ of \d+ rows, loss \d\.\d+"
    assert all(re.fullmatch(form, line) for line in lines), lines


# ---- a file ----------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once(tiny, own):
    given = table(
        tiny, own, sedes=[1], seeds=[0, 0], compare={"against": "loar", "margin": {"acuracy": 0.1}},
        protocol={"epoch": 3, "seed": 4, "epochs": "many", "selection": "best"},
        methods=[
            {"method": "lora", "rnak": 2}, {"method": "dora", "rank": 0},
            {"method": "dora", "lr": 0.1, "tune": {"lr": [1.0]}},
            {"method": "vera", "tune": {"lr": {"low": 0.1, "high": 1}}},
        ],
        tune={"serach": "grid"},
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        define(given, "animals", Path())
    told = str(caught.value)
    for part in (
        "no 'sedes' (did you mean 'seeds'?)", "seeds: [0, 0]", "no 'loar' (did you mean 'lora'?)",
        "did you mean 'accuracy'",
        "did you mean 'epochs'", "no 'seed': seeds = [...]", "epochs='many': expected a whole number",
        "selection='best': expected 'held-out' or", "did you mean 'rank'", "rank=0", "dora named twice",
        "lr is both set and tuned", "lr is a range", "did you mean 'search'",
    ):  # fmt: skip
        assert part in told


@pytest.mark.parametrize(("text", "told"), [("a = [", "is no TOML"), ("", "methods: expected one or more")])
def test_a_file_that_is_no_study_exits_with_2(here, capsys, text, told):
    (here / "x.toml").write_text(text)
    assert main(["study", "x.toml"]) == 2
    assert told in capsys.readouterr().err
    assert main(["study", "y.toml"]) == 2


def test_a_point_of_the_axes_becomes_a_method_each_and_flags_win(tiny, own):
    d = study(
        tiny, own, methods=[{"name": "r{rank} {targets}", "each": {"rank": [2, 5], "targets": ["attention", "mlp"]}}]
    )
    assert [m.label for m in d.methods] == ["r2 attention", "r2 mlp", "r5 attention", "r5 mlp"]
    assert d.settings(d.tasks[0], str(tiny), d.methods[1], 7, {}).targets == "mlp"
    flagged = define(table(tiny, own), "animals", Path(), seeds=(5, 6), tasks=("animals", "rte"), models=("mpnet",))
    assert (flagged.seeds, flagged.models) == ((5, 6), ("mpnet",))
    assert [t.settings.get("text") for t in flagged.tasks] == [("sentence",), None]


def test_a_tasks_settings_win_over_the_protocol_and_a_methods_over_both(tiny, own):
    given = table(tiny, own)
    given["tasks"][0] |= {"epochs": 7, "warmup": 0.2}
    given["methods"][1] |= {"warmup": 0.3}
    d = define(given, "animals", Path())
    lora, head = (d.settings(d.tasks[0], str(tiny), m, 0, {}) for m in d.methods)
    assert (lora.epochs, lora.warmup, lora.batch_size) == (7, 0.2, 20)
    assert (head.epochs, head.warmup) == (7, 0.3)


def test_unequal_budgets_and_optimistic_selection_are_told(tiny, own):
    def told(**given):
        return " ".join(notes(study(tiny, own, **given)))

    unlike = [{"method": "lora"}, {"method": "full", "tune": {"weight_decay": [0.0, 0.1, 0.3]}}]
    assert "budgets differ" in told(methods=unlike, tune={"rank": [1, 2]}, protocol={"epochs": 1})
    assert "budgets differ" not in told(methods=unlike, tune={"weight_decay": [0, 0.1, 0.2]})
    assert "optimistic" in told(protocol={"selection": "validation"})


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_named_study_can_be_planned(file, tiny, here, capsys):
    assert main(["study", str(file), "--model", str(tiny), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["name"] == file.stem
    assert told["runs"] > 0
    assert told["done"] == 0
    assert not any(here.iterdir())  # a dry run writes nothing


# ---- running ---------------------------------------------------------------------------------------------------------


def test_a_study_runs_everything_once_and_a_change_runs_what_changed(tiny, own, here, begun):
    done = carried_out(study(tiny, own))
    assert len(begun) == 4
    assert all(cell.pending == 0 and len(cell.runs) == 2 for cell in done.cells().values())
    first = {run.scheduled.address: run.result for cell in done.cells().values() for run in cell.runs}
    again = carried_out(study(tiny, own))
    assert len(begun) == 4
    assert first == {run.scheduled.address: run.result for cell in again.cells().values() for run in cell.runs}
    carried_out(study(tiny, own, seeds=[1, 2]))
    assert len(begun) == 6  # the seed 2 of both methods
    ranks = [{"method": "lora", "rank": 3}, {"name": "more", "rank": 4}]
    other = carried_out(study(tiny, own, name="other", methods=ranks), "other")
    assert len(begun) == 8  # rank 3 is shared with the first study
    assert sorted(first) == sorted({p.address for p in done.schedule})
    assert {p.address for p in other.schedule} & set(first)
    assert load("out").schedule == plan_as_read("out")


def plan_as_read(folder):
    return tuple(load(folder).schedule)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("on", "at", "finished", "epochs"),
    # an epoch has 9 steps; in turn the second run is cut off in its second epoch, together both of the first group are
    [("in-turn", 30, [1, 0], [0, 0, 1, 0, 0]), ("together", 12, [0, 0], [0, 0, 1, 1, 0, 0])],
)
def test_an_interrupted_study_goes_on_in_the_middle_of_a_run(tiny, own, here, begun, cut_off, on, at, finished, epochs):
    whole = carried_out(study(tiny, own, store="elsewhere"), "whole")
    begun.clear()
    (here / "x.toml").write_text(toml(tiny, own))
    with cut_off(at):
        assert main(["study", "x.toml", "--on", on]) == 130
    cells = load("runs/studies/x").cells()
    assert [len(cell.runs) for cell in cells.values()] == finished
    assert [cell.pending for cell in cells.values()] == [2 - n for n in finished]
    assert main(["study", "x.toml", "--json", "--on", on]) == 0
    assert begun[1][0] == begun[len(epochs) - 3][0]  # the run that was cut off
    assert [done for _, done in begun] == epochs
    for key, cell in load("runs/studies/x").cells().items():
        assert [run.selected for run in cell.runs] == [run.selected for run in whole.cells()[key].runs]


def toml(tiny, own) -> str:
    task = f'name = "animals"\ntask = "{own["class"]}"\ntext = "sentence"\nlabel = "label"\n'
    protocol = "epochs = 2\nmax_length = 32\nbatch_size = 20\nlr = 2e-2\n"
    methods = '[[methods]]\nmethod = "lora"\nrank = 3\n[[methods]]\nmethod = "head"\n'
    return f'models = ["{tiny}"]\nseeds = [0, 1]\n[[tasks]]\n{task}[protocol]\n{protocol}{methods}'


def test_an_unfinished_run_whose_data_moved_starts_anew(tiny, own, here, begun):
    d = study(tiny, own, seeds=[0], methods=[{"method": "lora"}])
    (planned,) = schedule(d)
    folder = d.store / planned.address
    shutil.copytree(carried_out(d).store / planned.address, here / "kept")
    (folder / "result.json").unlink()
    shutil.copy(own["class"], here / "moved.csv")
    tasks = [{"name": "animals", "task": str(here / "moved.csv"), "text": "sentence", "label": "label"}]
    carried_out(study(tiny, own, seeds=[0], methods=[{"method": "lora"}], tasks=tasks))
    assert [name for name, _ in begun] == [planned.address] * 2
    assert json.loads((folder / "run.json").read_text())["settings"]["task"].endswith("moved.csv")


def test_a_run_that_fails_is_told_kept_apart_and_run_again_when_asked(tiny, own, here, begun, monkeypatch, capsys):
    row = objectives.OBJECTIVES["classification"]
    torn = dataclasses.replace(row, loss=lambda x, y: row.loss(x, y) * (float("nan") if y.sum() % 7 == 3 else 1))
    monkeypatch.setitem(objectives.OBJECTIVES, "classification", torn)
    (here / "x.toml").write_text(toml(tiny, own))
    assert main(["study", "x.toml"]) == 2
    _, err = capsys.readouterr()
    assert "loss is nan" in err
    assert "failed" in err
    count = len(begun)
    assert main(["study", "x.toml"]) == 2
    assert len(begun) == count  # it would fail again
    monkeypatch.setitem(objectives.OBJECTIVES, "classification", row)
    assert main(["study", "x.toml", "--retry"]) == 0
    assert all(len(cell.runs) == 2 and not cell.failed for cell in load("runs/studies/x").cells().values())


@pytest.fixture
def broken(monkeypatch):
    """`with broken(wrong, error):` raises the error in a pass with a run whose settings are `wrong`."""
    step = loop_module.Loop.step

    @contextmanager
    def breaking(wrong, error):
        def broken_step(self):
            if any(wrong(state.settings) for state in self.states):
                raise error
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(loop_module.Loop, "step", broken_step)
            yield

    return breaking


@pytest.mark.few(2)
@pytest.mark.parametrize("on", ["in-turn", "together"])
@pytest.mark.parametrize(
    "error",
    [
        KeyError("layer.3"),
        RuntimeError("CUDA out of memory.\nTried"),
        MemoryError(),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_ends_its_run_alone_and_leaves_its_traceback(tiny, own, here, broken, capsys, on, error):
    """The others go on, in its pass too; the same command reads the failure, and --retry runs it again."""
    (here / "x.toml").write_text(toml(tiny, own))
    with broken(lambda s: s.seed == 1 and s.method == "lora", error):
        assert main(["study", "x.toml", "--on", on]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    first = " ".join(str(error).split())
    assert type(error).__name__ in message
    assert first in message
    lora, head = load("runs/studies/x").cells().values()
    assert [run.seed for run in lora.runs] == [0]
    assert [run.seed for run in head.runs] == [0, 1]
    assert (lora.pending, head.pending, len(lora.failed)) == (0, 0, 1)
    (failed,) = Path("runs/store").glob("*/failed.json")
    content = json.loads(failed.read_text())
    assert "in broken_step" in content["traceback"]
    assert type(error).__name__ in content["error"]
    assert main(["study", "x.toml", "--on", on]) == 2  # it is told again, not run again
    assert "in broken_step" in json.loads(failed.read_text())["traceback"]
    assert main(["study", "x.toml", "--on", on, "--retry"]) == 0
    assert not failed.exists()


def test_an_exception_before_a_run_begins_ends_it_alone_too(tiny, own, here, monkeypatch):
    prepared = loop_module.prepare_together

    def broken(many, *rest, **named):
        if any(s.seed == 1 for s in many):
            raise ZeroDivisionError("of a bug")
        return prepared(many, *rest, **named)

    monkeypatch.setattr(loop_module, "prepare_together", broken)
    done = carried_out(study(tiny, own), on="together")
    for cell in done.cells().values():
        assert len(cell.runs) == 1
        (why,) = cell.failed
        assert "ZeroDivisionError: of a bug" in why
    monkeypatch.setattr(loop_module, "prepare_together", prepared)
    again = carried_out(study(tiny, own), on="together", retry=True)
    assert [len(cell.runs) for cell in again.cells().values()] == [2, 2]


def test_a_full_disk_is_no_fault_of_a_run(tiny, own, here, broken, capsys):
    (here / "x.toml").write_text(toml(tiny, own))
    with broken(lambda s: True, OSError(errno.ENOSPC, "No space left on device")):
        assert main(["study", "x.toml"]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("runs/store").glob("*/failed.json"))
    assert main(["study", "x.toml"]) == 0


@pytest.mark.slow
def test_processes_come_to_what_one_comes_to(tiny, own, here):
    """A study in two processes, tuned and with a failing method, has the cells of one in turn."""
    methods = [{"method": "lora", "rank": 3}, {"method": "full"}]
    given = {"methods": methods, "tune": {"lr": [1e-3, 3e-2], "seed": 9}}
    one, two = carried_out(study(tiny, own, **given)), Path("runs/store")
    shutil.move(two, "runs/first")
    other = carried_out(study(tiny, own, **given), on="processes:2")
    for cell, same in zip(one.cells().values(), other.cells().values(), strict=True):
        assert [r.scheduled for r in cell.runs] == [r.scheduled for r in same.runs]
        for a, b in zip(cell.runs, same.runs, strict=True):
            assert b.result["metric"] == pytest.approx(a.result["metric"], abs=1e-5)


def test_what_runs_in_another_process_is_told_while_it_runs(tiny, own, here, monkeypatch, capsys):
    """Rows done of all processes, in a line a minute where stderr is no terminal; it was silent until a group ended."""
    monkeypatch.setattr("loralab.run.bar.Pulse.every", 0.0)
    monkeypatch.setattr("loralab.study.in_processes.LOOKS", 0.01)
    protocol = {"epochs": 12, "max_length": 32, "batch_size": 20}
    d = study(tiny, own, methods=[{"method": "lora", "rank": 3}], seeds=[0, 1], protocol=protocol)
    carried_out(d, on="processes:1")
    told = re.findall(r"in 1 process: (\d+) of (\d+) rows", capsys.readouterr().err)
    rows = {int(done) for done, _ in told}
    assert {int(whole) for _, whole in told} == {2 * 12 * (240 - 48 - 19)}  # both runs are one group
    assert len(rows) > 3
    assert max(rows) <= 2 * 12 * 173


def test_processes_of_a_killed_study_end_with_it(tiny, own, here):
    """They trained on to the end of their group, an hour, and held its runs against the same command given again."""
    (here / "x.toml").write_text(toml(tiny, own).replace("epochs = 2", "epochs = 5000"))
    command = [sys.executable, "-m", "loralab", "study", "x.toml", "--on", "processes:2"]
    with (here / "stderr").open("w") as told:
        parent = subprocess.Popen(command, stderr=told, start_new_session=True)
    try:
        while not list(here.glob("runs/store/*/metrics.jsonl")):  # its processes train now
            assert parent.poll() is None, (here / "stderr").read_text()
            time.sleep(0.1)
        parent.kill()
        parent.wait()
        killed = time.monotonic()
        while alive(parent.pid):
            assert time.monotonic() - killed < 20, "a process of the study lives on"
            time.sleep(0.1)
    finally:
        if alive(parent.pid):
            os.killpg(parent.pid, signal.SIGKILL)


def alive(group: int) -> bool:
    """Whether the process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.few(2)
@pytest.mark.parametrize("on", ["in-turn", "together"])
@pytest.mark.parametrize("leftover", ["run.json.tmp", "run.json", "metrics.jsonl", "checkpoint.new/state.safetensors"])
def test_what_a_killed_start_left_is_recovered(tiny, own, here, leftover, on):
    """In run folders a file that was being written, or an empty one; in the study folder likewise."""
    d = study(tiny, own)
    for scheduled in schedule(d):
        file = d.store / scheduled.address / leftover
        file.parent.mkdir(parents=True)
        file.write_text("" if leftover == "run.json" else '{"settings": {"ta')
    Path("out").mkdir()
    Path("out/study.json.tmp").write_text('{"name": "ani')
    done = carried_out(d, on=on)
    assert [len(cell.runs) for cell in done.cells().values()] == [2, 2]


def test_a_registered_study_keeps_its_question(tiny, own, here):
    small = {"seeds": [0], "methods": [{"method": "head"}]}
    d = study(tiny, own, registered=True, **small)
    assert carried_out(d).question == json.loads(Path("out/study.json").read_text())["question"]
    carried_out(study(tiny, own, registered=True, about="in other words", adapters=False, **small))
    for changed in ({"seeds": [0, 1]}, {"compare": {"alpha": 0.1}}, {"protocol": {"epochs": 1}}):
        for registered in (True, False):
            with pytest.raises(UserError, match=f"question has changed .*{next(iter(changed))}"):
                carried_out(study(tiny, own, registered=registered, **small | changed))
    carried_out(study(tiny, own, registered=True, **small | {"seeds": [1]}), "other")


def test_tuning_chooses_by_held_out_rows_and_the_runs_use_its_choice(tiny, own, here, begun):
    methods = [{"method": "lora", "rank": 3}, {"method": "full"}]
    protocol = {"epochs": 3, "max_length": 32, "batch_size": 20, "selection": "last"}
    done = carried_out(study(tiny, own, methods=methods, protocol=protocol, tune={"lr": [1e-6, 3e-2], "seed": 9}))
    for cell in done.cells().values():
        assert (len(cell.tuning), len(cell.runs), cell.trials) == (2, 2, 2)
        assert {run.seed for run in cell.tuning} == {9}
        assert {run.result["protocol"]["selection"] for run in cell.tuning} == {"held-out"}
        assert {run.result["protocol"]["selection"] for run in cell.runs} == {"last"}
        scores = {}
        for run in cell.tuning:
            held_out = [row["held_out"]["accuracy"] for row in run.history]
            scores[run.scheduled.tried["lr"]] = held_out[run.result["selected_epoch"] - 1]
        best = max(scores, key=scores.get)
        assert {run.scheduled.settings["lr"] for run in cell.runs} == {best}
    assert len(begun) == 8


def test_a_folder_of_something_else_is_left_alone(tiny, own, here):
    (here / "mine").mkdir()
    (here / "mine/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        carried_out(study(tiny, own), "mine")
    with pytest.raises(UserError, match="no study.json"):
        load("mine")


def test_weights_are_kept_unless_the_study_says_otherwise(tiny, own, here):
    small = {"seeds": [0], "methods": [{"method": "lora"}]}
    for keep in (True, False):
        done = carried_out(study(tiny, own, adapters=keep, store=f"store{keep}", **small), f"out{keep}")
        (run,) = next(iter(done.cells().values())).runs
        assert (run.folder / "adapter").is_dir() == keep


def test_the_outline_counts_and_guesses_from_what_is_done(tiny, own, here):
    d = study(tiny, own)
    before = outline(d, schedule(d))
    assert (before["runs"], before["done"], before["estimate"]["guessed"]) == (4, 0, 0)
    carried_out(dataclasses.replace(d, seeds=(0,)))
    after = outline(d, schedule(d))
    guess = after["estimate"]
    assert (after["done"], guess["guessed"], guess["unknown"]) == (2, 2, 0)
    runs = [run for cell in load("out").cells().values() for run in cell.runs]
    assert guess["seconds"] == pytest.approx(sum(run.result["time"]["train_s"] for run in runs))
    assert guess["peak_bytes"] == max(run.result["memory"]["peak_bytes"] for run in runs)


def test_runs_of_another_machine_say_nothing_of_the_time_on_this_one(tiny, own, here):
    d = study(tiny, own)
    carried_out(dataclasses.replace(d, seeds=(0,)))
    for file in d.store.glob("*/run.json"):
        facts = json.loads(file.read_text())
        facts["hardware"]["gpu"] = "a faster one"
        file.write_text(json.dumps(facts))
    after = outline(d, schedule(d))
    assert (after["done"], after["estimate"]["guessed"], after["estimate"]["planned"]) == (2, 0, 2)


# ---- search and runners ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_and_ends_where_it_would_have(tiny, own, here, begun, cut_off):
    pytest.importorskip("optuna", reason="needs loralab[search]")
    grid = {"search": "optuna", "trials": 7, "lr": {"low": 1e-5, "high": 0.1, "log": True}}
    protocol = {"epochs": 3, "max_length": 32, "batch_size": 20}
    given = {"tune": grid, "protocol": protocol, "methods": [{"method": "lora"}], "seeds": [0]}
    whole = carried_out(study(tiny, own, **given, store="elsewhere"), "whole")
    begun.clear()
    with cut_off(70), pytest.raises(KeyboardInterrupt):  # in the third trial
        carried_out(study(tiny, own, **given))
    assert [p.address is None for p in load("out").schedule].count(True) > 0
    gone_on = carried_out(study(tiny, own, **given))
    assert [p.address for p in gone_on.schedule] == [p.address for p in whole.schedule]
    (cell,), (other,) = gone_on.cells().values(), whole.cells().values()
    assert cell.trials == 7
    assert [run.scheduled.tried for run in cell.tuning] == [run.scheduled.tried for run in other.tuning]
    best = max(run.history[run.result["selected_epoch"] - 1]["held_out"]["accuracy"] for run in cell.tuning)
    chosen = [r for r in cell.tuning if r.scheduled.tried["lr"] == cell.runs[0].scheduled.settings["lr"]]
    assert chosen[0].history[chosen[0].result["selected_epoch"] - 1]["held_out"]["accuracy"] == best
    count = len(begun)
    carried_out(study(tiny, own, **given))
    assert len(begun) == count  # what was pruned stays pruned, what is finished is read


@pytest.mark.parametrize(
    ("on", "told"),
    [
        ("spark", "expected together, in-turn, processes, ray"),
        ("in-turn:x", "has no address"),
        ("together:0", "expected how many"),
        ("processes:0", "expected how many"),
        ("processes:many", "expected how many"),
    ],
)
def test_an_unknown_runner_is_refused(on, told):
    with pytest.raises(UserError, match=told):
        runner(on)


# ---- what is left ----------------------------------------------------------------------------------------------------


def left(tiny, own, **given):
    definition = study(tiny, own, **given)
    return outline(definition, schedule(definition))["estimate"]


def test_runs_like_none_that_is_finished_are_planned(tiny, own, here):
    """The peak is the planner's for the widest batch; seconds are in proportion to what is computed."""
    once = left(tiny, own)
    assert (once["guessed"], once["planned"], once["unknown"]) == (0, 4, 0)
    settings = Settings(task=str(own["class"]), text=("sentence",), label="label", model=str(tiny), max_length=32)
    widest = max(len(ids) for ids in prepare(settings).train.columns["input_ids"])
    setup = EstimateSettings(model=str(tiny), batch_size=20, max_length=batch_width(widest))
    assert once["peak_bytes"] == max(memory(setup, made).peak for made in (recipe("lora", rank=3), recipe("head")))
    base = {"epochs": 2, "max_length": 32, "batch_size": 20, "lr": 2e-2}
    for changed in ({"seeds": [0, 1, 2, 3]}, {"protocol": base | {"epochs": 4}}):
        assert left(tiny, own, **changed)["seconds"] == pytest.approx(2 * once["seconds"])
    with_full = left(tiny, own, methods=[{"method": "full"}, {"method": "lora"}])
    assert with_full["seconds"] > 1.5 * once["seconds"]  # a head needs no backward pass through the base
    assert with_full["peak_bytes"] > once["peak_bytes"]


def test_finished_runs_tell_more_than_the_planner(tiny, own, here):
    carried_out(study(tiny, own, seeds=[0], methods=["lora"]))
    half = left(tiny, own, methods=["lora", "head"])
    assert (half["guessed"], half["planned"], half["unknown"]) == (3, 0, 0)


def test_what_lies_on_the_hub_is_not_known(tiny, own, here, capsys):
    elsewhere = left(tiny, own, models=["someone/some-model"])
    assert (elsewhere["planned"], elsewhere["unknown"], elsewhere["seconds"]) == (0, 4, 0)
    glue = left(tiny, own, tasks=["cola"])
    assert (glue["planned"], glue["unknown"]) == (0, 4)
    main(["study", str(STUDIES[0]), "--model", str(tiny), "--dry-run"])
    assert "not known: their model or rows are not on this machine" in capsys.readouterr().out
