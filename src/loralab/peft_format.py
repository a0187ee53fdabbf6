"""PEFT's adapter folders (adapter_config.json, adapter_model.safetensors), read. peft_write.py writes them."""

import json
import re
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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
    tensor_headers,
)
from loralab.errors import UserError
from loralab.files import AdapterFile, contents_problems
from loralab.methods import starts
from loralab.methods.base import Factors, ends_in
from loralab.methods.lora import LoRA
from loralab.methods.vera import VeRA
from loralab.peft_methods import CONFIG, METHODS, PROJECTION, ROLES, STARTS, UNSET, as_lora, at_most_full
from loralab.rankmap import LayerRank, RankMap, sized
from loralab.recipe import Recipe, check
from loralab.schema import field_problems, listed, problems, shown
from loralab.update import Update

TENSORS, HEADER = files.PEFT_TENSORS, files.PEFT_HEADER
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<path>.+)\.(?P<name>" + "|".join(map(re.escape, ROLES)) + ")")
TASKS = {  # PEFT's task type -> the mapping of transformers that lists its model classes
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
LABELLED = ("SEQ_CLS", "TOKEN_CLS")  # tasks whose outputs have names
PATTERN_SECONDS = 5.0  # that the patterns of one folder may take
LONGEST_PATTERN = 1000  # characters
PLAIN = re.compile(r"(?:[\w-]|\\?\.)+")  # patterns without repetition, which take no time to match
OF_LORA = ("A", "B", "m")  # roles that PEFT keeps as kernels in a convolution
INSIDE = ".base_layer"  # what PEFT calls a module that it wraps
WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")  # of modules to save: copies of what is there already
VECTORS = ".token_adapter.trainable_tokens_delta"
ONLY_OWN = (
    "its bias setting trained the biases of the adapted layers; here all biases learn if it goes on, those of the "
    "other layers from the base's"
)


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
    """Read a folder of PEFT, of a method that is a row of `peft_methods.METHODS`.

    Raises UserError for what is no such folder or is damaged, and for settings under which the adapter would be another
    function here. Tensors have no checksums in this format, so changed values are not seen.
    """
    stored, place = places(folder)
    config = read_header(place)
    if config.get("peft_type") == "ADALORA":  # its tensors say the rank of each layer
        config = {key: value for key, value in config.items() if key not in ("r", "rank_pattern", "alpha_pattern")}
    check_not_pickled(folder)
    _check_config(place, config)
    headers = tensor_headers(stored)
    _check_ranks(place, config, headers)
    found = _sorted(stored, config)
    tensors, paths = found.tensors, list(found.paths)
    if config["peft_type"] == "ADALORA":
        config, paths = as_lora(config, paths, tensors)
    recipe = _recipe(place, config, paths, tensors)
    if patterns := _of_parameters(config):
        recipe = _undivided(recipe, paths, tensors)
    else:
        _divide_stacks(config, paths, tensors)
        recipe = _smaller(recipe, paths, tensors)
    assert recipe.factors is not None
    _check_projection(folder, recipe.factors, found.projection)
    labels, told = _from_metadata(stored)
    base = {
        **dict.fromkeys(files.BASE),
        "name": config.get("base_model_name_or_path"),
        "class": told.get("class"),
        "task_type": config.get("task_type"),
        "sha256": told.get("base_sha256"),
    }
    file = AdapterFile(
        folder.name or folder.resolve().name, recipe, {p: [p] for p in paths}, list(found.heads), labels, base, tensors,
        starts_anew=bool(starts.added(recipe.start)), parameters=tuple(config.get("target_parameters") or ()),
        patterns=patterns,
        unbiased=tuple(METHODS[config["peft_type"]].unbiased(recipe.factors, paths)),
        notes=(ONLY_OWN,) if str(config.get("bias")).endswith("_only") and found.of_base else (),
        of_base=found.of_base, vectors=_vectors(place, config, found.vectors),
    )  # fmt: skip
    if wrong := contents_problems(file):
        raise UserError(f"{folder}: {'; '.join(wrong)}")
    return file


def check_not_pickled(folder: Path) -> None:
    """Raise UserError for a folder whose tensors are pickled."""
    stored = places(folder)[0]
    if not stored.exists() and (old := folder / "adapter_model.bin").exists():
        raise UserError(_pickled(old, stored))


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
        raise UserError(
            f"{place}: peft_type {shown(kind)} is not read here, only {', '.join(METHODS)}; "
            "loralab.load(model, folder, through_peft=True) has PEFT convert it to a LoRA"
        )
    if strange := [key for key, value in config.items() if key not in CONFIG and value not in UNSET]:
        values = ", ".join(f"{listed([key])}={shown(config[key])}" for key in strange[:6])
        raise UserError(f"{place}: {values} is not read here; merge the adapter with PEFT instead")
    known = {key: value for key, value in config.items() if key in CONFIG}
    if wrong := field_problems(known, CONFIG, optional=CONFIG.keys() - METHODS[kind].needed - {"peft_type"}):
        raise UserError(f"{place}: not a config of PEFT: {'; '.join(wrong)}")


def _check_ranks(place: Path, config: dict[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Raise UserError for a rank beyond the longest side of any tensor, before anything is made of that size."""
    most = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    largest = max((n for header in headers.values() for n in header.shape), default=0)
    if most > largest:
        raise UserError(f"{place}: rank {most}: no side of a tensor in the file is longer than {largest}")


class Sorted(NamedTuple):
    """The tensors of a folder by what they are."""

    tensors: dict[str, Tensor]  # of the adapter and its heads, by loralab's names
    paths: dict[str, None]  # of the layers
    heads: dict[str, None]  # paths of the modules to save
    projection: dict[str, Tensor]  # what all layers share
    of_base: dict[str, Tensor]  # what PEFT loads into the base: its biases, its embeddings
    vectors: dict[str, Tensor]  # path -> vectors of single tokens


def _sorted(place: Path, config: Mapping[str, Any]) -> Sorted:
    """The tensors of a folder, sorted. Raises UserError for what is not known, or given twice."""
    saved, biased = config.get("modules_to_save") or (), config.get("bias") not in (None, False, "none")
    found = Sorted({}, {}, {}, {}, {}, {})
    tensors = found.tensors
    left: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(place).items():
        key = stored.removeprefix(PREFIX)
        if layer := TENSOR.fullmatch(key):
            found.paths[layer["path"]] = None
            key = f"{layer['path']}.{ROLES[layer['name']]}"
            tensor = _flat(tensor, layer["name"])
        elif key in PROJECTION:
            found.projection[PROJECTION[key]] = tensor
            continue
        elif key.endswith(VECTORS):
            found.vectors[key.removesuffix(VECTORS)] = tensor
            continue
        elif re.search(r"\.(lora|vera|ia3|oft)_", key):
            raise UserError(f"{place}: tensor {listed([stored])} is not read here; merge the adapter with PEFT instead")
        elif biased and WRAPPED.search(key):
            continue
        elif (head := _head(key, saved)) is not None:
            found.heads[head] = None
        else:
            left[key] = tensor
            continue
        if key in tensors:
            raise UserError(f"{place}: {listed([key])} is given twice, with and without {PREFIX!r}")
        tensors[key] = tensor
    for key, tensor in left.items():
        top = key.partition(".")[0]
        own = (
            INSIDE in key
            or (biased and key.endswith(".bias"))
            or any(f"{p}.".startswith(f"{top}.") for p in found.paths)
        )
        if own:
            found.of_base[key.replace(INSIDE, "")] = tensor
        else:
            found.heads[top], tensors[key] = None, tensor
    return found


def _vectors(
    place: Path, config: Mapping[str, Any], found: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Path -> (tokens, their vectors), the tokens as trainable_token_indices has them. Raises UserError."""
    given = config.get("trainable_token_indices") or {}
    vectors = {}
    for path, tensor in found.items():
        own = given if isinstance(given, list) else next((g for name, g in given.items() if ends_in(path, name)), [])
        if tensor.ndim != 2 or len(own) != len(tensor) or len(set(own)) != len(own):
            raise UserError(
                f"{place}: trainable_token_indices has {len(own)} tokens for {listed([path])}, whose vectors are "
                f"{tuple(tensor.shape)}: expected one row for each of them, and no token twice"
            )
        vectors[path] = (tuple(own), tensor)
    return vectors


def _flat(tensor: Tensor, name: str) -> Tensor:
    """A (r, in * k1 * ...), B (out, r) or m (out,) of a convolution, which PEFT keeps as kernels; else the tensor."""
    if tensor.ndim < 3 or ROLES[name] not in OF_LORA:
        return tensor
    return tensor.flatten() if ROLES[name] == "m" else tensor.flatten(1)


def _head(key: str, saved: Collection[str]) -> str | None:
    """The module of modules_to_save that holds a tensor: PEFT takes every module whose path ends in such a name."""
    parts = key[: files.LONGEST_NAME].split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts))]
    named = [path for path in paths if any(ends_in(path, name) for name in saved)]
    if len(named) > 1:
        raise UserError(
            f"modules_to_save has {listed([named[1]])} and {listed([named[0]])} around it, and PEFT's file does not "
            "say of which of the two a tensor is; merge the adapter with PEFT instead"
        )
    return named[0] if named else None


