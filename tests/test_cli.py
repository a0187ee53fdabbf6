"""The command line: results on stdout, progress on stderr, and a user's error is one line that writes nothing."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loralab
from loralab import models
from loralab.cli import COMMANDS, DOING, demo, main
from loralab.cli.headings import HEADINGS
from loralab.files import HEADER, TENSORS
from loralab.recipe import NAMED
from loralab.run import Settings
from loralab.run.bar import rate

STARTS = f"loralab train {DOING['train']} ..."
SOURCE = str(Path(loralab.__file__).parents[1])
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCE, "COLUMNS": "80"}


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv):
        code = main([str(part) for part in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(cli, tmp_path):
    """Runs a command that must be refused: one line on stderr, exit code 2, nothing written; returns the line."""

    def run(*argv):
        before = listing(tmp_path)
        code, out, err = cli(*argv)
        assert (code, out) == (2, "")
        assert err.startswith("loralab: ")
        assert err.count("\n") == 1
        assert listing(tmp_path) == before
        return err

    return run


def listing(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def flags(tiny, own, **given) -> list[str]:
    """The flags of a short run of the tiny model; None leaves a flag out."""
    settings = {"task": own["class"], "model": tiny, "text": "sentence", "label": "label", "max_length": 32,
                "epochs": 2, "lr": 2e-2, "batch_size": 20, "rank": 3, "out": "run", **given}  # fmt: skip
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in settings.items() if value is not None]
    return ["train", *(part for pair in pairs for part in pair)]


@pytest.fixture(scope="session")
def adapter(tiny, own, tmp_path_factory) -> Path:
    """The adapter folder of a short run of the tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(flags(tiny, own, out=folder)) == 0
    return folder / "adapter"


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(cli, argv):
    code, out, err = cli(*argv)
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2] != " "] == [
        *COMMANDS,
        "--help",
        "--version",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_every_flag_of_it(cli, name):
    code, out, err = cli(name, "--help")
    assert (code, err) == (0, "")
    assert COMMANDS[name][1] in " ".join(out.split())
    function = getattr(import_module(f"loralab.cli.{name}"), name)
    given = signature(function).parameters.items()
    words = {key: p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for key, p in given}
    wanted = {key.upper() if word else f"--{key.replace('_', '-')}" for key, word in words.items()}
    assert wanted - {"--settings", "--decoding"} <= set(out.split())


def test_every_setting_of_a_run_is_a_flag_under_one_heading(cli):
    _, out, _ = cli("train", "--help")
    under = " ".join(HEADINGS.values()).split()
    assert len(set(under)) == len(under)
    assert {*(f.name.replace("_", "-") for f in dataclasses.fields(Settings)), "json"} <= set(under)
    others = {"Measurement", "Prompts and adapters", "Decoding"}
    assert {heading for heading in HEADINGS if f"╭─ {heading} ─" not in out} == others
    assert "Parameters" not in out


def test_every_flag_of_the_bench_is_under_a_heading(cli):
    _, out, _ = cli("bench", "--help")
    assert "╭─ Measurement ─" in out
    assert "Parameters" not in out


def test_help_and_a_wrong_command_wait_for_nothing_slow():
    code = (
        "import sys; from loralab.cli import main; main({}); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    for argv in (["--help"], ["trian"], ["report", "/nowhere"]):
        subprocess.run([sys.executable, "-c", code.format(argv)], check=True, env=ENV, capture_output=True)


def test_version(cli):
    assert cli("--version") == (0, loralab.__version__ + "\n", "")


def test_methods_are_a_table_or_json(cli):
    code, out, err = cli("methods")
    assert (code, err) == (0, "")
    assert [name for name in NAMED if name not in out.split()] == []
    assert list(json.loads(cli("methods", "--json")[1])) == list(NAMED)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian"], "no command 'trian' (did you mean 'train'?): there are demo, train, "),
        (["--nonsense"], "no command '--nonsense': there are "),
        (["train"], "train needs --task"),
        (["train", "--task"], "--task needs a value"),
        (["train", "--tsak", "cola"], "train needs --task, not --tsak"),
        (["train", "--task", "minimal-pairs", "--rnak", "3"], "--rnak. Did you mean --rank?"),
        (["train", "--task", "minimal-pairs", "more"], "train cannot use 'more'"),
        (["train", "--task", "minimal-pairs", "--task", "records"], "--task specified multiple times"),
        (["train", "--task", "colla"], "no task 'colla': there are minimal-pairs, records, cola, "),
        (["train", "--task", "nowhere.csv", "--text", "a", "--label", "b"], "nowhere.csv does not exist"),
        (["train", "--task", "cola", "--data", "nowhere"], "nowhere does not exist"),
        (["train", "--task", "cola"], "pass --data DIR"),  # no network
        (["merge"], "merge needs FOLDER"),
        (["merge", ".", "--out", "m"], "merge needs --model"),
        (["export", ".", "--model", "."], "export needs --out"),
        (["export", ".", "--model", ".", "--out", "e", "--layout", "onnx"], "--layout"),
        (["inspect", "."], "is no adapter folder"),
        (["verify", "nowhere"], "nowhere does not exist"),
        (["inspect", ".", "--memory", "--top", "3", "--plot", "x.png"], "--plot, --top would do nothing with --memory"),
        (["methods", "--jsn"], "--jsn"),
        (["demo", "--seed", "1.5"], "--seed 1.5: expected a whole number"),
    ],
)
def test_a_mistake_is_one_line(refused, argv, told):
    assert told in refused(*argv)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"rank": -1}, "--rank -1"),
        ({"rank": 99}, "rank 99: a 24 x 24 weight allows 1 to 24"),
        ({"rank": 2.5}, "--rank 2.5: expected a whole number"),
        ({"epochs": "two"}, "--epochs two: expected a whole number"),
        ({"epochs": 0}, "--epochs 0"),
        ({"lr": "fast"}, "--lr fast: expected a number"),
        ({"lr": "nan"}, "--lr nan"),
        ({"dtype": "float8"}, 'Choose from: "auto", "float32", "bfloat16"'),
        ({"selection": "best"}, '"best"'),
        ({"targets": "nothing"}, "'nothing' match no layer; presets: "),
        ({"method": "loar"}, "did you mean 'lora'?"),
        ({"method": "head"}, "'head' has no setting 'rank'"),
        ({"store": "int3"}, "--store int3"),
        ({"model": "./nowhere"}, "no folder './nowhere'"),
        ({"model": "some/model"}, "the hub cannot be reached"),
        ({"text": "sentense"}, "no column 'sentense'; columns there: sentence, label"),
        ({"label": "lable"}, "no column 'lable'"),
        ({"label": None}, "name one or two (--text) and one (--label) of sentence, label"),
        ({"max_length": 41}, "takes 40 tokens at most"),
        ({"out": "/proc/nowhere/run"}, "no permission to write"),
    ],
)
def test_a_wrong_setting_is_one_line(refused, tiny, own, monkeypatch, given, told):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc") and access(path, mode))
    assert told in refused(*flags(tiny, own, **given))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("sentence,label\n", "has no rows"),
        ("sentence,label\na cat,x\na dog,\na dog,y\n", "empty in row 2"),
        ("sentence,label\na cat,1.0\na dog,nan\na dog,2.5\n", "column 'label'"),
        ("sentence,label\na cat,x\n,y\na dog,\n", "2: "),
        ("sentence,label\na cat,x\na dog,x\n", "all labels are 'x'"),
        ("sentence,label\na cat,x,1\na dog\n", "3 cells where 2 were expected in row 1"),
    ],
)
def test_a_file_that_cannot_be_learnt_from_is_one_line(refused, tiny, own, tmp_path, content, told):
    (tmp_path / "bad.csv").write_text(content)
    err = refused(*flags(tiny, own, task="bad.csv"))
    assert "bad.csv" in err
    assert told in err or told == "2: "


