"""`loralab merge`: a plain model with an adapter merged in."""

from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from loralab import gguf_format, models
from loralab.adapted import base_tensor
from loralab.analysis import merge_errors
from loralab.cli import base
from loralab.disk import check_output_folder, new_folder
from loralab.errors import UserError
from loralab.merging import merge_dtype
from loralab.objectives import generation, saved
from loralab.objectives.saved import Saved

PROBE = ["The cat that the dogs chase sleeps.", "A longer line, so that the rows differ in length and in words."]


def merge(
    folder: Path,
    /,
    *,
    model: str,
    out: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    gguf: bool = False,
    name: str | None = None,
) -> None:
    """Write a plain model with an adapter merged in, and print how far its outputs are from the adapted model's.

    The model keeps the chat template that the adapter was trained with, and ends its answers as the adapter learned.

    Parameters
    ----------
    folder: Path
        An adapter folder of loralab or PEFT.
    model: str
        The base: a local folder, a hub name, or an alias.
    out: Path
        Folder to write, new or empty.
    dtype: str
        What the merged weights are kept in.
    gguf: bool
        Write one file of llama.cpp, model.gguf: that of the base, which must be GGUF, with the merged weights.
    name: str
        Another name for the adapter than its own.
    """
    check_output_folder(out)
    base_file = models.gguf_file(model) if gguf else None
    if gguf and base_file is None:
        raise UserError(
            f"--gguf takes settings and tokens from the file of the base, and {model} is no GGUF file: leave it out, "
            "and convert the merged folder with llama.cpp's convert_hf_to_gguf.py"
        )
    known = saved.read(folder)
    adapters, tokenizer = base.load(model, folder, name, whole=True)
    probe = _probe(adapters.model, tokenizer)
    errors = merge_errors(adapters, None, probe)
    plain = adapters.merge(dtype=dtype)
    if base_file is None:
        _write(plain, tokenizer, known, out)
    else:
        words = gguf_format.Words(known.template, *known.ends(tokenizer))
        _write_gguf(plain, adapters.model, base_file, dtype, words, out)
    rows = len(probe["input_ids"])
    print(f"merged into {out} as {dtype}; largest difference of an output on {rows} probe rows, by dtype:")
    print(", ".join(f"{route} {error:.1g}" for route, error in errors.items()))


def _probe(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A batch that the model takes, of one row where rows cannot be padded."""
    batch = tokenizer(
        PROBE if tokenizer.pad_token else PROBE[:1], padding=tokenizer.pad_token is not None, return_tensors="pt"
    )
    takes = signature(model.forward).parameters
    if "decoder_input_ids" in takes and model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return {key: tensor for key, tensor in batch.items() if key in takes}


def _write(plain: Any, tokenizer: Any, known: Saved, out: Path) -> None:
    """Write the folder, whole or not at all. Raises UserError."""
    logging.disable_progress_bar()
    tokenizer.chat_template = known.template or tokenizer.chat_template
    if ends := known.ends(tokenizer):
        plain.generation_config.eos_token_id = generation.end_tokens(plain, tokenizer, ends)
    try:
        with new_folder(out) as folder:
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError as problem:
        raise UserError(f"cannot write {out}: {problem.strerror or problem}") from problem


def _write_gguf(plain: Any, adapted: Any, base_file: Path, dtype: str, words: gguf_format.Words, out: Path) -> None:
    """Write the file of the base with the tensors that the merge changed, whole or not at all. Raises UserError."""
    changed = {
        key: p for key, p in plain.named_parameters() if not torch.equal(p, base_tensor(adapted, key).to(p.dtype))
    }
    try:
        with new_folder(out) as folder:
            gguf_format.write_model(folder, base_file, plain.config, changed, merge_dtype(dtype), words)
    except OSError as problem:
        raise UserError(f"cannot write {out}: {problem.strerror or problem}") from problem