def _divide_stacks(config: dict[str, Any], paths: list[str], tensors: dict[str, Tensor]) -> None:
    """Give the tensors of stacks of experts their axis of experts; to PEFT a stack is a parameter."""
    for path in paths if config.get("target_parameters") else ():
        divide(path, config["r"], tensors)


def divide(path: str, r: int, tensors: dict[str, Tensor]) -> None:
    """Make A (n r, in) and B (out, r n) of a stack of n experts A (n, r, in) and B (n, out, r)."""
    A, B = tensors.get(f"{path}.A"), tensors.get(f"{path}.B")
    if A is None or B is None or A.ndim != 2 or B.ndim != 2 or len(A) == r or len(A) % r or len(A) != B.shape[1]:
        return
    tensors[f"{path}.A"] = A.unflatten(0, (-1, r))  # (n, r, in)
    tensors[f"{path}.B"] = B.unflatten(1, (r, -1)).permute(2, 0, 1).contiguous()  # (n, out, r)


def _of_parameters(config: dict[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """rank_pattern and alpha_pattern, where they may be for parameters, whose names a model tells; else None."""
    patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return patterns if config.get("target_parameters") and any(patterns) else None


def _undivided(r: Recipe, paths: Sequence[str], tensors: Mapping[str, Tensor]) -> Recipe:
    """The recipe at the ranks of the tensors as they are, until a model tells which of them are of stacks."""
    layers = {} if r.ranks is None else dict(r.ranks.layers)
    for path in paths:
        A = tensors.get(f"{path}.A")
        if A is not None and A.ndim == 2 and len(A):
            layers[path] = replace(layers[path], rank=len(A))
    return check(replace(r, ranks=RankMap(layers)))


def _recipe(place: Path, config: dict[str, Any], paths: list[str], tensors: dict[str, Tensor]) -> Recipe:
    start = _start(place, config)
    dropout = float(config.get("lora_dropout") or config.get("vera_dropout") or config.get("miss_dropout") or 0)
    try:
        factors = METHODS[config["peft_type"]].factors(config, paths, tensors)
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
        u, before = at_most_full(Update(A, B)), sized(r.factors, layers[path])
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
            "loralab.load(model, folder, through_peft=True) has PEFT make it, or save it with PEFT's "
            "path_initial_model_for_weight_conversion=..., which makes a plain LoRA of it"
        )
    return STARTS[start]


def _ranks(config: dict[str, Any], paths: list[str]) -> RankMap | None:
    """rank_pattern and alpha_pattern as a map."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return RankMap(own_ranks(ranks, alphas, config["r"], paths)) if ranks or alphas else None


def own_ranks(
    ranks: Mapping[str, Any], alphas: Mapping[str, Any], rank: int, paths: Sequence[str]
) -> dict[str, LayerRank]:
    """Path -> its rank and alpha: of the patterns that match the end of a path, the first one counts; else `rank`."""
    deadline = time.monotonic() + PATTERN_SECONDS
    own_rank, own_alpha = _first_match(ranks, paths, deadline), _first_match(alphas, paths, deadline)
    layers = {}
    for path in paths:
        alpha = own_alpha.get(path)
        layers[path] = LayerRank(own_rank.get(path, rank), alpha=None if alpha is None else float(alpha))
    return layers


def _first_match(patterns: Mapping[str, Any], paths: Sequence[str], deadline: float) -> dict[str, Any]:
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
    """(labels, other texts) that `peft_write` leaves beside the tensors, as PEFT has no place for them."""
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
