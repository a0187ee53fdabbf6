"""`loralab merge`: a plain model with an adapter merged in."""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from loralab.analysis import merge_errors
from loralab.cli import base
from loralab.errors import UserError

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
    base.absent(out)
    adapters, tokenizer = base.load(model, folder)
    errors = merge_errors(adapters, None, tokenizer(PROBE, padding=True, return_tensors="pt"))
    _write(adapters.merge(dtype=dtype), tokenizer, out)
    print(f"merged into {out} as {dtype}; largest difference of an output on {len(PROBE)} probe rows, by dtype:")
    print(", ".join(f"{route} {error:.1g}" for route, error in errors.items()))


def _write(plain: Any, tokenizer: Any, out: Path) -> None:
    """The folder, whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    logging.disable_progress_bar()
    try:
        for part in (plain, tokenizer):
            part.save_pretrained(partial)
        os.replace(partial, out)
    except OSError as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {out}: {problem.strerror or problem}") from problem
