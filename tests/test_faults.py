"""What goes wrong from outside: kills, full disks, lost folders, second writers, damaged checkpoints, other data.

`make reliability` kills before every file operation, and eight methods, instead of before a few.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LONG, tiny_model
from safetensors.torch import load_file
from test_train import settings, tensors, timeless

from loralab import UserError
from loralab.cli import main
from loralab.rankmap import LayerRank, RankMap
from loralab.run import RunInterrupted, Settings, train, train_together
from loralab.run.folder import RunFolder
from loralab.run.state import RunState

METHODS = {  # settings with which each trains in six steps
    "lora": {}, "dylora": {"rank": 3}, "dora": {}, "adalora": {}, "qlora": {}, "full": {}, "vera": {}, "delta-lora": {}
}  # fmt: skip
SOURCE = Path(sys.modules["loralab"].__file__).parents[1]


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """Settings of a run of six steps, three checkpoints, on 60 rows."""
    drawn, file = np.random.default_rng(0), tmp_path_factory.mktemp("short") / "rows.csv"
    lines = ["sentence,label"]
    for _ in range(60):
        animal, words = drawn.choice(["cat", "dog"]), drawn.choice(["red", "blue", "big"], drawn.integers(0, 5))
        lines.append(f"{' '.join(['the', *words, animal, 'sees'])},{animal}")
    file.write_text("\n".join(lines) + "\n")
    return {
        "task": str(file), "label": "label", "model": str(tiny), "method": "lora", "lr": 2e-2, "dtype": "float32",
        "epochs": 2, "batch_size": 20, "max_length": 16, "checkpoint_every": 2,
    }  # fmt: skip


def flags_of(run, without=None):
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in run.items() if key != without]
    return [word for pair in pairs for word in pair]


def reports(plans, place):
    """Run the plans of faults.py and return their reports."""
    (place / "plans.json").write_text(json.dumps(plans))
    command = [sys.executable, str(Path(__file__).parent / "faults.py"), "plans.json", "reports.json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "reports.json").read_text())


# ---- at exact file operations ----------------------------------------------------------------------------------------


def test_runs_and_studies_survive_kills_and_faults_at_file_operations(short, tmp_path, tally):
    """The same command comes to the same bits; a full disk, say, is one line that names folder and reason.

    Runs that share a pass come to the same within rounding: a resumed one may share its steps with fewer.
    """

    def points(few, more):
        return more if LONG else few

    alone, shared = [short], [short, {**short, "seed": 1}, {**short, "method": "dora"}]
    data = {"name": "animals", "task": short["task"], "text": "sentence", "label": "label"}
    protocol = {key: short[key] for key in ("epochs", "batch_size", "max_length", "lr", "checkpoint_every")}
    study = {"tasks": [data], "models": [short["model"]], "seeds": [0], "protocol": protocol}
    study["methods"] = ["lora", "head"]
    one_pass = {"tolerance": 1e-5}
    plans = [
        {"runs": alone, "fault": "kill", "points": points(7, 0)},
        {"runs": alone, "fault": "ENOSPC", "points": points(5, 40)},
        {"runs": alone, "fault": "kill at random", "points": points(1, 20)},
        {"runs": shared, "fault": "kill", "points": points(2, 20)} | one_pass,
        {"study": study, "on": "in-turn", "fault": "kill", "points": points(2, 20)},
        {"study": study, "on": "in-turn", "fault": "ENOSPC", "points": points(2, 20)},
    ]
    if LONG:
        runs = [[{**short, "method": m, "seed": i, **METHODS[m]}] for i, m in enumerate(METHODS)]
        plans += [{"study": study, "on": "together", "fault": "kill", "points": 20} | one_pass]
        plans += [{"study": study, "on": "together", "fault": "EROFS", "points": 10} | one_pass]
        plans += [{"runs": shared, "fault": "ENOSPC", "points": 10} | one_pass]
        plans += [{"runs": run, "fault": "kill", "points": 8, "twice": True} for run in runs]
        plans += [{"runs": run, "fault": "kill at random", "points": 4} for run in runs]
        plans += [{"runs": run, "fault": f, "points": 2} for run in runs for f in ("EROFS", "EIO")]
    done = reports(plans, tmp_path)
    for report in done:
        tally("kills", report["kills"], len(report["problems"]) if report["kills"] else 0)
        tally("file faults", report["faults"], len(report["problems"]) if report["faults"] else 0)
    assert [(plan, report["problems"]) for plan, report in zip(plans, done, strict=True) if report["problems"]] == []
    full = done[1]
    assert len(full["operations"]) > 90
    assert [t for t in full["messages"] if "No space left on device" not in t or "ROOT/0" not in t] == []
    assert any("--resume goes on" in text for text in full["messages"])


def assert_same(a, b):
    for name in ("adapter/adapter.safetensors", "predictions.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(t, other[key]) for key, t in one.items())


@pytest.fixture
def disk(tmp_path):
    """A file system of its own that is nearly full, and a function that makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=16m", str(place)], check=True)
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_room(disk, short, tmp_path, capsys, tally):
    place, grow = disk
    tally("file faults")
    flags = ["train", "--text", "sentence", "--out", str(place / "run"), "--resume"]
    flags += flags_of(short)
    assert main(flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loralab:")]
    assert f"cannot write to the run folder {place}/run" in line
    assert "No space left on device" in line
    assert not list(place.rglob("*.tmp"))
    grow()
    assert main(flags) == 0
    train(Settings(**short, text=("sentence",), out=tmp_path / "whole"))
    assert_same(tmp_path / "whole", place / "run")


@pytest.mark.parametrize("made_again", [False, True])
def test_a_folder_that_is_removed_in_the_middle_is_not_made_again(short, tmp_path, monkeypatch, tally, made_again):
    """Nor is anything written to it when it is another process's by then."""
    tally("file faults")
    s, folder = Settings(**short, text=("sentence",), out=tmp_path / "r", resume=True), tmp_path / "r"
    real = RunState.step

    def step(self, loss, chosen):
        real(self, loss, chosen)
        if self.progress.step == 3:
            shutil.rmtree(folder)
            if made_again:
                folder.mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "step", step)
        with pytest.raises(RunInterrupted, match="folder was removed"):
            train(s)
    assert list(folder.iterdir()) == [] if made_again else not folder.exists()
    train(s)
    assert (folder / "result.json").is_file()


