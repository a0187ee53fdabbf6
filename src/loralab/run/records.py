"""Read what a run folder holds, checked for what others take from it: a damaged file is one UserError.

Fields that nothing reads, and those of other versions, may be there or not.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loralab.disk import read_header
from loralab.errors import UserError
from loralab.schema import part_problems

Scores = dict[str, float]
RESULT = {
    "task": str, "objective": str, "labels": list[str] | None, "model": str, "method": str, "seed": int,
    "metric": {"name": str, "selected": float, "last": float | None, "best_on_validation": float | None},
    "metrics": Scores, "selected_epoch": float, "by_rank": dict[str, Scores],
    "counts": {"adapter": int, "head": int, "base": int, "trainable": int},
    "time": {"train_s": float, "examples_per_s": float},
    "memory": {"peak_bytes": int, "ledger": dict[str, int]},
    "protocol": dict[str, Any], "notes": list[str], "warnings": list[str],
    "collapsed": bool, "collapsed_held_out": bool | None,
}  # fmt: skip
OPTIONAL = ("by_rank", "collapsed", "collapsed_held_out", "objective", "labels")
FACTS = {
    "settings": dict[str, Any], "recipe": dict[str, Any] | None, "plan": dict[str, Any] | None, "data": dict[str, Any],
    "base_sha256": str, "hardware": dict[str, Any], "versions": dict[str, Any],
}  # fmt: skip
EPOCH = {"epoch": float, "step": int, "train_loss": float, "held_out": Scores | None, "validation": Scores}


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json. Raises UserError if it is missing, damaged or of something else."""
    return _checked(folder / "result.json", RESULT, optional=OPTIONAL)


def collapsed(result: Mapping[str, Any], held_out: bool = False) -> bool:
    """Tell whether a run predicts the same for every reported row: it learned nothing.

    `held_out` asks of the held-out rows, for who chooses among runs, as reported rows must not choose. A result that is
    older or held no rows out knows the reported rows only.
    """
    chosen = result.get("collapsed_held_out") if held_out else None
    return bool(result.get("collapsed", result["warnings"]) if chosen is None else chosen)  # once no other warning


def read_facts(folder: Path) -> dict[str, Any]:
    """Read run.json. Raises UserError if it is missing or damaged."""
    return _checked(folder / "run.json", FACTS, optional=FACTS)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, a row an epoch; empty before the first. Raises UserError if it is damaged."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise _damaged(file, [str(error)]) from error
    for place, row in enumerate(rows, 1):
        if wrong := part_problems(row, EPOCH, f"line {place}"):
            raise _damaged(file, wrong)
    return rows


def predictions_of(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return predictions (rows, ...) and labels (rows, ...) by split, checked. Raises UserError for a damaged file."""
    found = {}
    for split in sorted({key.rpartition("/")[0] for key in tensors}):
        logits, labels = (tensors.get(f"{split}/{name}") for name in ("logits", "labels"))
        if logits is None or labels is None or not logits.ndim or not labels.ndim or len(labels) != len(logits):
            raise _damaged(file, [f"{split!r} has no logits (rows, ...) and labels (rows, ...)"])
        classes = labels.ndim == 1 and not labels.is_floating_point()
        if classes and logits.ndim != 2:
            raise _damaged(file, [f"{split!r} has classes as labels and no logits (rows, outputs)"])
        if classes and len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
            have = f"labels {labels.min()} to {labels.max()}, and {logits.shape[1]} outputs"
            raise _damaged(file, [f"{split!r} has {have}"])
        found[split] = logits, labels
    return found


def _checked(file: Path, fields: Mapping[str, Any], optional: Collection[str]) -> dict[str, Any]:
    data = read_header(file)
    if wrong := part_problems(data, fields, optional=optional):
        raise _damaged(file, wrong)
    return data


def _damaged(file: Path, wrong: list[str]) -> UserError:
    return UserError(f"{file} is damaged or of another version: {'; '.join(wrong)}")
