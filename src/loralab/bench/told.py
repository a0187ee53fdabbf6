"""The rows of the tables: on the terminal and as Markdown they are the same."""

from collections.abc import Mapping, Sequence
from typing import Any

STEP = (
    "model", "method", "layers adapted", "tokens", "dtype", "PEFT", "loralab", "faster", "PEFT memory",
    "loralab memory", "of PEFT's", "PEFT rate", "loralab rate",
)  # fmt: skip
GROWTH = ("grows", "to", "PEFT", "loralab", "faster", "of PEFT's memory")
EPOCH = (
    "task", "model", "method", "dtype", "rows", "PEFT rows/s", "loralab rows/s", "faster", "PEFT memory",
    "loralab memory", "of PEFT's",
)  # fmt: skip
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]], int]  # title, columns, rows, columns of text
NOTES = {
    "steps": "time: median over turns of a training step; faster: PEFT's time over loralab's, turn by turn, with "
    "quartiles; memory: peak resident, loading included, above what the imports take; rate: products the step needs, "
    "of what the machine does in a large product",
    "growth": "one of rank, layers and tokens changes, the others stay",
    "epochs": "training rows a second over a whole epoch, without evaluation; PEFT in Hugging Face's Trainer",
}


def tables(result: Mapping[str, Any]) -> list[Table]:
    made: list[Table] = []
    if steps := result.get("steps"):
        made.append(("steps", STEP, [_step(r) for r in steps], 5))
    if growth := result.get("growth"):
        made.append(("growth", GROWTH, [_grown(axis, r) for axis, rows in growth.items() for r in rows], 2))
    if epochs := result.get("epochs"):
        made.append(("epochs", EPOCH, [_epoch(r) for r in epochs], 4))
    return made


def machine(result: Mapping[str, Any]) -> str:
    """What it was measured on, in a line."""
    m, versions = result["machine"], result["versions"]
    has = [name for name, there in (("AMX", m["amx"]), ("AVX512-BF16", m["avx512_bf16"])) if there]
    cpu = f"{m['name']}, {m['threads']} threads, {' and '.join(has) or 'no bfloat16 products in hardware'}"
    place = m["gpu"] or cpu
    rates = [f"{value['median'] / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, value in result.get("rates", {}).items()]
    return "; ".join([place, *rates, ", ".join(f"{key} {v}" for key, v in versions.items())])


def markdown(result: Mapping[str, Any]) -> str:
    parts = [f"Measured on {machine(result)}."]
    for kind, columns, rows, texts in tables(result):
        rule = ["---"] * texts + ["---:"] * (len(columns) - texts)
        lines = [f"| {' | '.join(line)} |" for line in (columns, rule, *rows)]
        parts += ["\n".join(lines), f"{NOTES[kind][0].upper()}{NOTES[kind][1:]}. {turns(result, kind)}"]
    return "\n\n".join(parts) + "\n"


def turns(result: Mapping[str, Any], kind: str) -> str:
    what = "a fresh pair of processes each" if kind == "epochs" else "turn and turn about"
    return f"{result['repeats']} repeats, {what}, command: `{result['command']}`."


def _step(r: Mapping[str, Any]) -> tuple[str, ...]:
    case = r["case"]
    times = [milliseconds(r["seconds"][side]["median"]) for side in ("peft", "loralab")]
    rates = [f"{r['fraction'][side]:.0%}" for side in ("peft", "loralab")]
    named = (_model(case), case["method"], case["targets"], str(case["length"]), case["dtype"])
    return (*named, *times, faster(r["faster"]), *_memory(r), *rates)


def _grown(axis: str, r: Mapping[str, Any]) -> tuple[str, ...]:
    times = [milliseconds(r["seconds"][side]["median"]) for side in ("peft", "loralab")]
    return axis, str(r["case"][axis]), *times, faster(r["faster"]), f"{r['memory_ratio']['peak']:.2f}x"


def _epoch(r: Mapping[str, Any]) -> tuple[str, ...]:
    case = r["case"]
    speeds = [f"{r['rows_per_s'][side]['median']:,.0f}" for side in ("peft", "loralab")]
    named = (case["task"], _model(case), case["method"], case["dtype"])
    return (*named, f"{r['rows']:,}", *speeds, faster(r["faster"]), *_memory(r))


def _model(case: Mapping[str, Any]) -> str:
    return str(case["model"]).rstrip("/").rpartition("/")[2]


def _memory(r: Mapping[str, Any]) -> tuple[str, str, str]:
    theirs, ours = (f"{r['memory'][side]['peak'] / 1e6:,.0f} MB" for side in ("peft", "loralab"))
    return theirs, ours, f"{r['memory_ratio']['peak']:.2f}x"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def faster(s: Mapping[str, float]) -> str:
    return f"{s['median']:.2f}x ({s['low']:.2f} to {s['high']:.2f})"


def label(r: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A case by what tells it from the others."""
    keys = [key for key in r["case"] if len({str(other["case"][key]) for other in rows}) > 1] or ["method"]
    return " ".join(_model(r["case"]) if key == "model" else str(r["case"][key]) for key in keys)
