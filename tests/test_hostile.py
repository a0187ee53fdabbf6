"""Hostile and damaged adapter folders, made by the thousand: each is read as what it was, or is one UserError.

Never another exception, never a model that is changed by a load that fails, never memory for what a file only claims.
`make reliability` makes many times as many of them, other ones each time.
"""

import copy
import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from archs import shake
from damage import EXAMPLES, as_text, damaged, little_memory, many, rewritten  # noqa: F401  (fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files import IDS, OLD, fixed_model

import loralab
from loralab import adapters, analysis, files, peft_format
from loralab.rankmap import LayerRank, RankMap

pytestmark = pytest.mark.filterwarnings("ignore::loralab.files.FolderNote")

ATTENTION = "bert.encoder.layer.0.attention.self."
Q, K, V, D = (*(ATTENTION + name for name in ("query", "key", "value")), "bert.encoder.layer.0.intermediate.dense")
SHARED, GATED = LayerRank(2, share="s"), LayerRank(3, gates=(1.0, 0.5, 0.0), alpha=5.0)
MAP = RankMap({Q: SHARED, V: SHARED, K: LayerRank(0), D: GATED})
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 2, "targets": "attention-qv", "head": True, "labels": ["no", "yes", "maybe"]}),
    "dora": ("dora", {"rank": 2, "targets": "attention-qv"}),
    "vera": ("vera", {"rank": 5, "targets": "attention-qv"}),
    "dylora": ("dylora", {"rank": 3, "targets": ["intermediate.dense"]}),
    "adalora": ("adalora", {"rank": 3, "targets": ["intermediate.dense"], "total_steps": 100}),
    "pissa": ("pissa", {"rank": 2, "targets": ["query"]}),
    "delta-lora": ("delta-lora", {"rank": 2, "targets": ["query"]}),
    "lokr": ("lokr", {"rank": 2, "targets": ["query"]}),
    "lorta": ("lorta", {"rank": 2, "targets": ["query"]}),
    "superlora": ("superlora", {"rank": 2, "targets": ["query"]}),
    "rank map": ("lora", {"rank": 2, "targets": ["query", "value", "key", "intermediate.dense"], "ranks": MAP}),
    "train": ("lora", {"rank": 2, "targets": ["query"], "train": ("B",)}),
    "bitfit": ("bitfit", {"head": True}),
    "head": ("head", {"head": ["bert.pooler", "classifier"]}),
}
EXPORTED = ("lora", "dora", "rank map")

Files = dict[str, bytes]


@dataclass(frozen=True, repr=False)
class Sound:
    """A folder that is whole: its files, and the adapter that it holds."""

    files: Files
    file: files.AdapterFile


