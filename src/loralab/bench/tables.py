"""The tables of a bench, the same on the terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.bench.measure import NAMES
from loralab.bench.mixed import MERGED, PEFT_MIXED, loaded
from loralab.disk import size_text

SIDES = ("PEFT", "loralab")  # as people write NAMES
COLUMNS = {  # setting of a case -> column
    "model": "model",
    "targets": "layers adapted",
    "max_length": "tokens",
    "dtype": "dtype",
    "together": "runs together",
    "allocator": "allocator",
}
PADDED = ("epochs",)  # kinds whose rows are as long as the task has them, up to max_length
MEASURED = {
    "steps": ("PEFT", "loralab", "faster", "memory", "rate"),
    "growth": ("PEFT", "loralab", "faster", "memory", "rate"),
    "epochs": ("PEFT rows/s", "loralab rows/s", "faster", "memory"),
}
TITLES = {"steps": "A training step", "growth": "A training step as it grows", "epochs": "A whole epoch"}
_MEMORY = "memory: loralab's peak over PEFT's, loading included, imports excluded"
NOTES = {
    "steps": "times: medians over turns; faster: PEFT's time over loralab's turn by turn, median and quartiles; "
    f"{_MEMORY}; rate: achieved FLOP/s as a share of a large matrix product, PEFT and loralab",
    "epochs": "rows/s: medians over epochs, each in a fresh process, without evaluation; PEFT in Hugging Face's "
    f"Trainer; faster: median and quartiles; {_MEMORY}",
    "mixed": "time: median over turns; the other columns: throughput as a multiple of that of the named variant",
    "profile": "share: self time on the CPU by torch's profiler, its own cost included; calls: of one step",
}
NOTES["roofline"] = (
    "time: of all calls in a step, each product taken by itself, medians; sum: a floor for a step that takes these "
    "products one after the other; of the step: share of a step of loralab; packed: with the right operand "
    "packed once by oneDNN, where that can be"
)
NOTES["growth"] = NOTES["steps"]
Record = Mapping[str, Any]  # one case with what was measured of it
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]], int]  # title, columns, rows, columns of text


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Every table that a result has."""
    made = [_table("growth", [axis], records) for axis, records in result.get("growth", {}).items()]
    for kind, keys in (("steps", ["method"]), ("epochs", ["task", "method"])):
        if records := result.get(kind):
            made.append(_table(kind, keys, records))
    made += [_mixed(result["mixed"])] if "mixed" in result else []
    made += [_roofline(result["roofline"])] if "roofline" in result else []
    return made + ([_profile(result["profile"])] if "profile" in result else [])


def _table(kind: str, keys: list[str], records: Sequence[Record]) -> Table:
    """A row a case. What is the same in every row is said once, in the title."""
    case = records[0]["case"]
    skip = {*keys, *(("max_length",) if kind in PADDED else ())}
    others = {key: {str(r["case"][key]) for r in records} for key in COLUMNS if key in case and key not in skip}
    same = [f"{COLUMNS[key]} {_cell(records[0], key)}" for key, values in others.items() if len(values) == 1]
    keys = [*(key for key, values in others.items() if len(values) > 1), *keys]
    fixed = [f"batch {case['batch_size']}"] + ([] if "method" in keys else [case["method"]])
    columns = (*(COLUMNS.get(key, key) for key in keys), *MEASURED[kind])
    cells = [(*(_cell(r, key) for key in keys), *_measured(r)) for r in records]
    return f"{TITLES[kind]}: {', '.join([*fixed, *same])}", columns, cells, len(keys)


def _cell(r: Record, key: str) -> str:
    value = str(r["case"][key])
    return value.rstrip("/").rpartition("/")[2] if key == "model" else value


def _measured(r: Record) -> tuple[str, ...]:
    memory = f"{r['memory_ratio']['peak']:.2f}x of {size_text(r['memory']['peft']['peak'])}"
    if "seconds" in r:
        pair = [milliseconds(r["seconds"][name]["median"]) for name in NAMES]
        rates = [f"{r['fraction'][name] * 100:.0f}" for name in NAMES]
        return (*pair, faster(r["faster"]), memory, f"{', '.join(rates)} %")
    speeds = [f"{r['rows_per_s'][name]['median']:,.0f}" for name in NAMES]
    return (*speeds, faster(r["faster"]), memory)


