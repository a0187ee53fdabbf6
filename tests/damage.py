"""Damage for files: to bytes, to the structure of JSON, and a limit on the memory that reading them may take."""

import copy
import json
import math
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import LONG, TIMES
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = 60 * TIMES  # of each test
MEMORY = 4 * 2**30  # bytes that reading one of these tiny files may ask for
many = settings(
    max_examples=EXAMPLES,
    derandomize=not LONG,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def little_memory():
    """A limit on the address space, so that an allocation of what a file only claims fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# ---- bytes ----


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


# ---- structure ----


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in ((*path, key), *places(item, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


LAYER = "bert.encoder.layer.0.attention.self.query"
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
        LAYER,
        LAYER.replace("query", "value"),
        f"{LAYER}.base",
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
