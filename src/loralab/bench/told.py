"""The rows of the tables: on the terminal and as Markdown they are the same."""

from collections.abc import Mapping, Sequence
from typing import Any

WHERE = {
    "model": "model",
    "targets": "layers adapted",
    "length": "tokens",
    "dtype": "dtype",
    "together": "runs together",
}  # of a case -> column
MEASURED = {
    "steps": ("PEFT", "loralab", "faster", "memory", "rate"),
    "growth": ("PEFT", "loralab", "faster", "memory", "rate"),
    "epochs": ("PEFT rows/s", "loralab rows/s", "faster", "memory"),
}
TITLES = {"steps": "A training step", "growth": "A training step as it grows", "epochs": "A whole epoch"}
NOTES = {
    "steps": "times: medians over turns; faster: PEFT's over loralab's turn by turn, median and quartiles; memory: "
    "loralab's peak of PEFT's, loading included, above what the imports take; rate: products that the step needs, of "
    "what the machine does in one large product, PEFT and loralab",
    "epochs": "rows/s: medians over epochs, each in a fresh process, without evaluation; PEFT in Hugging Face's "
    "Trainer; faster: median and quartiles; memory: loralab's peak of PEFT's, loading included, above what the "
    "imports take",
}
NOTES["growth"] = NOTES["steps"]
SIDES = ("peft", "loralab")
Row = Mapping[str, Any]
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]], int]  # title, columns, rows, columns of text


def tables(result: Mapping[str, Any]) -> list[Table]:
    made = [_table("growth", [axis], rows) for axis, rows in result.get("growth", {}).items()]
    for kind, keys in (("steps", ["method"]), ("epochs", ["task", "method"])):
        if rows := result.get(kind):
            made.append(_table(kind, keys, rows))
    return made


def _table(kind: str, keys: list[str], rows: Sequence[Row]) -> Table:
    """What is the same in every row is said once, in the title."""
    case = rows[0]["case"]
    others = {key: {str(r["case"][key]) for r in rows} for key in WHERE if key in case and key not in keys}
    same = [f"{WHERE[key]} {_cell(rows[0], key)}" for key, values in others.items() if len(values) == 1]
    keys = [*(key for key, values in others.items() if len(values) > 1), *keys]
    fixed = [f"batch {case['batch_size']}"] + ([] if "method" in keys else [case["method"]])
    columns = (*(WHERE.get(key, key) for key in keys), *MEASURED[kind])
    cells = [(*(_cell(r, key) for key in keys), *_measured(r)) for r in rows]
    return f"{TITLES[kind]}: {', '.join([*fixed, *same])}", columns, cells, len(keys)


def _cell(r: Row, key: str) -> str:
    value = str(r["case"][key])
    return value.rstrip("/").rpartition("/")[2] if key == "model" else value


def _measured(r: Row) -> tuple[str, ...]:
    if "seconds" in r:
        pair = [milliseconds(r["seconds"][side]["median"]) for side in SIDES]
        rates = [f"{r['fraction'][side] * 100:.0f}" for side in SIDES]
        return (*pair, faster(r["faster"]), _memory(r), f"{', '.join(rates)} %")
    speeds = [f"{r['rows_per_s'][side]['median']:,.0f}" for side in SIDES]
    return (*speeds, faster(r["faster"]), _memory(r))


def machine(result: Mapping[str, Any]) -> str:
    """What it was measured on, in a line."""
    m, versions = result["machine"], result["versions"]
    has = [name for name, there in (("AMX", m["amx"]), ("AVX512-BF16", m["avx512_bf16"])) if there]
    threads = f"{m['threads']} thread" + "s" * (m["threads"] > 1)
    cpu = f"{m['name']}, {threads}, {' and '.join(has) or 'no bfloat16 products in hardware'}"
    place = m["gpu"] or cpu
    rates = [f"{value['median'] / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, value in result.get("rates", {}).items()]
    return "; ".join([place, *rates, ", ".join(f"{key} {v}" for key, v in versions.items())])


def markdown(result: Mapping[str, Any]) -> str:
    parts = [f"`{result['command']}`, {result['repeats']} repeats on {machine(result)}."]
    for title, columns, rows, texts in tables(result):
        rule = ["---"] * texts + ["---:"] * (len(columns) - texts)
        parts += [f"{title}", "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows))]
    return "\n\n".join([*parts, note(result)]) + "\n"


def note(result: Mapping[str, Any]) -> str:
    """What the columns are."""
    return " ".join(dict.fromkeys(f"{text[0].upper()}{text[1:]}." for kind, text in NOTES.items() if kind in result))


def _memory(r: Row) -> str:
    return f"{r['memory_ratio']['peak']:.2f}x of {r['memory']['peft']['peak'] / 1e6:,.0f} MB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def faster(s: Mapping[str, float]) -> str:
    return f"{s['median']:.2f}x ({s['low']:.2f}-{s['high']:.2f})"


def label(r: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A case by what tells it from the others."""
    keys = [key for key in r["case"] if len({str(other["case"][key]) for other in rows}) > 1] or ["method"]
    return " ".join(_cell(r, key) for key in keys)
