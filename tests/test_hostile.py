"""Hostile and damaged adapter folders, made by the thousand: each is read as what it was, or is one UserError.

Never another exception, never a model that is changed by a load that fails, never memory for what a file only claims.
LORALAB_CAMPAIGN=20 makes twenty times as many of them, other ones each time.
"""

import copy
import json
import math
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from archs import shake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_files import IDS, OLD, fixed_model

import loralab
from loralab import adapters, analysis, files, peft_format
from loralab.rankmap import LayerRank, RankMap

pytestmark = pytest.mark.filterwarnings("ignore::loralab.files.FolderNote")
EXAMPLES = 60  # of each test
CAMPAIGN = int(os.environ.get("LORALAB_CAMPAIGN", "1"))
MEMORY = 4 * 2**30  # bytes that reading one of these tiny folders may ask for
many = settings(
    max_examples=EXAMPLES * CAMPAIGN,
    derandomize=CAMPAIGN == 1,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
)

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


@pytest.fixture(autouse=True)
def little_memory():
    """A limit on the address space, so that an allocation of what a file only claims fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


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


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a file after flips of bits, a cut, zeros, an insertion, or an exchange of two pieces."""
    at = st.integers(0, max(len(data) - 1, 0))
    changed = bytearray(data)
    match draw(st.sampled_from(["flip", "flips", "cut", "zeros", "insert", "exchange", "remove", "grow"])):
        case "flip":
            changed[draw(at)] ^= 1 << draw(st.integers(0, 7))
        case "flips":
            for i in draw(st.lists(at, min_size=2, max_size=9)):
                changed[i] ^= 1 << draw(st.integers(0, 7))
        case "cut":
            del changed[draw(at) :]
        case "zeros":
            start = draw(at)
            size = min(draw(st.integers(1, 600)), len(data) - start)
            changed[start : start + size] = bytes(size)
        case "insert":
            start = draw(at)
            changed[start:start] = draw(st.binary(min_size=1, max_size=20))
        case "exchange":
            (a, b), size = sorted((draw(at), draw(at))), draw(st.integers(1, 64))
            size = min(size, b - a, len(data) - b)
            changed[a : a + size], changed[b : b + size] = changed[b : b + size], changed[a : a + size]
        case "remove":
            start = draw(at)
            del changed[start : start + draw(st.integers(1, 20))]
        case "grow":
            changed += draw(st.binary(min_size=1, max_size=20))
    return bytes(changed)


@many
@given(st.data())
def test_damage_to_an_own_folder_is_seen(own, place, plain, data):
    sound = own[data.draw(st.sampled_from(sorted(own)))]
    name = data.draw(st.sampled_from(sorted(sound.files)))
    changed = data.draw(damaged(sound.files[name]))
    file = read_or_refused(written(place, sound.files | {name: changed}), plain)
    assert file is None or same(file, sound.file)
    if name == files.TENSORS and changed != sound.files[name]:
        assert file is None, "a change of the tensors is not seen"


@many
@given(st.data())
def test_damage_to_a_folder_without_checksums_is_survived(foreign, place, plain, data):
    sound = foreign[data.draw(st.sampled_from(sorted(foreign)))]
    name = data.draw(st.sampled_from(sorted(sound.files)))
    read_or_refused(written(place, sound.files | {name: data.draw(damaged(sound.files[name]))}), plain)


# ---- damage to structure ---------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in ((*path, key), *places(item, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