# ---- starting and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "run.json.tmp", "an empty adapter", "a failed start"])
def test_resume_starts_a_run_where_there_is_none(short, tmp_path, there):
    """So one command starts a run, goes on with it, and mends what a killed start left; with and without --resume."""
    for resume in (True, False):
        folder = tmp_path / f"r{resume}"
        if there != "nothing":
            folder.mkdir()
        if there == "run.json.tmp":
            (folder / "run.json.tmp").write_text('{"sett')
            (folder / ".lock").write_text("")
        if there == "an empty adapter":
            (folder / "adapter").mkdir()
        if there == "a failed start":
            (folder / "traceback.txt").write_text("Traceback")
            (folder / "failed.json").write_text("{}")
        train(Settings(**short, text=("sentence",), out=folder, resume=resume))
        assert {path.name for path in folder.iterdir()} == {
            "run.json", "metrics.jsonl", "adapter", "predictions.safetensors", "wrong.csv", "result.json"
        }  # fmt: skip
    assert_same(tmp_path / "rTrue", tmp_path / "rFalse")


@pytest.mark.parametrize("name", ["letter.txt", "adapter/adapter.safetensors", "checkpoint/notes.txt", "run.json.bak"])
def test_files_of_somebody_else_are_never_taken_for_a_leftover(short, tmp_path, name):
    file = tmp_path / "r" / name
    file.parent.mkdir(parents=True)
    file.write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        train(Settings(**short, text=("sentence",), out=tmp_path / "r", resume=True))
    assert [path for path in (tmp_path / "r").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "dear"


def cut(cut_off, at, **given):
    with cut_off(at), pytest.raises(KeyboardInterrupt):
        train(Settings(**given))


def test_a_run_goes_on_with_its_own_data_and_base_only(short, tmp_path, cut_off):
    task, model = tmp_path / "rows.csv", tmp_path / "model"
    text = Path(short["task"]).read_text()
    shutil.copytree(short["model"], model)
    task.write_text(text)
    run = {**short, "text": ("sentence",), "task": str(task), "model": str(model), "out": tmp_path / "r"}
    cut(cut_off, 5, **run)
    flipped = text.replace(",cat\n", ",x\n").replace(",dog\n", ",cat\n").replace(",x\n", ",dog\n")
    task.write_text(flipped)
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--resume .*r: its data have changed .sha256 was .*, now"):
        train(Settings(**run, resume=True))
    task.write_text(text)
    weights = load_file(model / "model.safetensors")
    shutil.rmtree(model)
    tiny_model(model)
    from safetensors.torch import save_file

    save_file({key: t * 1.5 for key, t in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="it began with another base"):
        train(Settings(**run, resume=True))
    assert before == {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    train(Settings(**run, resume=True))


def test_a_run_goes_on_with_its_own_rank_map_only(short, tmp_path, cut_off):
    ranks, given = tmp_path / "ranks.json", {**short, "text": ("sentence",), "out": tmp_path / "r"}
    layer = "bert.encoder.layer.0.attention.self.query"
    given |= {"targets": r".*layer\.0\.attention\.self\.query"}
    RankMap({layer: LayerRank(3)}).save(ranks)
    cut(cut_off, 5, **given, ranks=ranks)
    RankMap({layer: LayerRank(2)}).save(ranks)
    with pytest.raises(UserError, match="its recipe is another now"):
        train(Settings(**given, ranks=ranks, resume=True))


# ---- one writer ------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from loralab.run.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.open({}, False)
print("open", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_told_who_writes_and_a_dead_one_holds_nothing(short, tmp_path):
    s = Settings(**short, text=("sentence",), out=tmp_path / "r")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "r")],
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunInterrupted, match=rf"r is being written by process {other.pid} on \S+, since 20\d\d-"):
            train(s)
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / "r/.lock").exists()  # left by the dead
    train(s)
    assert not (tmp_path / "r/.lock").exists()