def written(folder: Path, content: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def content(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "expected.json"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    """A folder in loralab's layout for each of METHODS."""
    sound = {}
    for name, (method, chosen) in METHODS.items():
        handle = loralab.attach(fixed_model(), method, **chosen)
        shake(handle, "default")
        folder = handle.save(tmp_path_factory.mktemp("own"))
        sound[name] = Sound(content(folder), adapters.read(folder))
    return sound


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    """Folders without checksums: in PEFT's layout, and of 0.1.0."""
    sound = {}
    for name in EXPORTED:
        method, chosen = METHODS[name]
        handle = loralab.attach(fixed_model(), method, **chosen)
        shake(handle, "default")
        folder = handle.export(tmp_path_factory.mktemp("peft"))
        sound[f"peft {name}"] = Sound(content(folder), adapters.read(folder))
    for folder in OLD.iterdir():
        sound[f"0.1.0 {folder.name}"] = Sound(content(folder), adapters.read(folder))
    return sound


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "adapter"


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    return fixed_model()


# ---- what may come of a folder ---------------------------------------------------------------------------------------


def read_or_refused(folder: Path, plain: torch.nn.Module) -> files.AdapterFile | None:
    """The adapter of a folder if it is taken, None if it is refused; anything else fails."""
    try:
        file = adapters.read(folder)
        for spectrum in analysis.spectra(analysis.updates(folder)):  # what `loralab inspect` shows of it
            assert all(map(math.isfinite, spectrum.values))
    except loralab.UserError as error:
        said = str(error)
        assert said.isprintable(), said
        assert len(said) < 4000
        if "give --model" not in said:
            file = None
    model = copy.deepcopy(plain)
    try:
        loralab.load(model, folder)
    except loralab.UserError:
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert vars(model).keys() == vars(plain).keys()
        for (key, p), (other, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert key == other
            assert p.requires_grad == q.requires_grad
            assert torch.equal(p, q), key
        return None
    assert file is not None, "read alone refuses what load takes"
    with torch.no_grad():
        model(input_ids=IDS)
    return file


def same(one: files.AdapterFile, other: files.AdapterFile) -> bool:
    """Whether two folders hold one adapter, to the bit."""
    fields = ("name", "recipe", "coverage", "heads", "labels", "base", "roles", "constants")
    return (
        all(getattr(one, field) == getattr(other, field) for field in fields)
        and one.paths == other.paths
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(t, other.tensors[key]) and t.dtype == other.tensors[key].dtype for key, t in one.tensors.items()
        )
    )


# ---- damage to bytes -------------------------------------------------------------------------------------------------


@many
@given(st.data())
def test_damage_to_an_own_folder_is_seen(own, place, plain, tally, data):
    sound = own[data.draw(st.sampled_from(sorted(own)))]
    name = data.draw(st.sampled_from(sorted(sound.files)))
    changed = data.draw(damaged(sound.files[name]))
    file = read_or_refused(written(place, sound.files | {name: changed}), plain)
    tally("mutated files")
    assert file is None or same(file, sound.file)
    if name == files.TENSORS and changed != sound.files[name]:
        assert file is None, "a change of the tensors is not seen"


@many
@given(st.data())
def test_damage_to_a_folder_without_checksums_is_survived(foreign, place, plain, tally, data):
    sound = foreign[data.draw(st.sampled_from(sorted(foreign)))]
    name = data.draw(st.sampled_from(sorted(sound.files)))
    read_or_refused(written(place, sound.files | {name: data.draw(damaged(sound.files[name]))}), plain)
    tally("mutated files")


# ---- damage to structure ---------------------------------------------------------------------------------------------


@many
@given(st.data())
def test_an_edit_of_an_own_header_is_seen(own, place, plain, tally, data):
    sound = own[data.draw(st.sampled_from(sorted(own)))]
    header = data.draw(rewritten(json.loads(sound.files[files.HEADER])))
    text = data.draw(as_text(header))
    file = read_or_refused(written(place, sound.files | {files.HEADER: text}), plain)
    tally("mutated files")
    assert file is None or same(file, sound.file)


@settings(many, max_examples=3 * EXAMPLES)
@given(st.data())
def test_a_forged_header_with_checksums_that_fit_is_survived(own, place, plain, tally, data):
    sound = own[data.draw(st.sampled_from(sorted(own)))]
    header = json.loads(sound.files[files.HEADER])
    part = data.draw(st.sampled_from([None, "recipe", "recipe", "coverage", "base", "tensors"]))
    if part is None:
        header = data.draw(rewritten(header))
    else:
        header[part] = data.draw(rewritten(header[part]))
    if isinstance(header, dict):
        header = files.sealed(header)
    read_or_refused(written(place, sound.files | {files.HEADER: data.draw(as_text(header))}), plain)
    tally("mutated files")


@settings(many, max_examples=2 * EXAMPLES)
@given(st.data())
def test_a_forged_config_without_checksums_is_survived(foreign, place, plain, tally, data):
    sound = foreign[data.draw(st.sampled_from(sorted(foreign)))]
    name = next(name for name in sound.files if name.endswith(".json"))
    config = data.draw(rewritten(json.loads(sound.files[name])))
    read_or_refused(written(place, sound.files | {name: data.draw(as_text(config))}), plain)
    tally("mutated files")


@many
@given(st.data())
def test_tensors_with_another_header_are_survived(own, foreign, place, plain, tally, data):
    both = own | foreign
    kind = data.draw(st.sampled_from(sorted(both)))
    name = next(name for name in both[kind].files if name.endswith(".safetensors"))
    stored = both[kind].files[name]
    length = int.from_bytes(stored[:8], "little")
    header = data.draw(rewritten(json.loads(stored[8 : 8 + length])))
    text = data.draw(as_text(header))
    changed = len(text).to_bytes(8, "little") + text + stored[8 + length :]
    file = read_or_refused(written(place, both[kind].files | {name: changed}), plain)
    tally("mutated files")
    if kind in own and file is not None:
        assert same(file, own[kind].file)


@many
@given(st.data())
def test_tensors_exchanged_between_names_are_seen(own, place, plain, tally, data):
    sound = own[data.draw(st.sampled_from(sorted(own)))]
    stored = sound.files[files.TENSORS]
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    keys = sorted(header)
    a, b = data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(keys))
    header[a], header[b] = header[b], header[a]
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + stored[8 + length :]
    file = read_or_refused(written(place, sound.files | {files.TENSORS: changed}), plain)
    tally("mutated files")
    assert (file is not None) == torch.equal(sound.file.tensors[a], sound.file.tensors[b])
    assert file is None or same(file, sound.file)


@pytest.mark.parametrize("layout", ["own", "foreign"])
def test_what_is_whole_is_taken(layout: str, own, foreign, place, plain):
    sounds: dict[str, Sound] = own if layout == "own" else foreign
    for name, sound in sounds.items():
        file = read_or_refused(written(place, sound.files), plain)
        assert file is not None, name
        assert same(replace(file, name=sound.file.name), sound.file), name  # PEFT's is that of the folder


@many
@given(pattern=st.text(alphabet="ab.*+?(){}[]|\\^$19,", max_size=40))
def test_no_pattern_hangs_or_raises_another_error(pattern):
    with suppress(loralab.UserError):
        peft_format._first_match({pattern: 2}, [Q, "ab" * 40], deadline=time.monotonic() + 1)