NUMBERS = [0, -1, 1, 2, 3, 7, 10**8, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, math.inf, math.nan]
TEXTS = [
    *("", "0", "A", "B", "lora", "vera", "nf4", "kaiming", "pissa", "eva", "all", "bias", "F16", "I64", "F8_E4M3"),
    *(
        "\n\x1b[2J",
        "\ud800",
        "x" * 5000,
        "..",
        ".",
        "*",
        "(a+)+$",
        "bert",
        "classifier",
        "bert.pooler",
        Q,
        V,
        f"{Q}.base",
    ),
]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=6,
)


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@st.composite
def rewritten(draw: st.DrawFn, value: Any) -> Any:
    """A JSON object after one to three changes of types, keys, items or values, anywhere in it."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = places(value)
        if not paths:
            break
        *before, last = draw(st.sampled_from(paths))
        holder = at(value, tuple(before))
        old = holder[last]
        match draw(
            st.sampled_from(["value", "value", "type", "remove", "repeat", "rename", "add", "swap", "wrap", "deep"])
        ):
            case "value":
                holder[last] = draw(VALUES)
            case "type":
                holder[last] = draw(
                    st.sampled_from(
                        [str(old), [old], {str(old)[:50]: old}, None, bool(old), len(str(old)), float(len(str(old)))]
                    )
                )
            case "remove":
                del holder[last]
            case "repeat" if isinstance(old, list):
                holder[last] = old * 2
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(TEXTS))] = holder.pop(last)
            case "add" if isinstance(old, dict):
                old[draw(st.sampled_from(TEXTS) | st.text(max_size=4))] = draw(VALUES)
            case "swap":
                *others, second = draw(st.sampled_from(paths))
                try:
                    there = at(value, tuple(others))
                    holder[last], there[second] = copy.deepcopy(there[second]), copy.deepcopy(old)
                except (KeyError, IndexError, TypeError):
                    continue
            case "wrap":
                holder[last] = [[old]]
            case "deep":
                holder[last] = deep(draw(st.sampled_from([50, 70, 500])))
    return value


@st.composite
def as_text(draw: st.DrawFn, value: Any) -> bytes:
    """JSON text of a value, at times with a key given twice."""
    text = json.dumps(value)
    if draw(st.integers(0, 9)) == 0 and isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        text = "{" + f"{json.dumps(key)}: {json.dumps(draw(VALUES))}, " + text[1:]
    return text.encode()


@many
@given(st.data())
def test_an_edit_of_an_own_header_is_seen(own, place, plain, data):
    sound = own[data.draw(st.sampled_from(sorted(own)))]
    header = data.draw(rewritten(json.loads(sound.files[files.HEADER])))
    text = data.draw(as_text(header))
    file = read_or_refused(written(place, sound.files | {files.HEADER: text}), plain)
    assert file is None or same(file, sound.file)


@settings(many, max_examples=3 * EXAMPLES * CAMPAIGN)
@given(st.data())
def test_a_forged_header_with_checksums_that_fit_is_survived(own, place, plain, data):
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


@settings(many, max_examples=2 * EXAMPLES * CAMPAIGN)
@given(st.data())
def test_a_forged_config_without_checksums_is_survived(foreign, place, plain, data):
    sound = foreign[data.draw(st.sampled_from(sorted(foreign)))]
    name = next(name for name in sound.files if name.endswith(".json"))
    config = data.draw(rewritten(json.loads(sound.files[name])))
    read_or_refused(written(place, sound.files | {name: data.draw(as_text(config))}), plain)


@many
@given(st.data())
def test_tensors_with_another_header_are_survived(own, foreign, place, plain, data):
    both = own | foreign
    kind = data.draw(st.sampled_from(sorted(both)))
    name = next(name for name in both[kind].files if name.endswith(".safetensors"))
    stored = both[kind].files[name]
    length = int.from_bytes(stored[:8], "little")
    header = data.draw(rewritten(json.loads(stored[8 : 8 + length])))
    text = data.draw(as_text(header))
    changed = len(text).to_bytes(8, "little") + text + stored[8 + length :]
    file = read_or_refused(written(place, both[kind].files | {name: changed}), plain)
    if kind in own and file is not None:
        assert same(file, own[kind].file)


@many
@given(st.data())
def test_tensors_exchanged_between_names_are_seen(own, place, plain, data):
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