def test_of_runs_that_share_passes_one_whose_folder_is_taken_is_left_out(short, tmp_path):
    many = [Settings(**short, text=("sentence",), out=tmp_path / name, seed=i) for i, name in enumerate("ab")]
    folder = RunFolder(tmp_path / "a")
    folder.open(many[0].to_json(), resume=False)
    try:
        taken, done = train_together(many)
    finally:
        folder.close()
    assert isinstance(taken, RunInterrupted)
    assert done["time"]["together"] == 1
    assert not (tmp_path / "a").exists()  # it was new, and nothing was written
    same = train_together([many[0], many[0]])  # one folder twice
    assert sorted(isinstance(outcome, RunInterrupted) for outcome in same) == [False, True]


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def written(tmp_path, count=1):
    """A run folder with a checkpoint, and with `count` 2 one set aside."""
    folder = RunFolder(tmp_path)
    for i in range(count):
        if folder.checkpoint.exists():
            shutil.copytree(folder.checkpoint, tmp_path / "keep")
        folder.write_checkpoint({"step": i, "history": [{"x": 0.1}]}, {"a": torch.arange(30.0) + i})
    if count == 2:
        (tmp_path / "keep").rename(tmp_path / "checkpoint.old")
    return folder


def test_a_changed_byte_anywhere_in_a_checkpoint_is_seen(tmp_path):
    folder, drawn = written(tmp_path), random.Random(0)
    files = [folder.checkpoint / name for name in ("state.safetensors", "progress.json")]
    for file in files:
        whole = file.read_bytes()
        for at in drawn.sample(range(len(whole)), 100):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << drawn.randrange(8))]) + whole[at + 1 :])
            said = []
            assert folder.read_checkpoint(said.append) is None, at
            assert len(said) == 1
            assert "is damaged and skipped" in said[0]
        file.write_bytes(whole)
    progress, state = folder.read_checkpoint()
    assert progress["step"] == 0
    assert torch.equal(state["a"], torch.arange(30.0))


