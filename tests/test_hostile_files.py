"""Damaged and forged files of the workbench, made by the thousand: each is read, or is one UserError.

Run folders, checkpoints, studies and their files, rank maps, data and results. Never another exception, never memory
for what a file only claims. `make reliability` makes many times as many of them, other ones each time.
"""

import json
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import TABLES
from damage import LAYER, as_text, damaged, little_memory, many, rewritten  # noqa: F401  (fixture)
from hypothesis import given
from hypothesis import strategies as st
from test_study_file import WHOLE

from loralab import UserError, objectives
from loralab.data import Split, tables
from loralab.disk import sha256
from loralab.objectives import saved
from loralab.rankmap import LayerRank, RankMap
from loralab.report import findings
from loralab.run import Settings
from loralab.run.bar import Silent
from loralab.run.folder import PROGRESS, STATE, RunFolder, _checksum
from loralab.run.loop import Loop
from loralab.run.memory import Peak
from loralab.run.setup import prepare_together
from loralab.study import load
from loralab.study.bar import StudyBar
from loralab.study.judge import judge
from loralab.study.results import as_data
from loralab.study.run_study import run_study
from loralab.study.runners import runner
from loralab.study.toml import define, read

ROWS = [("the red cat sees", "cat", 1), ("the dog sees", "dog", 2), ("a big cat, it likes", "cat", 3)] * 5


def survives(work):
    """What work comes to, None for a UserError of one printable line; anything else fails."""
    try:
        return work()
    except UserError as error:
        said = str(error)
        assert said.isprintable(), said
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def json_or_bytes(draw: st.DataObject, stored: bytes) -> bytes:
    """The bytes of a JSON file after damage to them, or to its structure."""
    if draw.draw(st.booleans()):
        return draw.draw(damaged(stored))
    return draw.draw(as_text(draw.draw(rewritten(json.loads(stored)))))


# ---- runs and studies ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny, own, place) -> Path:
    """A folder with a study of two finished runs and their store."""
    task = {"name": "animals", "task": str(own["class"]), "text": "sentence", "label": "label"}
    protocol = {"epochs": 2, "max_length": 32, "batch_size": 40, "lr": 2e-2}
    table = {"tasks": [task], "models": [str(tiny)], "seeds": [0], "protocol": protocol, "methods": ["lora", "head"]}
    definition = define({**table, "store": str(place / "whole/store"), "registered": True}, "x", place)
    run_study(definition, place / "whole/study", runner("together"), StudyBar())
    return place / "whole"


def shown(study) -> str:
    """All that is said of a study."""
    predictions = [run.predictions for cell in study.cells().values() for run in cell.runs]
    return json.dumps([as_data(study), len(predictions), str(findings.findings(study))])


def gone_on(folder: Path, facts: dict) -> None:
    """What the same command with --resume reads."""
    run = RunFolder(folder)
    run.open(facts["settings"], resume=True)
    try:
        run.check_same(facts)
    finally:
        run.close()


FILES = ("result.json", "run.json", "metrics.jsonl", "predictions.safetensors")


@many
@given(st.data())
def test_a_damaged_file_of_a_run_is_survived(finished, tally, data):
    """By its study, by a report of the folder, and by the same command with --resume."""
    folder = data.draw(st.sampled_from(sorted((finished / "store").glob("[!.]*"))))
    file, facts = folder / data.draw(st.sampled_from(FILES)), json.loads((folder / "run.json").read_text())
    whole = file.read_bytes()
    try:
        file.write_bytes(json_or_bytes(data, whole) if file.suffix == ".json" else data.draw(damaged(whole)))
        survives(lambda: shown(load(finished / "study")))
        survives(lambda: shown(findings.read(finished / "store")))
        survives(lambda: gone_on(folder, facts))
    finally:
        file.write_bytes(whole)
    tally("mutated files")


@many
@given(st.data())
def test_a_damaged_study_json_is_survived(finished, tally, data):
    file = finished / "study/study.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(json_or_bytes(data, whole))
        survives(lambda: shown(load(finished / "study")))
    finally:
        file.write_bytes(whole)
    tally("mutated files")


@many
@given(st.data())
def test_a_damaged_task_json_is_survived(finished, place, tally, data):
    """Where an adapter says what it was trained to do; `predict`, `evaluate` and `inspect` read it."""
    whole = next((finished / "store").glob("*/adapter/task.json")).read_bytes()
    (place / "adapter").mkdir(exist_ok=True)
    (place / "adapter/task.json").write_bytes(json_or_bytes(data, whole))
    read = survives(lambda: saved.read(place / "adapter"))
    if read is not None:
        assert read.objective in objectives.OBJECTIVES
        survives(lambda: read.of(Split([("a", "b")], [0])))
    tally("mutated files")


def test_what_is_whole_is_read(finished):
    assert shown(load(finished / "study"))
    assert shown(findings.read(finished / "store"))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(tiny, own, place):
    """The state of a run that has a checkpoint, and the files of that."""
    given = {"task": str(own["class"]), "text": ("sentence",), "label": "label", "model": str(tiny), "max_length": 32}
    folder = RunFolder(place / "run")
    folder.path.mkdir()
    (state,) = Loop(prepare_together([Settings(**given, out=folder.path)]), [folder], Silent(), Peak()).states
    state.best = {key: t.clone() for key, t in state.tensors().items()}
    state.save_checkpoint()
    return state, {name: (folder.checkpoint / name).read_bytes() for name in (STATE, PROGRESS)}


