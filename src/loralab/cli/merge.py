"""`loralab merge`: a plain model with an adapter merged in."""

from pathlib import Path
from typing import Any, Literal

import torch

from loralab.cli import base
from loralab.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE = ["The cat that the dogs chase sleeps.", "A longer line, so that the rows differ in length and in words."]


def merge(
    folder: Path, /, *, model: str, out: Path, dtype: Literal["float32", "bfloat16", "float16"] = "float32"
) -> None:
    """Write a plain model with an adapter merged in, and print how far its outputs are from the adapted model's.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    model: str
        The base: a local folder, a hub name, or an alias.
    out: Path
        Folder to write; must not exist.
    dtype: str
        What the merged weights are kept in.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: choose a new folder")
    adapters, tokenizer = base.load(model, folder)
    plain = adapters.merge().to(DTYPES[dtype])
    error = _difference(adapters.model, plain, tokenizer)
    try:
        plain.save_pretrained(out)  # type: ignore[operator]
        tokenizer.save_pretrained(out)  # type: ignore[attr-defined]
    except OSError as problem:
        raise UserError(f"cannot write {out}: {problem.strerror or problem}") from problem
    print(f"merged into {out} as {dtype}; largest difference of an output on {len(PROBE)} probe rows: {error:.2g}")


def _difference(adapted: Any, plain: Any, tokenizer: Any) -> float:
    batch = tokenizer(PROBE, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = adapted.eval()(**batch).logits, plain.eval()(**batch).logits
    return float((ours - theirs.float()).abs().max())