def test_a_label_that_train_lacks_is_one_line(refused, tiny, own, tmp_path):
    (tmp_path / "more.csv").write_text("sentence,label\nthe cow sees,cow\n")
    assert "new value 'cow', which train lacks" in refused(*flags(tiny, own, validation="more.csv"))


def test_a_folder_of_something_else_is_never_written_to(refused, tiny, own, adapter, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    assert "holds other files" in refused(*flags(tiny, own, out="mine"))
    assert "is a file" in refused(*flags(tiny, own, out="mine/letter.txt"))
    assert "holds another run" in refused(*flags(tiny, own, out=adapter.parent))
    assert "epochs was 2, now 3" in refused(*flags(tiny, own, out=adapter.parent, epochs=3), "--resume")
    for command in ("merge", "export"):
        assert "--out mine holds other files" in refused(command, adapter, "--model", tiny, "--out", "mine")


def test_a_disk_that_fails_is_one_line_and_leaves_no_model(refused, tiny, adapter, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "merged")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert "No space left on device" in refused("merge", adapter, "--model", tiny, "--out", "merged")


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_json_is_the_result_file_and_progress_goes_to_stderr(cli, tiny, own, tmp_path):
    code, out, err = cli(*flags(tiny, own), "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run/result.json").read_text())
    assert [line.split()[1] for line in err.splitlines() if line.startswith("epoch")] == ["1/2", "2/2"]
    again = cli(*flags(tiny, own), "--json", "--resume")
    assert (again[0], again[1]) == (0, out)


