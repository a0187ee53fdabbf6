"""Write what PEFT and its relatives read: a low-rank update as a LoRA of scaling 1, with a gain as a DoRA.

Both say the same function. Methods that PEFT has as well and that are no low-rank product are written as its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from loralab import files
from loralab.disk import read_header, replacing_both, write_json, write_tensors
from loralab.errors import UserError
from loralab.files import one_layout
from loralab.peft_format import HEADER, INSIDE, PREFIX, TENSORS, VECTORS, places
from loralab.peft_methods import Own, at_most_full
from loralab.schema import listed
from loralab.update import Dense, Update

VLLM_RANK = 16  # the largest rank that vLLM takes unless it is told to take more


@dataclass(frozen=True)
class Around:
    """What a folder holds beside the adapted layers."""

    base: Mapping[str, Any]  # name, class, task_type and sha256
    head: Mapping[str, Tensor]  # key -> tensor of the modules `heads`
    heads: Sequence[str]
    labels: Sequence[str]
    biases: Mapping[str, Tensor]  # of the base, that learned
    tokens: Mapping[str, tuple[tuple[int, ...], Tensor]]  # path -> single tokens, their vectors (k, width)


def write_lora(
    folder: Path,
    updates: Mapping[str, Update | Dense],
    gains: Mapping[str, Tensor],
    around: Around,
    sides: Mapping[str, tuple[int, ...] | None],
    stacks: Mapping[str, str],
) -> Path:
    """Write a PEFT LoRA or DoRA folder: ranks may differ by layer, the scaling is folded into B.

    `updates`: path -> the lowered update of that layer, which must be low-rank; `gains`: path -> m (out,) where the
    method has a gain; `sides`: path -> what `kinds.sides` says of the layer, where it is no product; `stacks`: path of
    a stack of experts -> PEFT's path of its adapter.
    Raises UserError as `_write` does.
    """
    low: dict[str, Update] = {}
    for path, u in updates.items():
        assert isinstance(u, Update)
        low[path] = u if path in stacks else at_most_full(u)
    if stacks:  # a folder with target_parameters has one rank, as `peft_format` reads it
        most = max(u.A.shape[-2] for u in low.values())
        low = {path: of_rank(u, most) for path, u in low.items()}
    tensors: dict[str, Tensor] = {}
    for path, u in low.items():
        A, B = u.A, u.B
        if path in stacks:  # A (n, r, in) and B (n, out, r)
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # (n r, in), (out, r n)
        own = _shaped({"A": A, "B": B, "m": gains.get(path)}, sides.get(path))
        place = stacks.get(path, path)
        tensors |= {f"{place}.{name}": tensor.contiguous() for name, tensor in own.items() if tensor is not None}
    ranks = {path: u.A.shape[-2] for path, u in low.items()}
    return _write(folder, tensors, {**_ranks(ranks), "use_dora": bool(gains)}, list(updates), stacks, around)


def write_own(folder: Path, own: Own, paths: Sequence[str], around: Around) -> Path:
    """Write the folder of a method that PEFT has too. Raises UserError as `_write` does."""
    return _write(folder, own.tensors, own.config, paths, {}, around)


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    paths: Sequence[str],
    stacks: Mapping[str, str],
    around: Around,
) -> Path:
    """Write both files of a folder.

    Raises UserError if it cannot be written or holds an adapter in loralab's layout, and for values that are not
    finite.
    """
    biases = {_inside(key, paths): t for key, t in around.biases.items()}
    tokens = {path: list(own) for path, (own, _) in around.tokens.items()}
    vectors = {path + VECTORS: t for path, (_, t) in around.tokens.items()}
    held = {PREFIX + key: tensor for key, tensor in {**tensors, **around.head, **biases, **vectors}.items()}
    one_layout(folder, files.TENSORS, files.HEADER)
    if odd := [key for key, t in held.items() if not t.isfinite().all()]:
        raise UserError(f"the adapter cannot be exported: values that are not finite: {listed(odd)}")
    base = around.base
    common = {
        "task_type": base.get("task_type"),
        "base_model_name_or_path": base.get("name"),
        "inference_mode": True,
        "target_modules": [path for path in paths if path not in stacks],
        "modules_to_save": list(around.heads) or None,
        **({"target_parameters": list(stacks)} if stacks else {}),
        **({"bias": "all"} if biases else {}),
        **({"trainable_token_indices": tokens} if tokens else {}),
    }
    metadata = {"format": "pt", "labels": json.dumps(list(around.labels)), "class": base.get("class")}
    metadata["base_sha256"] = base.get("sha256")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_both(folder / TENSORS, folder / HEADER) as (first, last):
            write_tensors(first, held, {key: text for key, text in metadata.items() if text is not None})
            write_json(last, {**config, **common})
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    return folder


def _inside(key: str, paths: Sequence[str]) -> str:
    """PEFT's name of a bias: that of an adapted layer lies inside of the layer that it wraps."""
    path, _, last = key.rpartition(".")
    return f"{path}{INSIDE}.{last}" if path in paths else key


def of_rank(u: Update, rank: int) -> Update:
    """The same update at a higher rank, with rows and columns of zeros."""
    more = rank - u.A.shape[-2]
    return u._replace(A=F.pad(u.A, (0, 0, 0, more)), B=F.pad(u.B, (0, more)))


def _shaped(roles: Mapping[str, Any], sides: tuple[int, ...] | None) -> dict[str, Tensor | None]:
    """PEFT's name -> A (r, in), B (out, r) and m (out,) in the shapes that PEFT gives them in such a layer."""
    A, B, m = (roles[role] for role in ("A", "B", "m"))
    if sides == ():
        return {"lora_embedding_A": A, "lora_embedding_B": B, "lora_magnitude_vector": m}
    if sides is not None:
        ones = (1,) * (len(sides) - 1)
        A, B, m = A.unflatten(1, sides), B.reshape(*B.shape, *ones), None if m is None else m.reshape(1, -1, *ones)
    return {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}


def _ranks(ranks: dict[str, int]) -> dict[str, Any]:
    """The settings of a LoRA that say the rank of each layer, path -> rank, with a scaling of 1."""
    rank = max(ranks.values())
    ends = {path: [other for other in ranks if other.endswith(f".{path}")] for path in ranks}
    # PEFT takes the first key that matches the end of a path, so a path that is the end of another one is anchored
    apart = {path for path, others in ends.items() if any(ranks[other] != ranks[path] for other in others)}
    pattern = {f"^{path}" if path in apart else path: r for path, r in ranks.items() if r != rank or path in apart}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def vllm_notes(folder: Path) -> list[str]:
    """What vLLM refuses, or must be told, of an adapter in PEFT's layout."""
    config = read_header(places(folder)[1])
    notes = []
    if config.get("use_dora"):
        notes.append("vLLM refuses DoRA (use_dora): merge the adapter for it instead")
    if config.get("modules_to_save"):
        notes.append("vLLM refuses a head in an adapter (modules_to_save): merge the adapter for it instead")
    if config.get("bias") not in (None, "none") or config.get("trainable_token_indices"):
        notes.append("vLLM refuses biases and single tokens in an adapter: merge the adapter for it instead")
    if config["peft_type"] != "LORA":
        notes.append(f"vLLM reads LoRA only, and this is {config['peft_type']}: merge the adapter for it instead")
    elif config.get("target_parameters"):
        notes.append("vLLM has names of its own for the experts of a mixture: merge the adapter for it instead")
    if not notes and config["r"] > VLLM_RANK:
        notes.append(f"vLLM needs --max-lora-rank {config['r']} or more, as its default is {VLLM_RANK}")
    return notes
