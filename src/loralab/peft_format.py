"""PEFT's adapter folders (adapter_config.json, adapter_model.safetensors): read them, and write what others read.

A low-rank update can be written as a LoRA of scaling 1, with a gain as a DoRA: both say the same function.
"""

import json
import re
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from loralab import files
from loralab.disk import (
    TensorHeader,
    newest,
    read_header,
    read_metadata,
    read_tensors,
    replacing_both,
    tensor_headers,
    write_json,
    write_tensors,
)
from loralab.errors import UserError
from loralab.files import AdapterFile, contents_problems, one_layout
from loralab.methods import starts
from loralab.methods.base import Factors
from loralab.methods.loha import LoHa
from loralab.methods.lora import LoRA
from loralab.methods.miss import MiSS
from loralab.methods.vera import VeRA
from loralab.rankmap import LayerRank, RankMap, sized
from loralab.recipe import Recipe, check
from loralab.schema import field_problems, listed, problems, shown
from loralab.update import Dense, Update

TENSORS, HEADER = files.PEFT_TENSORS, files.PEFT_HEADER
PREFIX = "base_model.model."
ROLES = {  # PEFT's name of a tensor in a layer -> role
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
    "hada_w1_a": "B1",
    "hada_w1_b": "A1",
    "hada_w2_a": "B2",
    "hada_w2_b": "A2",
    "miss_block": "D",
    "vera_lambda_d": "d",
    "vera_lambda_b": "b",
}
PROJECTION = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
TENSOR = re.compile(r"(?P<path>.+)\.(?P<name>" + "|".join(map(re.escape, ROLES)) + ")")
NAMES, SETTINGS = str | list[str] | None, dict[str, Any] | None
CONFIG: dict[str, Any] = {  # settings that are read, or do not change what the tensors mean; any other must be unset
    "peft_type": str, "task_type": str | None, "auto_mapping": SETTINGS, "peft_version": str | None,
    "base_model_name_or_path": str | None, "revision": str | None, "inference_mode": bool | None,
    "r": int, "lora_alpha": float, "rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None, "use_dora": bool | None, "init_lora_weights": bool | str | None,
    "lora_dropout": float | None, "target_modules": NAMES, "exclude_modules": NAMES,
    "layers_to_transform": int | list[int] | None, "layers_pattern": NAMES, "modules_to_save": list[str] | None,
    "fan_in_fan_out": bool | None, "megatron_core": str | None, "runtime_config": SETTINGS,
    "qalora_group_size": int | None, "loftq_config": SETTINGS, "eva_config": SETTINGS, "projection_prng_key": int,
    "save_projection": bool | None, "vera_dropout": float | None, "d_initial": float | None,
    "init_weights": bool | None, "alpha": float, "use_effective_conv2d": bool | None, "mini_r": int,
    "rank_dropout": float | None, "miss_dropout": float | None,
}  # fmt: skip
NEEDED = {
    "LORA": {"peft_type", "r", "lora_alpha"},
    "VERA": {"peft_type", "r", "projection_prng_key"},
    "LOHA": {"peft_type", "r", "alpha"},
    "MISS": {"peft_type", "r"},
}
UNSET: tuple[Any, ...] = (None, False, "none", {}, [])
# init_lora_weights -> start; those that move PEFT's base are taken away here, from the same rule over the same weight
STARTS = {str(plain): "kaiming" for plain in (True, False, None, "gaussian", "orthogonal", "eva")}
STARTS |= {"pissa": "pissa", "olora": "olora"}
METHODS: dict[str, Callable[[dict[str, Any]], Factors]] = {  # peft_type -> config -> factors
    "LORA": lambda c: LoRA(rank=c["r"], alpha=float(c["lora_alpha"]), stabilized=bool(c.get("use_rslora"))),
    "LOHA": lambda c: LoHa(rank=c["r"], alpha=float(c["alpha"])),
    "MISS": lambda c: MiSS(rank=c["r"]),
    "VERA": lambda c: VeRA(rank=c["r"], projection_seed=c["projection_prng_key"], source="peft"),
}
TASKS = {  # PEFT's task type -> the mapping of transformers that lists its model classes
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose adapters PEFT expects to have a head of their own
LABELLED = ("SEQ_CLS", "TOKEN_CLS")  # tasks whose outputs have names
PATTERN_SECONDS = 5.0  # that the patterns of one folder may take
LONGEST_PATTERN = 1000  # characters
PLAIN = re.compile(r"(?:[\w-]|\\?\.)+")  # patterns without repetition, which take no time to match
VLLM_RANK = 16  # the largest rank that vLLM takes unless it is told to take more


@cache
def task_type(model_class: str) -> str | None:
    """What PEFT calls the task of a model class of transformers; None for a class of none of its tasks."""
    from transformers.models.auto import modeling_auto  # slow to import, and needed only when folders are written

    for task, mapping in TASKS.items():
        for names in getattr(modeling_auto, mapping).values():
            if model_class in ((names,) if isinstance(names, str) else names):
                return task
    return None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path) -> AdapterFile:
    """Read a LoRA, rsLoRA, DoRA, VeRA, PiSSA or OLoRA folder of PEFT.

    Raises UserError for what is no such folder or is damaged, and for settings under which the adapter would be another
    function here. Tensors have no checksums in this format, so changed values are not seen.
    """
    stored, place = places(folder)
    config = read_header(place)
    if not stored.exists() and (old := folder / "adapter_model.bin").exists():
        raise UserError(_pickled(old, stored))
    _check_config(place, config)
    headers = tensor_headers(stored)
    _check_ranks(place, config, headers)
    tensors, paths, heads, projection = _sorted(stored, config.get("modules_to_save") or ())
    recipe = _smaller(_recipe(place, config, paths), paths, tensors)
    assert recipe.factors is not None
    _check_projection(folder, recipe.factors, projection)
    labels, told = _from_metadata(stored)
    base = {
        **dict.fromkeys(files.BASE),
        "name": config.get("base_model_name_or_path"),
        "class": told.get("class"),
        "task_type": config.get("task_type"),
        "sha256": told.get("base_sha256"),
    }
    file = AdapterFile(
        folder.name or folder.resolve().name, recipe, {path: [path] for path in paths}, heads, labels, base, tensors,
        starts_anew=bool(starts.added(recipe.start)),
    )  # fmt: skip
    if wrong := contents_problems(file):
        raise UserError(f"{folder}: {'; '.join(wrong)}")
    return file