def test_a_run_without_a_terminal_says_how_far_it_is(cli, tiny, own, monkeypatch):
    monkeypatch.setattr("loralab.run.bar.Pulse.every", 0.0)
    err = cli(*flags(tiny, own))[2]
    assert [line for line in err.splitlines() if re.fullmatch(r"\d+ of \d+ rows, \d+ s left, loss \d\.\d+", line)], err


@pytest.mark.parametrize(("rows", "said"), [(1234.4, "1234"), (9.94, "9.9"), (9.96, "10"), (0.155, "0.15"), (0.0, "0")])
def test_slow_runs_say_a_fraction_of_a_row(rows, said):
    assert rate(rows) == f"{said} rows/s"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_rows_that_are_answered_without_a_terminal_are_counted(cli, adapter, own, tmp_path, monkeypatch, command):
    given = {
        "evaluate": (adapter, "--task", own["class"], "--text", "sentence", "--label", "label", "--batch-size", 7),
        "predict": ("--adapters", adapter, "--input", own["class"], "--batch-size", 7, "--prefix", "our_"),
    }
    assert "of 240 rows" not in cli(command, *given[command])[2]  # it takes less than a minute
    monkeypatch.setattr("loralab.run.bar.Pulse.every", 0.0)
    code, _, err = cli(command, *given[command])
    done = [int(line.split()[0]) for line in err.splitlines() if re.match(r"\d+ of 240 rows", line)]
    assert (code, done) == (0, sorted({*done}))
    assert done[-1] == 240
    assert len(done) >= 240 // 7


def test_a_result_names_its_selection_and_what_is_optimistic(cli, tiny, own):
    code, out, err = cli(*flags(tiny, own))
    assert code == 0
    assert "by held-out" in out
    assert "epoch 1/2" not in out
    assert "run folder: run\n" in out
    assert max(map(len, out.splitlines())) <= 80
    _, out, err = cli(*flags(tiny, own, selection="validation", out="other"))
    assert "by validation (optimistic)" in out
    assert "optimistic" in err


def test_two_text_columns_need_the_flag_once(cli, tiny, own, tmp_path):
    rows = [f"the {pet} sees,a {pet if same else 'red'} {pet},{same}" for pet in ("cat", "dog") for same in (0, 1)] * 20
    (tmp_path / "pairs.csv").write_text("\n".join(["one,two,same", *rows]) + "\n")
    given = flags(tiny, own, task="pairs.csv", text=None, label="same")
    assert cli(*given, "--text", "one", "two", "--json")[0] == 0
    assert cli(*given, "--text", "one", "--text", "two", "--json", "--resume")[0] == 0