@many
@given(st.data())
def test_a_damaged_checkpoint_is_skipped_and_a_forged_one_survived(training, tally, data):
    state, files = training
    name = data.draw(st.sampled_from([STATE, PROGRESS]))
    forged = data.draw(st.booleans())
    changed = json_or_bytes(data, files[name]) if name == PROGRESS else data.draw(damaged(files[name]))
    if name == STATE and data.draw(st.booleans()):
        changed = with_header(data, files[name])
    checkpoint = state.folder.checkpoint
    for other, content in files.items():
        (checkpoint / other).write_bytes(changed if other == name else content)
    if forged:  # checksums that fit
        try:
            progress = json.loads((checkpoint / PROGRESS).read_bytes())
            progress.pop("sha256", None)
            progress["state_sha256"] = sha256(checkpoint / STATE)
            (checkpoint / PROGRESS).write_text(json.dumps({**progress, "sha256": _checksum(progress)}))
        except (ValueError, AttributeError, TypeError):
            forged = False
    taken = survives(lambda: state.load_checkpoint())
    assert forged or not taken or changed == files[name] or json.loads(changed) == json.loads(files[name])
    tally("mutated files")


def with_header(data: st.DataObject, stored: bytes) -> bytes:
    """A safetensors file with its header rewritten."""
    length = int.from_bytes(stored[:8], "little")
    text = data.draw(as_text(data.draw(rewritten(json.loads(stored[8 : 8 + length])))))
    return len(text).to_bytes(8, "little") + text + stored[8 + length :]


# ---- what users write ------------------------------------------------------------------------------------------------


def toml(value) -> str:
    """A value as TOML, a table inline; null becomes a text, as TOML has none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    text = json.dumps("null" if value is None else value)
    return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)


def test_toml_is_written_as_it_is_read():
    assert tomllib.loads("\n".join(f"{key} = {toml(x)}" for key, x in WHOLE.items())) == WHOLE


@many
@given(st.data())
def test_a_damaged_study_file_is_survived(place, tally, data):
    file, table = place / "study.toml", WHOLE
    if structure := data.draw(st.booleans()):
        table = data.draw(rewritten(WHOLE))
    text = "\n".join(f"{json.dumps(key)} = {toml(x)}" for key, x in table.items()).encode(errors="replace")
    file.write_bytes(text if structure else data.draw(damaged(text)))
    survives(lambda: read(file))
    tally("mutated files")


@many
@given(st.data())
def test_a_damaged_rank_map_is_survived(place, tally, data):
    file = place / "ranks.json"
    RankMap({LAYER: LayerRank(3), LAYER + "2": LayerRank(2, gates=(1.0, 0.5), alpha=4.0)}).save(file)
    file.write_bytes(json_or_bytes(data, file.read_bytes()))
    survives(lambda: RankMap.load(file))
    tally("mutated files")


def sound(file: Path, columns: dict[str, list]) -> bytes:
    """The bytes of a file of data."""
    if file.suffix == ".parquet":
        pa.parquet.write_table(pa.table(columns), file)
    else:
        tables.write(columns, file)
    return file.read_bytes()


def changed_table(data: st.DataObject, file: Path, columns: dict[str, list]) -> None:
    """Write a file of data with damage to its bytes, or to its rows."""
    stored = sound(file, columns)
    if file.suffix in (".json", ".jsonl") and data.draw(st.booleans()):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        rows = data.draw(rewritten(rows))
        lines = [json.dumps(row) for row in rows]
        stored = ("\n".join(lines) if file.suffix == ".jsonl" else f"[{', '.join(lines)}]").encode()
        file.write_bytes(stored)
    else:
        file.write_bytes(data.draw(damaged(stored)))


@many
@given(st.data())
@pytest.mark.parametrize("suffix", TABLES)
def test_a_damaged_file_of_data_is_survived(place, suffix, tally, data):
    file, columns = place / f"rows{suffix}", dict(zip("aby", map(list, zip(*ROWS, strict=True)), strict=True))
    label = data.draw(st.sampled_from("by"))
    changed_table(data, file, columns)
    task = survives(lambda: objectives.load(str(file), text="a", label=label))
    assert task is None or task.train.labels
    tally("mutated files")


@many
@given(st.data())
@pytest.mark.parametrize("suffix", TABLES)
def test_damaged_results_are_survived_by_the_judge(place, suffix, tally, data):
    runs = [(m, seed, task) for m in ("lora", "full", "dora") for seed in range(4) for task in "xy"]
    scores = [(*run, 0.5 + 0.01 * run[1] + 0.1 * (run[0] == "full")) for run in runs]
    file, columns = place / f"results{suffix}", dict(zip("mstv", map(list, zip(*scores, strict=True)), strict=True))
    changed_table(data, file, columns)
    survives(lambda: judge(file, "m", "v", seed="s", task="t"))
    tally("mutated files")