@pytest.mark.parametrize("damage", ["state", "progress", "no state", "no progress", "everything"])
def test_the_one_set_aside_takes_the_place_of_a_damaged_checkpoint(tmp_path, damage):
    folder = written(tmp_path, 2)
    assert folder.read_checkpoint()[0]["step"] == 1
    file = folder.checkpoint / ("progress.json" if "progress" in damage else "state.safetensors")
    if damage == "everything":
        shutil.rmtree(folder.checkpoint)
    else:
        file.unlink() if damage.startswith("no") else file.write_bytes(file.read_bytes()[:-9])
    said = []
    progress, state = folder.read_checkpoint(said.append)
    assert (progress["step"], state["a"][0]) == (0, 0.0)
    assert len(said) == (damage != "everything")
    folder.write_checkpoint({"step": 5}, {"a": torch.ones(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    assert folder.read_checkpoint()[0]["step"] == 5


def test_a_run_whose_checkpoint_is_damaged_says_so_and_comes_to_the_same(short, tmp_path, cut_off, capsys):
    given = {**short, "text": ("sentence",)}
    whole = train(Settings(**given, out=tmp_path / "whole"))
    cut(cut_off, 6, **given, out=tmp_path / "r")
    file = tmp_path / "r/checkpoint/state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    flags = ["train", "--text", "sentence", "--out", str(tmp_path / "r"), "--resume", *flags_of(short)]
    assert main(flags) == 0
    err = capsys.readouterr().err
    assert "checkpoint is damaged and skipped: state.safetensors is not what was written" in err
    assert "the run starts anew" in err
    assert timeless(json.loads((tmp_path / "r/result.json").read_text())) == timeless(whole)
    assert_same(tmp_path / "whole", tmp_path / "r")


def test_a_checkpoint_of_another_version_is_refused_in_one_line(short, tmp_path, cut_off):
    given = {**short, "text": ("sentence",), "out": tmp_path / "r"}
    cut(cut_off, 6, **given)
    folder = RunFolder(tmp_path / "r")
    progress, state = folder.read_checkpoint()
    folder.write_checkpoint({**progress, "more": 1}, state)
    with pytest.raises(UserError, match="another version may have written it"):
        train(Settings(**given, resume=True))


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_setting_of_the_method_reaches_the_recipe_from_the_command_line(tiny, own, tmp_path, capsys):
    flags = ["train", "--task", str(own["class"]), "--model", str(tiny), "--text", "sentence", "--label", "label"]
    flags += ["--max-length", "16", "--epochs", "1", "--method", "delta-lora", "--out", str(tmp_path / "r"), "--json"]
    assert main([*flags, "--set", "wait=4", "follow=1.5"]) == 0
    capsys.readouterr()
    recipe = json.loads((tmp_path / "r/run.json").read_text())["recipe"]
    assert (recipe["factors"]["wait"], recipe["factors"]["follow"]) == (4, 1.5)
    for more, words in (
        (["--set", "wiat=4"], ("no setting 'wiat'", "did you mean 'wait'", "follow", "lr_ratio")),
        (["--set", "rank=3", "--rank", "3"], ("rank: given as a flag and by --set",)),
        (["--set", "wait=soon"], ("wait=soon: expected",)),
        (["--set", "wait"], ("expected name=value",)),
        (["--seed", str(2**32)], ("--seed 4294967296: expected 4294967295 or less",)),
        (["--weight-decay", "nan"], ("--weight-decay nan: expected a finite number",)),
        (["--lr", "inf"], ("--lr inf: expected a finite number",)),
        (
            ["--batch-size", "0", "--clip", "-1"],
            ("--batch-size 0: expected 1 or more", "--clip -1.0: expected 0 or more"),
        ),
    ):
        assert main([*flags[:-2], str(tmp_path / "s"), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in words), line
    assert not (tmp_path / "s").exists()


def test_all_that_train_writes_is_listed_and_the_lock_is_gone(tiny, own, tmp_path):
    train(settings(tiny, own, tmp_path / "r", epochs=1))
    assert tensors(tmp_path / "r")
    assert not [path for path in (tmp_path / "r").rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