@pytest.mark.slow
def test_demo_shows_three_methods_and_replaces_only_an_earlier_demo(cli, refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "GIVEN", {**demo.GIVEN, "epochs": 1, "max_length": 32})
    code, out, _ = cli("demo", "--model", tiny)
    assert code == 0
    title, _, _, *rows = out.splitlines()
    assert "minimal-pairs (2700 rows to train on, 300 held out)" in title
    assert [line.split()[0] for line in rows[:3]] == ["full", "head", "lora"]
    assert max(map(len, rows[:-1])) <= 80  # the last line has paths
    code, out, _ = cli("demo", "--model", tiny, "--json")
    assert list(json.loads(out)) == ["full", "head", "lora"]
    (tmp_path / "mine/lora").mkdir(parents=True)
    (tmp_path / "mine/lora/letter.txt").write_text("dear")
    assert "is not a run of loralab" in refused("demo", "--model", tiny, "--out", "mine")


# ---- adapter files ---------------------------------------------------------------------------------------------------


def batch(tokenizer):
    return tokenizer(["the red cat sees", "a dog", "the big blue dog likes"], padding=True, return_tensors="pt")


def logits_of(tiny: Path, adapter: Path) -> torch.Tensor:
    """What the adapted model says, loaded with the library."""
    model, tokenizer = models.classifier(str(tiny), 2, False, torch.float32, seed=7)
    loralab.load(model, adapter)
    return model.eval()(**batch(tokenizer)).logits.detach()


def test_inspect_tells_what_a_folder_holds(cli, adapter):
    code, out, err = cli("inspect", adapter)
    assert (code, err) == (0, "")
    for part in ("rank 3", "cat, dog", "classifier", "attention.self.query (2)", "tiny, sha256 "):
        assert part in " ".join(out.split())
    told = json.loads(cli("inspect", adapter, "--json")[1])
    header = json.loads((adapter / HEADER).read_text())
    assert (told["labels"], told["recipe"], told["base"]) == (header["labels"], header["recipe"], header["base"])
    assert told["values"] == sum(t.numel() for t in load_file(adapter / TENSORS).values())


def test_verify_says_yes_to_a_whole_adapter(cli, tiny, adapter):
    assert cli("verify", adapter)[::2] == (0, "")
    code, out, err = cli("verify", adapter, "--model", tiny)
    assert (code, err) == (0, "")
    assert "whole, and fits" in out


def test_a_merged_folder_is_a_plain_model_with_the_same_outputs(cli, tiny, adapter, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    code, out, err = cli("merge", adapter, "--model", tiny, "--out", "merged")
    assert (code, err) == (0, "")
    assert float(out.split("float32 ")[1].split(",")[0]) < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.id2label == {0: "cat", 1: "dog"}
    said = plain(**batch(AutoTokenizer.from_pretrained(tmp_path / "merged"))).logits
    torch.testing.assert_close(said, logits_of(tiny, adapter), rtol=1e-4, atol=1e-5)
    assert cli("merge", adapter, "--model", tiny, "--out", "half", "--dtype", "bfloat16")[0] == 0
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_an_exported_folder_is_read_by_peft(cli, tiny, adapter, tmp_path):
    peft = pytest.importorskip("peft")
    assert cli("export", adapter, "--model", tiny, "--out", "exported")[0] == 0
    model, tokenizer = models.classifier(str(tiny), 2, False, torch.float32, seed=8)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "exported").eval()
    said = theirs(**batch(tokenizer)).logits
    torch.testing.assert_close(said, logits_of(tiny, adapter), rtol=1e-4, atol=1e-5)
    assert cli("verify", "exported", "--model", tiny)[0] == 0
    assert "rank 3" in cli("inspect", "exported")[1]
    assert cli("merge", "exported", "--model", tiny, "--out", "merged")[0] == 0


@pytest.mark.parametrize("method", ["full", "head"])
def test_what_trains_the_base_or_the_head_alone_is_an_adapter_too(cli, tiny, own, method):
    assert cli(*flags(tiny, own, method=method, rank=None))[0] == 0
    assert cli("verify", "run/adapter", "--model", tiny)[0] == 0
    assert cli("merge", "run/adapter", "--model", tiny, "--out", "merged")[0] == 0


