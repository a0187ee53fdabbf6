"""PEFT's adapter folders (adapter_config.json, adapter_model.safetensors): read them, and write what others read.

A low-rank update can be written as a LoRA of scaling 1, with a gain as a DoRA: both say the same function.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.disk import read_header, read_tensors, write_json, write_tensors
from loralab.errors import UserError
from loralab.files import AdapterFile
from loralab.methods import starts
from loralab.methods.base import Factors
from loralab.methods.lora import LoRA
from loralab.methods.vera import VeRA
from loralab.rankmap import LayerRank, RankMap
from loralab.recipe import Recipe, check
from loralab.update import Dense, Update

TENSORS, HEADER = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
ROLES = {  # PEFT's name of a tensor in a layer -> role
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "m",
    "vera_lambda_d": "d",
    "vera_lambda_b": "b",
}
PROJECTION = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
TENSOR = re.compile(r"(?P<path>.+)\.(?P<name>" + "|".join(map(re.escape, ROLES)) + ")")
# settings that are read, or that say nothing of what the tensors do; any other that is set is refused
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    "megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config", "projection_prng_key",
    "save_projection", "vera_dropout", "d_initial", "init_weights",
}  # fmt: skip
UNSET: tuple[Any, ...] = (None, False, "none", {}, [])
# init_lora_weights -> start; those that move PEFT's base are taken away here, from the same rule over the same weight
STARTS = {str(plain): "kaiming" for plain in (True, False, None, "gaussian", "orthogonal", "eva")}
STARTS |= {"pissa": "pissa", "olora": "olora"}
KINDS: dict[str, Callable[[dict[str, Any]], Factors]] = {  # peft_type -> config -> factors
    "LORA": lambda c: LoRA(rank=c["r"], alpha=float(c["lora_alpha"]), stabilized=bool(c.get("use_rslora"))),
    "VERA": lambda c: VeRA(rank=c["r"], projection_seed=c["projection_prng_key"], source="peft"),
}


def read(folder: Path) -> AdapterFile:
    """A LoRA, rsLoRA, DoRA, VeRA, PiSSA or OLoRA folder of PEFT; UserError for what would be another function here."""
    config = read_header(folder / HEADER)
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise UserError(f"{folder / HEADER}: peft_type {kind!r} is not read here, only {', '.join(KINDS)}")
    tensors: dict[str, Tensor] = {}
    paths: dict[str, None] = {}
    heads: dict[str, None] = {}
    projection: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder / TENSORS).items():
        key = key.removeprefix(PREFIX)
        if found := TENSOR.fullmatch(key):
            paths[found["path"]] = None
            tensors[f"{found['path']}.{ROLES[found['name']]}"] = tensor
        elif key in PROJECTION:
            projection[PROJECTION[key]] = tensor
        else:
            heads[key.split(".")[0]] = None
            tensors[key] = tensor
    recipe = _recipe(folder, config, list(paths))
    assert recipe.factors is not None
    _check_projection(folder, recipe.factors, projection)
    base = {"name": config.get("base_model_name_or_path"), "sha256": None}
    name, anew = folder.name or "peft", bool(starts.added(recipe.start))
    coverage = {path: [path] for path in paths}
    return AdapterFile(name, recipe, coverage, list(heads), [], base, tensors, starts_anew=anew)


def _recipe(folder: Path, config: dict[str, Any], paths: list[str]) -> Recipe:
    start = _start(folder, config)
    try:
        factors, gain = KINDS[config["peft_type"]](config), bool(config.get("use_dora"))
        dropout = float(config.get("lora_dropout") or config.get("vera_dropout") or 0)
        return check(Recipe(factors, start, gain, dropout=dropout, ranks=_ranks(config, paths)))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{folder / HEADER}: not a config of PEFT ({type(error).__name__}: {error})") from error


def _start(folder: Path, config: dict[str, Any]) -> str:
    """The start of a file's adapter; UserError for settings under which it is not the plain method read here."""
    if strange := [key for key, value in config.items() if key not in KNOWN and value not in UNSET]:
        told = ", ".join(f"{key}={config[key]!r}" for key in strange)
        raise UserError(f"{folder / HEADER}: {told} is not read here; merge the adapter with PEFT instead")
    begun = str(config.get("init_lora_weights", True))
    if begun not in STARTS or (begun == "olora" and config.get("fan_in_fan_out")):  # it reads Conv1D transposed
        raise UserError(
            f"{folder / HEADER}: init_lora_weights={begun!r} changes the base in a way that is not made again here; "
            "save it with PEFT's path_initial_model_for_weight_conversion=..., which makes a plain LoRA of it"
        )
    return STARTS[begun]


def _ranks(config: dict[str, Any], paths: list[str]) -> RankMap | None:
    """rank_pattern and alpha_pattern as a map: of the patterns that match the end of a path, the first one counts."""

    def of(patterns: dict[str, Any], path: str, otherwise: Any) -> Any:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)

    rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not rank_pattern and not alpha_pattern:
        return None
    alphas = {path: of(alpha_pattern, path, None) for path in paths}
    return RankMap(
        {
            path: LayerRank(of(rank_pattern, path, config["r"]), alpha=None if alpha is None else float(alpha))
            for path, alpha in alphas.items()
        }
    )


def _check_projection(folder: Path, factors: Factors, stored: dict[str, Tensor]) -> None:
    """Refuses a file whose projection this machine's generator does not draw again."""
    if stored:
        drawn = factors.constants([(stored["B"].shape[0], stored["A"].shape[1])])
        if not all(torch.equal(stored[role], drawn[role]) for role in stored):
            raise UserError(f"{folder / TENSORS}: its projection is not the one that its seed draws here")


def write(
    folder: Path | str,
    updates: Mapping[str, Update | Dense],
    gains: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    heads: Sequence[str],
    base: str | None,
) -> Path:
    """Write a PEFT LoRA or DoRA folder: ranks may differ by layer, the scaling is folded into B.

    `updates`: path -> the lowered update of that layer, which must be low-rank; `gains`: path -> m (out,) where the
    method has a gain; `head`: key -> tensor of the modules `heads`; `base` is the name of the base model.
    Raises UserError if the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, update in updates.items():
        assert isinstance(update, Update)
        u = _fitting(update)
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = u.A, u.B
        ranks[path] = u.A.shape[0]
    tensors |= {f"{PREFIX}{path}.lora_magnitude_vector": m for path, m in gains.items()}
    tensors |= {PREFIX + key: tensor for key, tensor in head.items()}
    config = {**_config(base, heads, ranks), "use_dora": bool(gains)}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS, tensors)
        write_json(folder / HEADER, config)
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    return folder


def _fitting(u: Update) -> Update:
    """The same update at no higher a rank than its matrix (out, in) can have, as some methods stack several pairs."""
    (rank, columns), rows = u.A.shape, len(u.B)
    if rank <= min(rows, columns):
        return u
    D = u.matrix()
    eye = torch.eye(min(rows, columns), dtype=D.dtype, device=D.device)
    return u._replace(A=D, B=eye) if rows <= columns else u._replace(A=eye, B=D)


def _config(base: str | None, heads: Sequence[str], ranks: dict[str, int]) -> dict[str, Any]:
    rank = max(ranks.values())
    pattern = {path: r for path, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else None,
        "base_model_name_or_path": base,
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
