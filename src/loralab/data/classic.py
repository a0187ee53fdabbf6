"""GLUE's own TSV files (Wang et al., 2018): no quoting, no header in CoLA, a few broken lines in QQP."""

from pathlib import Path

from loralab.data.tables import Columns, raise_faults, reading, require
from loralab.errors import UserError

Lines = tuple[list[str], list[list[str]]]  # header, rows

BROKEN = 0.001  # share of QQP's lines that may end early; in the official train file about 1 in 15,000 does


def lines(path: Path, header: tuple[str, ...] | None = None) -> Lines:
    """Header and fields of every line that is not empty; line ends and a byte order mark go, spaces stay."""
    with reading(path), open(path, encoding="utf-8-sig") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if line != "\n"]
    names = list(header) if header else rows.pop(0) if rows else []
    if not rows:
        raise UserError(f"{path} is empty: rows of GLUE were expected")
    return names, rows


def columns(path: Path, table: Lines, wanted: tuple[str, ...], may_break: bool) -> tuple[Columns, int]:
    """The wanted columns (the label last) and how many broken lines were left out, which only QQP may have."""
    names, rows = table
    require(path, names, wanted)
    places = [names.index(name) for name in wanted]

    def ends_early(row: list[str]) -> bool:
        return len(row) <= max(places) or (may_break and not row[places[-1]])

    broken = [number for number, row in enumerate(rows, 1) if ends_early(row)]
    if len(broken) > len(rows) * BROKEN * may_break:
        raise_faults(path, {f"fewer columns than the {len(names)} expected": broken})
    whole = [row for row in rows if not ends_early(row)]
    return {name: [row[place] for row in whole] for name, place in zip(wanted, places, strict=True)}, len(broken)


def part(path: Path, table: Lines, split: str) -> Lines:
    """The rows of one split of msr_paraphrase_train.txt: GLUE's validation is what dev_ids.tsv names, by two ids."""
    ids = path.with_name("dev_ids.tsv")
    if not ids.exists():
        raise UserError(f"{ids} does not exist: it says which rows of {path.name} are GLUE's validation split")
    validation = {tuple(row[:2]) for row in lines(ids, ("#1 ID", "#2 ID"))[1]}
    names, rows = table
    require(path, names, ("#1 ID", "#2 ID"))
    places = names.index("#1 ID"), names.index("#2 ID")
    keys = [tuple(row[place] for place in places if place < len(row)) for row in rows]
    return names, [row for row, key in zip(rows, keys, strict=True) if (key in validation) == (split != "train")]