@pytest.fixture
def spoilt(adapter, tmp_path):
    """A copy of the adapter folder, and a function that changes its tensors."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def change(edit):
        tensors = load_file(folder / TENSORS)
        edit(tensors)
        save_file(tensors, folder / TENSORS)

    return folder, change


QUERY = "bert.encoder.layer.0.attention.self.query"


def test_verify_names_every_problem_of_the_tensors_in_one_line(refused, tiny, spoilt):
    folder, change = spoilt

    def edit(tensors):
        del tensors[f"{QUERY}.A"], tensors["classifier.bias"]
        tensors["stray.A"] = torch.zeros(2, 3)
        tensors[f"{QUERY}.B"] = torch.zeros(24, 5)
        tensors["bert.pooler.dense.A"][0, 0] = torch.inf

    change(edit)
    with_base, alone = refused("verify", folder, "--model", tiny), refused("verify", folder)
    for part in (f"{QUERY}.A", "classifier.bias", "stray.A", "bert.pooler.dense.A"):
        assert part in with_base
        assert part in alone
    assert f"{QUERY}.B is (24, 5), expected (24, 3)" in with_base


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (HEADER, b"", "cannot be read"),
        (HEADER, b"\x00\xff garbage", "cannot be read"),
        (HEADER, b"[1, 2]", "expected a JSON object"),
        (HEADER, b'{"format": "something"}', "format 'something'"),
        (HEADER, None, "no adapter folder"),
        (TENSORS, b"", "cannot be read"),
        (TENSORS, b"\xff" * 100, "cannot be read"),
        (TENSORS, None, "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_file_that_is_no_adapter_is_one_line(refused, spoilt, command, file, content, told):
    folder, _ = spoilt
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    err = refused(command, folder)
    assert told in err
    assert "spoilt" in err


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_file_cut_off_anywhere_is_refused(refused, spoilt, part):
    folder, _ = spoilt
    for name in (HEADER, TENSORS):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(part * len(whole))])
        assert name in refused("verify", folder)
        (folder / name).write_bytes(whole)


def test_another_base_is_refused(refused, tiny, adapter, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    save_file({key: t + 1e-2 for key, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for argv in (["verify", adapter], ["merge", adapter, "--out", "m"], ["export", adapter, "--out", "e"]):
        assert "trained on another base" in refused(*argv, "--model", other)


# ---- as a program ----------------------------------------------------------------------------------------------------


def program(*argv, **given):
    command = [sys.executable, "-m", "loralab", *map(str, argv)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120, **given)


@pytest.mark.slow
def test_the_program_says_only_its_own_words(tiny, own, tmp_path):
    done = program(*flags(tiny, own, out=tmp_path / "run"))
    assert done.returncode == 0
    kinds = {line.split()[0] for line in done.stderr.splitlines() if line}
    assert kinds <= {"note:", "epoch", "adapts", "warning:", "loralab"}
    assert [line for line in done.stderr.splitlines() if line.startswith("loralab")] == [STARTS]
    done = program("merge", tmp_path / "run/adapter", "--model", tiny, "--out", tmp_path / "merged")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_program_ends_with_the_code_of_main(tmp_path):
    done = program("train", "--task", "colla", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    first, error = done.stderr.splitlines()  # what it does is said within a second; the mistake is one line
    assert first == STARTS
    assert error.startswith("loralab: no task 'colla'")


def test_a_reader_that_leaves_early_is_no_traceback():
    command = [sys.executable, "-m", "loralab", "methods", "--json"]
    methods = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert methods.stdout is not None
    methods.stdout.close()
    _, err = methods.communicate(timeout=60)
    assert (methods.returncode, err) == (1, b"")


def test_an_interrupt_ends_with_one_line_and_the_run_goes_on_later(cli, tiny, own, tmp_path):
    given = flags(tiny, own, epochs=400, out=tmp_path / "run")
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job begins deaf to it
    command = [sys.executable, "-m", "loralab", *given]
    run = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert run.stderr is not None
    while "epoch 2/400" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    rest = run.stderr.read().splitlines()
    assert run.wait(timeout=60) == 130
    assert rest[-1] == "loralab: stopped; --resume continues the run from its last checkpoint"
    assert all(line.startswith("epoch") for line in rest[:-1] if line)
    assert (tmp_path / "run/checkpoint/progress.json").is_file()
    assert not (tmp_path / "run/result.json").exists()