def _mixed(r: Record) -> Table:
    """A row a variant, its throughput beside that of the variants it is measured against."""
    seconds, case = r["seconds"], r["case"]
    against = {MERGED: "of merged", loaded(1): "of 1 loaded", PEFT_MIXED: "of PEFT's adapter_names"}
    against = {variant: title for variant, title in against.items() if variant in seconds}
    rows = [
        (variant, milliseconds(taken), *(f"{seconds[other] / taken:.2f}x" for other in against))
        for variant, taken in seconds.items()
    ]
    settings = [f"{case['batch_size']} rows of an adapter each", case["method"]]
    settings += [f"{COLUMNS[key]} {_cell(r, key)}" for key in COLUMNS if key in case]
    title = f"A batch: {', '.join(settings)}; a row differs from the row alone by at most {r['largest_difference']:.0e}"
    return title, ("variant", "time", *against.values()), rows, 1


def _roofline(r: Record) -> Table:
    """A row a product, then what they add up to, then the step."""
    step, case = r["seconds"], r["case"]

    def row(name: str, calls: str, operations: float, taken: float, packed: float | None) -> tuple[str, ...]:
        rate = f"{operations / taken / 1e9:,.0f}"
        return name, calls, rate, milliseconds(taken), f"{taken / step:.0%}", milliseconds(packed) if packed else ""

    def times(p: Record, key: str = "seconds") -> float:
        return float(p["count"] * p.get(key, p["seconds"]))

    products, calls = r["products"], str(sum(p["count"] for p in r["products"]))
    rows = [
        row(
            _shape(p),
            str(p["count"]),
            p["count"] * p["operations"],
            times(p),
            times(p, "packed") if "packed" in p else None,
        )
        for p in products
    ]
    rows.append(row("sum", calls, r["operations"], r["floor"], sum(times(p, "packed") for p in products)))
    rows.append(row("step", "", r["operations"], step, None))
    settings = [f"batch {case['batch_size']}", case["method"]]
    settings += [f"{COLUMNS[key]} {_cell(r, key)}" for key in COLUMNS if key in case]
    columns = ("product", "calls", "GFLOP/s", "time", "of the step", "packed")
    return f"Roofline of a step: {', '.join(settings)}", columns, rows, 1


def _shape(p: Mapping[str, Any]) -> str:
    """A product as text, transposed operands marked: 2048 x 384 by (384 x 1536)^T."""
    a, b = f"{p['n']} x {p['k']}", f"{p['k']} x {p['m']}"
    a, b = (f"({x})T" if turned == "t" else x for x, turned in zip((a, b), p["form"], strict=True))
    return (f"{p['batch']} of " if p["batch"] > 1 else "") + f"{a} by {b}"


def _profile(r: Record) -> Table:
    """A row an operation; empty where it is not among those that take most."""
    backends, case = r["backends"], r["case"]
    found = [{operation["name"]: operation for operation in backends[name]["operations"]} for name in NAMES]
    largest = {key: max(by[key]["share"] for by in found if key in by) for by in found for key in by}
    rows = [
        (key, *(text for by in found for text in _calls(by.get(key))))
        for key in sorted(largest, key=lambda k: -largest[k])
    ]
    times = [f"{title} {milliseconds(backends[name]['seconds'])}" for name, title in zip(NAMES, SIDES, strict=True)]
    settings = [f"batch {case['batch_size']}", case["method"]]
    settings += [f"{COLUMNS[key]} {_cell(r, key)}" for key in COLUMNS if key in case]
    columns = ("operation", "PEFT calls", "share", "loralab calls", "share")
    return f"Where a step's time goes: {', '.join(times)}; {', '.join(settings)}", columns, rows, 1


def _calls(operation: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("", "") if operation is None else (str(operation["calls"]), f"{operation['share']:.0%}")


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
    """The tables as Markdown, with the command, the machine and what the columns mean."""
    parts = [f"`{result['command']}`, {result['repeats']} repeats on {machine(result)}."]
    for title, columns, rows, texts in tables(result):
        rule = ["---"] * texts + ["---:"] * (len(columns) - texts)
        parts += [f"{title}", "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows))]
    return "\n\n".join([*parts, note(result)]) + "\n"


def note(result: Mapping[str, Any]) -> str:
    """What the columns mean."""
    return " ".join(dict.fromkeys(f"{text[0].upper()}{text[1:]}." for kind, text in NOTES.items() if kind in result))


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def faster(s: Mapping[str, float]) -> str:
    """Median and quartiles of a ratio."""
    return f"{s['median']:.2f}x ({s['low']:.2f}-{s['high']:.2f})"


def label(r: Record, records: Sequence[Record]) -> str:
    """A case by the settings in which it differs from the others."""
    keys = [key for key in r["case"] if len({str(other["case"][key]) for other in records}) > 1] or ["method"]
    return " ".join(_cell(r, key) for key in keys)