def _pickled(old: Path, new: Path) -> str:
    """What to tell of pickled tensors: the command for a user who trusts them."""
    script = (
        f"import torch, safetensors.torch as s; s.save_file(torch.load({str(old)!r}, weights_only=True), {str(new)!r})"
    )
    return (
        f"{old} is pickled and could run code, so it is not read here; if you trust it: python -c {shlex.quote(script)}"
    )


def _check_config(place: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless a config has the types of PEFT's, and only settings that are read here."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        raise UserError(f"{place}: peft_type {shown(kind)} is not read here, only {', '.join(METHODS)}")
    if strange := [key for key, value in config.items() if key not in CONFIG and value not in UNSET]:
        values = ", ".join(f"{listed([key])}={shown(config[key])}" for key in strange[:6])
        raise UserError(f"{place}: {values} is not read here; merge the adapter with PEFT instead")
    known = {key: value for key, value in config.items() if key in CONFIG}
    if wrong := field_problems(known, CONFIG, optional=CONFIG.keys() - NEEDED[kind]):
        raise UserError(f"{place}: not a config of PEFT: {'; '.join(wrong)}")


def _check_ranks(place: Path, config: dict[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Raise UserError for a rank beyond the longest side of any tensor, before anything is made of that size."""
    most = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    largest = max((n for header in headers.values() for n in header.shape), default=0)
    if most > largest:
        raise UserError(f"{place}: rank {most}: no side of a tensor in the file is longer than {largest}")


def _sorted(place: Path, saved: Collection[str]) -> tuple[dict[str, Tensor], list[str], list[str], dict[str, Tensor]]:
    """(tensors by loralab's names, paths of the layers, paths of the heads, the tensors of a shared projection).

    `saved` are the names in modules_to_save.
    """
    tensors: dict[str, Tensor] = {}
    paths: dict[str, None] = {}
    heads: dict[str, None] = {}
    projection: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(place).items():
        key = stored.removeprefix(PREFIX)
        if layer := TENSOR.fullmatch(key):
            paths[layer["path"]] = None
            key = f"{layer['path']}.{ROLES[layer['name']]}"
            tensor = _flat(tensor, layer["name"])
        elif key in PROJECTION:
            projection[PROJECTION[key]] = tensor
            continue
        elif re.search(r"\.(lora|vera)_", key):
            raise UserError(f"{place}: tensor {listed([stored])} is not read here; merge the adapter with PEFT instead")
        else:
            heads[_head(key, saved)] = None
        if key in tensors:
            raise UserError(f"{place}: {listed([key])} is given twice, with and without {PREFIX!r}")
        tensors[key] = tensor
    return tensors, list(paths), list(heads), projection


def _flat(tensor: Tensor, name: str) -> Tensor:
    """A (r, in * k1 * ...), B (out, r) or m (out,) of a convolution, which PEFT keeps as kernels; else the tensor."""
    if tensor.ndim < 3:
        return tensor
    return tensor.flatten() if ROLES[name] == "m" else tensor.flatten(1)


def _head(key: str, saved: Collection[str]) -> str:
    """The module of modules_to_save that holds a tensor: PEFT takes every module whose path ends in such a name."""
    parts = key[: files.LONGEST_NAME].split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts))]
    named = (path for path in paths for name in saved if path == name or path.endswith(f".{name}"))
    return next(named, parts[0])


def _recipe(place: Path, config: dict[str, Any], paths: list[str]) -> Recipe:
    start = _start(place, config)
    dropout = float(config.get("lora_dropout") or config.get("vera_dropout") or config.get("miss_dropout") or 0)
    try:
        factors = METHODS[config["peft_type"]](config)
        return check(Recipe(factors, start, bool(config.get("use_dora")), dropout=dropout, ranks=_ranks(config, paths)))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _smaller(r: Recipe, paths: Sequence[str], tensors: dict[str, Tensor]) -> Recipe:
    """The recipe with no rank above the sides of its layer; `tensors` become the same updates at these ranks."""
    if not isinstance(r.factors, LoRA):
        return r
    layers = {path: LayerRank(r.factors.rank) for path in paths} if r.ranks is None else dict(r.ranks.layers)
    found = False
    for path in paths:
        A, B = tensors.get(f"{path}.A"), tensors.get(f"{path}.B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or not min(len(B), A.shape[1]) < len(A) == B.shape[1]:
            continue
        u, before = _fitting(Update(A, B)), sized(r.factors, layers[path])
        rank = len(u.A)
        one = sized(r.factors, LayerRank(rank, alpha=1.0))
        layers[path] = LayerRank(rank, alpha=before.scaling / one.scaling)  # type: ignore[attr-defined]
        tensors[f"{path}.A"], tensors[f"{path}.B"] = u.A.contiguous(), u.B.contiguous()
        found = True
    return check(replace(r, ranks=RankMap(layers))) if found else r


def _start(place: Path, config: dict[str, Any]) -> str:
    """The start of a file's adapter. Raises UserError for one that changes the base in a way unknown here."""
    start = str(config.get("init_lora_weights", True))
    if start not in STARTS or (start == "olora" and config.get("fan_in_fan_out")):  # it reads Conv1D transposed
        raise UserError(
            f"{place}: init_lora_weights={shown(start)} changes the base in a way that is not made again here; "
            "save it with PEFT's path_initial_model_for_weight_conversion=..., which makes a plain LoRA of it"
        )
    return STARTS[start]


def _ranks(config: dict[str, Any], paths: list[str]) -> RankMap | None:
    """rank_pattern and alpha_pattern as a map: of the patterns that match the end of a path, the first one counts."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return None
    deadline = time.monotonic() + PATTERN_SECONDS
    own_rank, own_alpha = _first_match(ranks, paths, deadline), _first_match(alphas, paths, deadline)
    layers = {}
    for path in paths:
        alpha = own_alpha.get(path)
        layers[path] = LayerRank(own_rank.get(path, config["r"]), alpha=None if alpha is None else float(alpha))
    return RankMap(layers)


def _first_match(patterns: Mapping[str, Any], paths: list[str], deadline: float) -> dict[str, Any]:
    """Path -> the value of the first pattern that matches it, as PEFT matches.

    A regular expression of a file can take for ever, so all that could are run under a deadline. Raises UserError.
    """
    matched: dict[str, Any] = {}
    for pattern, value in patterns.items():
        if len(pattern) > LONGEST_PATTERN:
            raise UserError(f"a pattern has {len(pattern)} characters: expected at most {LONGEST_PATTERN}")
        whole = rf"(.*\.)?({pattern})$"
        try:
            plain = PLAIN.fullmatch(pattern) is not None
            compiled: Any = re.compile(whole) if plain else regex.compile(whole)
            for path in paths:
                if path in matched:
                    continue
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if compiled.match(path) if plain else compiled.match(path, timeout=left):
                    matched[path] = value
        except TimeoutError as error:
            raise UserError(
                f"the patterns of ranks and alphas take longer than {PATTERN_SECONDS:.0f} s to match, the last was "
                f"{listed([pattern])}: name the layers instead"
            ) from error
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"not a config of PEFT: pattern {listed([pattern])} ({error})") from error
    return matched


def _check_projection(folder: Path, factors: Factors, stored: dict[str, Tensor]) -> None:
    """Raise UserError for a folder whose projection this machine's generator does not draw again."""
    if not stored:
        return
    shapes = {role: tuple(t.shape) for role, t in sorted(stored.items())}
    fits = (
        isinstance(factors, VeRA) and list(shapes) == ["A", "B"] and all(len(shape) == 2 for shape in shapes.values())
    )
    if not fits or not shapes["A"][0] == shapes["B"][1] == factors.rank:  # type: ignore[attr-defined]
        raise UserError(f"{folder / TENSORS}: a projection of {shapes}: expected A (r, in) and B (out, r) of its rank")
    drawn = factors.constants([(shapes["B"][0], shapes["A"][1])])
    if not all(t.dtype == drawn[role].dtype and torch.equal(t, drawn[role]) for role, t in stored.items()):
        raise UserError(f"{folder / TENSORS}: its projection is not the one that its seed draws here")


def _from_metadata(place: Path) -> tuple[list[str], dict[str, str]]:
    """(labels, other texts) that `write` leaves beside the tensors, as PEFT has no place for them."""
    metadata = read_metadata(place)
    try:
        labels = json.loads(metadata.get("labels", "[]"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: the labels in its metadata cannot be read") from error
    if wrong := problems(labels, list[str], "labels"):
        raise UserError(f"{place}: metadata: {'; '.join(wrong)}")
    return labels, metadata


def places(folder: Path) -> tuple[Path, Path]:
    """Where an adapter of PEFT's layout has its tensors and its config, also after a save that was cut off."""
    return newest(folder / TENSORS, folder / HEADER)


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(
    folder: Path | str,
    updates: Mapping[str, Update | Dense],
    gains: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    heads: Sequence[str],
    base: Mapping[str, Any],
    labels: Sequence[str] = (),
    sides: Mapping[str, tuple[int, ...] | None] | None = None,
) -> Path:
    """Write a PEFT LoRA or DoRA folder: ranks may differ by layer, the scaling is folded into B.

    `updates`: path -> the lowered update of that layer, which must be low-rank; `gains`: path -> m (out,) where the
    method has a gain; `head`: key -> tensor of the modules `heads`; `base`: name, class, task_type and sha256 of the
    base; `sides`: path -> what `kinds.sides` says of the layer, where it is no product.
    Raises UserError if the folder cannot be written or holds an adapter in loralab's layout, and for values that are
    not finite.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, update in updates.items():
        assert isinstance(update, Update)
        u = _fitting(update)
        own = _shaped({"A": u.A, "B": u.B, "m": gains.get(path)}, (sides or {}).get(path))
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in own.items() if tensor is not None}
        ranks[path] = u.A.shape[0]
    tensors |= {PREFIX + key: tensor for key, tensor in head.items()}
    folder = Path(folder)
    one_layout(folder, files.TENSORS, files.HEADER)
    if odd := [key for key, t in tensors.items() if not t.isfinite().all()]:
        raise UserError(f"the adapter cannot be exported: values that are not finite: {listed(odd)}")
    config = {**_config(base, heads, ranks), "use_dora": bool(gains)}
    metadata = {"format": "pt", "labels": json.dumps(list(labels)), "class": base.get("class")}
    metadata["base_sha256"] = base.get("sha256")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_both(folder / TENSORS, folder / HEADER) as (first, last):
            write_tensors(first, tensors, {key: text for key, text in metadata.items() if text is not None})
            write_json(last, config)
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    return folder


def _shaped(roles: Mapping[str, Any], sides: tuple[int, ...] | None) -> dict[str, Tensor | None]:
    """PEFT's name -> A (r, in), B (out, r) and m (out,) in the shapes that PEFT gives them in such a layer."""
    A, B, m = (roles[role] for role in ("A", "B", "m"))
    if sides == ():
        return {"lora_embedding_A": A, "lora_embedding_B": B, "lora_magnitude_vector": m}
    if sides is not None:
        ones = (1,) * (len(sides) - 1)
        A, B, m = A.unflatten(1, sides), B.reshape(*B.shape, *ones), None if m is None else m.reshape(1, -1, *ones)
    return {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}


def _fitting(u: Update) -> Update:
    """The same update at no higher a rank than its matrix (out, in) can have, as some methods stack several pairs."""
    (rank, columns), rows = u.A.shape, len(u.B)
    if rank <= min(rows, columns):
        return u
    D = u.matrix()  # (out, in)
    eye = torch.eye(min(rows, columns), dtype=D.dtype, device=D.device)
    return u._replace(A=D, B=eye) if rows <= columns else u._replace(A=eye, B=D)


def _config(base: Mapping[str, Any], heads: Sequence[str], ranks: dict[str, int]) -> dict[str, Any]:
    rank = max(ranks.values())
    ends = {path: [other for other in ranks if other.endswith(f".{path}")] for path in ranks}
    # PEFT takes the first key that matches the end of a path, so a path that is the end of another one is anchored
    apart = {path for path, others in ends.items() if any(ranks[other] != ranks[path] for other in others)}
    pattern = {f"^{path}" if path in apart else path: r for path, r in ranks.items() if r != rank or path in apart}
    return {
        "peft_type": "LORA",
        "task_type": None if not heads and base.get("task_type") in HEADED else base.get("task_type"),
        "base_model_name_or_path": base.get("name"),
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


def vllm_notes(folder: Path) -> list[str]:
    """What vLLM refuses, or must be told, of an adapter in PEFT's layout."""
    config = read_header(places(folder)[1])
    notes = []
    if config.get("use_dora"):
        notes.append("vLLM refuses DoRA (use_dora): merge the adapter for it instead")
    if config.get("modules_to_save"):
        notes.append("vLLM refuses a head in an adapter (modules_to_save): merge the adapter for it instead")
    if not notes and config["r"] > VLLM_RANK:
        notes.append(f"vLLM needs --max-lora-rank {config['r']} or more, as its default is {VLLM_RANK}")
    return notes
