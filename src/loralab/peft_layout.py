"""PEFT's adapter folders (adapter_config.json, adapter_model.safetensors): read them, and write what others read.

Any low-rank update without a gain can be written, since it lowers to a plain LoRA of scaling 1.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from loralab.errors import UserError
from loralab.factors.lora import LoRA
from loralab.recipe import Recipe

if TYPE_CHECKING:
    from loralab.attach import Adapters
    from loralab.files import AdapterFile

TENSORS, HEADER = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<role>[AB])\.weight")
# settings of PEFT's LoraConfig under which its file is not the plain LoRA that is read here
REFUSED = {"use_dora": False, "bias": "none", "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}}


def read(folder: Path) -> "AdapterFile":
    from loralab.files import AdapterFile, read_header, read_tensors

    config = read_header(folder / HEADER)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder / HEADER}: peft_type {config.get('peft_type')!r} is not read here, only 'LORA'")
    if strange := [k for k, v in REFUSED.items() if config.get(k) not in (v, None)]:
        told = ", ".join(f"{key}={config[key]!r}" for key in strange)
        raise UserError(f"{folder / HEADER}: {told} is not read here; export plain LoRA from PEFT instead")
    tensors: dict[str, Tensor] = {}
    paths: dict[str, None] = {}
    heads: dict[str, None] = {}
    for key, tensor in read_tensors(folder / TENSORS).items():
        key = key.removeprefix(PREFIX)
        if found := FACTOR.fullmatch(key):
            paths[found["path"]] = None
            tensors[f"{found['path']}.{found['role']}"] = tensor
        else:
            heads[
                next((m for m in config.get("modules_to_save") or [] if key.startswith(m + ".")), key.split(".")[0])
            ] = None
            tensors[key] = tensor
    factors = LoRA(config["r"], float(config["lora_alpha"]), stabilized=bool(config.get("use_rslora")))
    base = {"name": config.get("base_model_name_or_path"), "sha256": None}
    recipe = Recipe(factors=factors, dropout=float(config.get("lora_dropout") or 0))
    return AdapterFile(folder.name or "peft", recipe, list(paths), list(heads), [], base, tensors)


def write(handle: "Adapters", folder: Path | str, name: str | None = None) -> Path:
    """Writes the adapter as a PEFT LoRA: ranks may differ by layer, the scaling is folded into B (alpha = rank)."""
    name = handle.only(name)
    entry = handle.entries[name]
    if entry.coverage is None:
        raise UserError(f"adapter {name!r} adapts no layer, so there is no LoRA to export; merge it instead")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path in entry.paths:
        u = handle.layers[path].lower(name)
        if u.gain is not None:
            raise UserError(f"adapter {name!r} has a gain, which a plain LoRA cannot say; merge it instead")
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = u.A, u.B
        ranks[path] = u.A.shape[0]
    for key, (role, tensor) in handle.tensors(name).items():
        if role == "head":
            tensors[PREFIX + key] = tensor
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}, folder / TENSORS)
        (folder / HEADER).write_text(json.dumps(_config(handle, entry.heads, ranks), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    return folder


def _config(handle: "Adapters", heads: tuple[str, ...], ranks: dict[str, int]) -> dict[str, Any]:
    rank = max(ranks.values())
    pattern = {path: r for path, r in ranks.items() if r != rank}
    config = getattr(handle.model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "modules_to_save": list(heads) or None,
    }
