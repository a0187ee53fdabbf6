"""A study on another kind of machine: what auto was is known, and nothing is silently trained anew."""

import json
from pathlib import Path

import pytest
import torch
from test_study import begun, carried_out, here, study, table, toml  # noqa: F401  (fixtures)

from loralab import UserError
from loralab.cli import main
from loralab.fast import machine as machine_of
from loralab.run import Settings, train
from loralab.study.address import address
from loralab.study.run_study import question_of, write
from loralab.study.schedule import schedule
from loralab.study.toml import define, read


@pytest.fixture
def machine(monkeypatch):
    """`machine(narrow)`: a machine that multiplies bfloat16 fast, or not."""

    def made(narrow):
        monkeypatch.setattr("loralab.fast.machine.fast_bfloat16", lambda gpu=None: narrow)

    made(True)
    return made


SMALL = {"seeds": [0], "methods": [{"method": "head"}]}


@pytest.mark.parametrize("knows", [True, False], ids=["", "a study.json of an older version"])
def test_another_machine_stops_with_one_line_or_goes_on_as_it_was(tiny, own, here, machine, begun, capsys, knows):  # noqa: F811
    (here / "x.toml").write_text(toml(tiny, own).replace('method = "lora"\nrank = 3', 'method = "bitfit"'))
    assert main(["study", "x.toml", "--seeds", "0"]) == 0
    file = Path("runs/studies/x/study.json")
    content = json.loads(file.read_text())
    assert content["dtype"] == "bfloat16"
    if not knows:
        del content["dtype"]
        file.write_text(json.dumps(content))
    count = len(begun)
    machine(False)
    for more in ([], ["--dry-run"], ["--dtype", "float32"]):
        assert main(["study", "x.toml", *more]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "its 2 finished runs computed in bfloat16" in line
        assert ("this command" if "--dtype" in more else "this machine") + " would take float32" in line
        assert "--dtype bfloat16 goes on with them, another --out begins anew" in line
    assert main(["study", "x.toml", "--dtype", "bfloat16"]) == 0
    assert len(begun) == count + 2  # the other seed
    assert json.loads(file.read_text())["dtype"] == "bfloat16"
    machine(True)
    assert main(["study", "x.toml"]) == 0
    assert len(begun) == count + 2
    assert main(["study", "x.toml", "--out", "anew", "--dtype", "float32", "--seeds", "0"]) == 0
    assert len(begun) == count + 4


def test_addresses_and_the_question_stay(tiny, own, machine):
    plain, given = (define(table(tiny, own, **SMALL), "animals", Path(), dtype=x) for x in (None, "bfloat16"))
    assert question_of(plain) == question_of(given)
    assert [s.address for s in schedule(plain)] == [s.address for s in schedule(given)]
    machine(False)
    assert [s.address for s in schedule(plain)] != [s.address for s in schedule(given)]


def test_only_settings_that_are_auto_follow(tiny, own, machine):
    methods = [{"method": "head"}, {"name": "wide", "method": "lora", "dtype": "float32"}]
    d = define(table(tiny, own, methods=methods), "animals", Path(), dtype="bfloat16")
    assert [d.settings(d.tasks[0], str(tiny), m, 0, {}).dtype for m in d.methods] == ["bfloat16", "float32"]


def test_a_study_without_finished_runs_or_without_auto_is_let_go_on(tiny, own, here, machine, cut_off):  # noqa: F811
    with cut_off(3), pytest.raises(KeyboardInterrupt):
        carried_out(study(tiny, own, **SMALL))
    machine(False)
    carried_out(study(tiny, own, **SMALL))
    explicit = {"protocol": {"epochs": 1, "max_length": 32, "dtype": "float32"}, **SMALL}
    carried_out(study(tiny, own, **explicit), "other")
    machine(True)
    carried_out(study(tiny, own, **explicit), "other")
    assert json.loads(Path("other/study.json").read_text())["dtype"] is None


def test_a_run_goes_on_only_in_its_dtype(tiny, own, tmp_path, machine, cut_off):
    given = {"task": str(own["class"]), "text": ("sentence",), "label": "label", "model": str(tiny), "method": "head"}
    s = Settings(**given, out=tmp_path / "a", epochs=2, max_length=32)
    with cut_off(11), pytest.raises(KeyboardInterrupt):
        train(s)
    machine(False)
    resumed = {**given, "out": tmp_path / "a", "epochs": 2, "max_length": 32, "resume": True}
    with pytest.raises(UserError, match="products were in bfloat16, on this machine in float32"):
        train(Settings(**resumed))
    with pytest.raises(UserError, match="dtype was auto, now float32"):
        train(Settings(**resumed, dtype="float32"))
    result = train(Settings(**resumed, dtype="bfloat16"))
    assert train(Settings(**resumed)) == result  # finished: it is read
    assert address(Settings(**given, dtype="bfloat16")) != address(Settings(**given))


AVX, AMX = {"amx": False, "avx512_bf16": True}, {"amx": True, "avx512_bf16": True}


@pytest.mark.parametrize(
    ("units", "times", "chosen"),
    [(AVX, 0.55, torch.float32), (AVX, 1.1, torch.float32), (AVX, 3.0, torch.bfloat16), (AMX, 0.5, torch.bfloat16),
     ({"amx": False, "avx512_bf16": False}, 3.0, torch.float32)],
)  # fmt: skip
def test_auto_is_bfloat16_where_it_is_faster(monkeypatch, units, times, chosen):
    """A unit for bfloat16 is no promise: without AMX an Intel Xeon multiplies it at half the rate of float32."""
    measured = []

    def rate(dtype, size, on):
        measured.append(dtype)
        return 1e11 * (times if dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(machine_of, "units", lambda: units)
    monkeypatch.setattr(machine_of, "rate", rate)
    machine_of._bfloat16_pays.cache_clear()
    try:
        assert machine_of.precision("auto", gpu=False) == machine_of.precision("auto", gpu=False) == chosen
    finally:
        machine_of._bfloat16_pays.cache_clear()
    assert len(measured) == (2 if units is AVX else 0)  # once a process, and only where it is not known
    assert machine_of.precision("float32", gpu=False) == torch.float32
    assert machine_of.precision("bfloat16", gpu=False) == torch.bfloat16


DAMAGES = {
    "no list": lambda content: content.update(planned=5),
    "no runs": lambda content: content.update(planned=[None, 3]),
    "an address of another type": lambda content: content["planned"][0].update(address=7),
    "a run without its task": lambda content: content["planned"][0].pop("task"),
    "tried is no table": lambda content: content["planned"][0].update(tried=[1]),
    "a dtype of another type": lambda content: content.update(dtype={}),
    "a definition of another type": lambda content: content.update(definition=[], question="x"),
    "nothing": lambda content: content.clear(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_study_json_is_said_by_the_command_too(tiny, own, here, machine, capsys, damage):  # noqa: F811
    """In one line, with what to do, before anything runs: it ended in a traceback."""
    (here / "x.toml").write_text(toml(tiny, own))
    folder = here / "runs/studies/x"
    definition = read(here / "x.toml")
    write(definition, folder, schedule(definition))
    content = json.loads((folder / "study.json").read_text())
    for entry in content["planned"]:
        (here / "runs/store" / entry["address"]).mkdir(parents=True)
        (here / "runs/store" / entry["address"] / "result.json").write_text("{}")
    content.pop("dtype", None)  # as an older version wrote it
    DAMAGES[damage](content)
    (folder / "study.json").write_text(json.dumps(content))
    before = (folder / "study.json").read_bytes()
    for more in ([], ["--dry-run"]):
        assert main(["study", "x.toml", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "study.json is damaged or of another version: " in line
        assert "remove it, and the same `loralab study` goes on" in line
    assert (folder / "study.json").read_bytes() == before
