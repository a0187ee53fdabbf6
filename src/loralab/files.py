"""Adapter folders: adapter.safetensors and adapter.json, which together carry all that an adapter needs.

This file turns such a folder into values and back; it knows no model. Whether they fit a model is checked in
fitting.py, PEFT's folders are read by peft_format.py. SECURITY.md says what is checked, and against what.

adapter.json records dtype, shape and sha256 of every tensor, and sha256 of each of its own fields, so that damage and
edits are seen. Folders of loralab 0.1.0 (version 1) have no such record and load with a note.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from loralab.disk import (
    TensorHeader,
    newest,
    read_header,
    read_tensors,
    replacing_both,
    tensor_headers,
    write_json,
    write_tensors,
)
from loralab.errors import UserError
from loralab.hashes import tensor_sha256
from loralab.methods import starts
from loralab.rankmap import LayerRank
from loralab.recipe import FACTORS, OLD_FIELDS, Recipe, from_json, to_json
from loralab.schema import field_problems, fields_of, listed, problems, shown

FORMAT, VERSION, OLD = "loralab adapter", 2, 1
TENSORS, HEADER = "adapter.safetensors", "adapter.json"
TASK = "task.json"  # what the adapter was trained to do, where a run wrote the folder
CHECKPOINT, INSIDE = "model.safetensors", "loralab/"  # where a checkpoint has its tensors, under loralab/NAME/
PEFT_TENSORS, PEFT_HEADER = "adapter_model.safetensors", "adapter_config.json"  # a folder holds one layout only
NO_CHECKSUMS = (
    "saved by loralab 0.1.0, without checksums, so damage to its files would not be seen; load it and save it again to "
    "add them"
)

LONGEST_NAME = 1000  # characters of the path of a module
NAMES = list[str]
FIELDS: dict[str, Any] = {  # of adapter.json
    "format": str,
    "version": int,
    "name": str,
    "recipe": dict,
    "scaling": float | dict[str, float] | None,  # what B is multiplied by, for readers of other tools
    "coverage": dict[str, NAMES],  # target pattern -> layers
    "head": NAMES,
    "labels": NAMES,
    "roles": dict[str, str],  # tensor -> role
    "counts": dict[str, int],
    "constants": str | None,
    "checkpoint": bool,  # whether the tensors are in CHECKPOINT
    "base": dict,
    "tensors": dict[str, Any],  # tensor -> RECORD
    "sha256": dict[str, str],  # every other field -> sha256 of its JSON
}
NEW_FIELDS = ("tensors", "sha256")  # version 1 has none of them
OPTIONAL = {1: ("scaling", "roles", "counts", "constants", "checkpoint"), 2: ("checkpoint",)}  # version -> fields
RECORD: dict[str, Any] = {"dtype": str, "shape": list[int], "sha256": str}
BASE: dict[str, Any] = dict.fromkeys(("name", "model_type", "class", "task_type", "sha256"), str | None)


class FolderNote(UserWarning):
    """What a user should know of an adapter folder that was loaded."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as a folder holds it, apart from any model."""

    name: str
    recipe: Recipe
    coverage: Mapping[str, list[str]]  # target pattern -> paths of the layers adapted
    heads: list[str]
    labels: list[str]
    base: dict[str, Any]  # the keys of BASE; None: the folder does not say
    tensors: dict[str, Tensor]  # path.role -> tensor
    roles: Mapping[str, str] = field(default_factory=dict)  # path.role -> role
    counts: Mapping[str, int] = field(default_factory=dict)
    constants: str | None = None  # sha256 of what the method's seed draws
    starts_anew: bool = False  # the file lacks what its start adds (A0, B0): it is made again, from the base
    notes: tuple[str, ...] = ()  # what a user should know of the folder
    parameters: tuple[
        str, ...
    ] = ()  # PEFT's names of parameters that it adapts; the layers have no names of theirs yet
    patterns: tuple[Mapping[str, Any], Mapping[str, Any]] | None = (
        None  # PEFT's of ranks and of alphas, where `parameters` go by them
    )
    unbiased: tuple[str, ...] = ()  # layers that must have no bias: PEFT's adapter would change it
    of_base: Mapping[str, Tensor] = field(default_factory=dict)  # what PEFT loads into the base: path.name -> tensor
    vectors: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)  # path -> tokens, (k, width)

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers."""
        return list(dict.fromkeys(path for paths in self.coverage.values() for path in paths))


def write(file: AdapterFile, folder: Path | str, beside: Mapping[str, Tensor] | None = None) -> Path:
    """Write an adapter with its head, recipe, scaling, labels, coverage and the base's hash; return the folder.

    With `beside` the folder is a checkpoint: its tensors lie in model.safetensors, among these others.
    Raises UserError if the folder cannot be written or holds an adapter in PEFT's layout, and for an adapter that could
    not be read again, such as one with values that are not finite.
    """
    folder = Path(folder)
    one_layout(folder, PEFT_TENSORS, PEFT_HEADER)
    if wrong := contents_problems(file):
        raise UserError(f"adapter {file.name!r} cannot be saved: {'; '.join(wrong)}")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": file.name,
        "recipe": to_json(file.recipe),
        "scaling": _scaling(file.recipe),
        "coverage": dict(file.coverage),
        "head": list(file.heads),
        "labels": list(file.labels),
        "roles": dict(file.roles),
        "counts": dict(file.counts),
        "constants": file.constants,
        **({} if beside is None else {"checkpoint": True}),
        "base": file.base,
    }
    start = "" if beside is None else f"{INSIDE}{file.name}/"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_both(folder / (CHECKPOINT if start else TENSORS), folder / HEADER) as (tensors, last):
            write_tensors(tensors, {start + key: t for key, t in file.tensors.items()} | dict(beside or {}))
            written = tensor_headers(tensors)
            header["tensors"] = {
                key: {"dtype": written[start + key].dtype, "shape": list(t.shape), "sha256": tensor_sha256(t)}
                for key, t in file.tensors.items()
            }
            write_json(last, sealed(header))
        if start:
            (folder / TENSORS).unlink(missing_ok=True)  # of an earlier save
    except OSError as error:
        raise UserError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    return folder


def places(folder: Path) -> tuple[Path, Path]:
    """Where an adapter of loralab's layout has its tensors and its header, also after a save that was cut off."""
    return newest(folder / TENSORS, folder / HEADER)


def one_layout(folder: Path, tensors: str, header: str) -> None:
    """Raise UserError if a folder holds files of another layout: it would hold two adapters, and be read as one."""
    if found := [place.name for place in newest(folder / tensors, folder / header) if place.exists()]:
        raise UserError(
            f"{folder} holds an adapter in another layout ({', '.join(found)}): choose another folder, or remove "
            "these files first"
        )


def read(folder: Path | str) -> AdapterFile:
    """Read an adapter folder in loralab's layout.

    Raises UserError, with every problem of a kind at once, for anything else, for a folder whose header or tensors are
    not as they were saved, and for one whose parts do not fit each other.
    """
    folder = Path(folder)
    stored, place = places(folder)
    header = read_header(place, (PEFT_HEADER,))
    _check_header(place, header)
    start = ""
    if header.get("checkpoint"):
        stored, start = newest(folder / CHECKPOINT, folder / HEADER)[0], f"{INSIDE}{header['name']}/"
    found = {key.removeprefix(start): t for key, t in tensor_headers(stored).items() if key.startswith(start)}
    recipe = _recipe(place, header["recipe"], found)
    tensors = {key.removeprefix(start): t for key, t in read_tensors(stored).items() if key.startswith(start)}
    counters = f".{getattr(recipe.factors, 'counter', None)}"  # older folders have them without an axis
    tensors = {key: t.reshape(1) if t.ndim == 0 and key.endswith(counters) else t for key, t in tensors.items()}
    file = AdapterFile(
        header["name"], recipe, header["coverage"], header["head"], header["labels"],
        dict.fromkeys(BASE) | header["base"], tensors, header.get("roles", {}), header.get("counts", {}),
        header.get("constants"), notes=() if header["version"] == VERSION else (NO_CHECKSUMS,),
    )  # fmt: skip
    wrong = _changed_tensors(header, found, tensors)
    if wrong or (wrong := contents_problems(file)):
        raise UserError(f"{folder}: {'; '.join(wrong)}")
    return file


def adapter_name(text: str) -> str:
    """The nearest valid name of an adapter: letters, digits, - and _, and no word that torch's modules use."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:100].strip("_") or "adapter"
    return f"{name}_" if hasattr(nn.ModuleDict, name) else name


def _scaling(recipe: Recipe) -> float | dict[str, float] | None:
    """What B is multiplied by: one number, or with a rank map one for each layer."""
    if recipe.ranks is None or not hasattr(recipe.factors, "scaling"):
        return getattr(recipe.factors, "scaling", None)
    return {path: getattr(recipe.at(path).factors, "scaling", 1.0) for path in recipe.ranks.adapted}


# ---- the header ------------------------------------------------------------------------------------------------------


def _check_header(place: Path, header: Mapping[str, Any]) -> None:
    """Raise UserError unless the fields of adapter.json are those of its version, of the right types and unchanged."""
    if header.get("format") != FORMAT or header.get("version") not in (OLD, VERSION) or header["version"] is True:
        got = f"format {shown(header.get('format'))}, version {shown(header.get('version'))}"
        raise UserError(f"{place}: {got}; this loralab reads {FORMAT!r}, version {OLD} and {VERSION}")
    old = header["version"] == OLD
    fields = {key: kind for key, kind in FIELDS.items() if not old or key not in NEW_FIELDS}
    wrong = field_problems(header, fields, optional=OPTIONAL[header["version"]])
    wrong = wrong or field_problems(header["base"], BASE, "base", optional=BASE)
    for key, record in () if wrong or old else header["tensors"].items():
        wrong = wrong or field_problems(record, RECORD, f"tensors.{listed([key])}")
    if wrong:
        raise UserError(f"{place}: not an adapter header: {'; '.join(wrong)}")
    if not old and (changed := _changed_fields(header)):
        raise UserError(f"{place}: {listed(changed)} changed since the adapter was saved, by damage or by hand")


def sealed(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header with the sha256 of each of its fields."""
    plain = {key: value for key, value in header.items() if key != "sha256"}
    return {**plain, "sha256": {key: _field_sha256(value) for key, value in plain.items()}}


def _changed_fields(header: Mapping[str, Any]) -> list[str]:
    """Fields of a header that are not as they were saved."""
    recorded, now = header["sha256"], sealed(header)["sha256"]
    return [key for key in {**now, **recorded} if recorded.get(key) != now.get(key)]


def _field_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def _recipe(place: Path, data: dict[str, Any], tensors: Mapping[str, TensorHeader]) -> Recipe:
    """The recipe of a header. Its types and ranks are checked before anything is computed with them."""
    wrong = recipe_problems({OLD_FIELDS.get(key, key): value for key, value in data.items()})
    if not wrong:
        wrong = _rank_problems(data, max((n for t in tensors.values() for n in t.shape), default=0))
    if wrong:
        raise UserError(f"{place}: {'; '.join(wrong)}")
    try:
        return from_json(data)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def recipe_problems(data: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names and types in the JSON of a recipe, one phrase each."""
    fields = fields_of(Recipe) | {"factors": dict | None, "ranks": dict[str, Any] | None}
    wrong = field_problems(data, fields, "recipe", optional=fields.keys() - {"factors", "train"})
    factors, ranks = data.get("factors"), data.get("ranks")
    if not wrong and factors is not None:
        kind = factors.get("kind")
        if not isinstance(kind, str) or kind not in FACTORS:
            known = ", ".join(FACTORS)
            return [f"recipe.factors.kind={shown(kind)}: expected one of {known}; it may come from a newer version"]
        of_kind = fields_of(FACTORS[kind])
        wrong += field_problems(factors, {"kind": str, **of_kind}, "recipe.factors", optional=of_kind)
    if not wrong and ranks is not None:
        of_layer = fields_of(LayerRank)
        for path, layer in ranks.items():
            name = f"recipe.ranks.{listed([path])}"
            bare = problems(layer, int, name) if not isinstance(layer, dict) else None
            wrong += field_problems(layer, of_layer, name, of_layer.keys() - {"rank"}) if bare is None else bare
    return wrong[:10]


def _rank_problems(data: Mapping[str, Any], largest: int) -> list[str]:
    """Ranks beyond the `largest` side of any tensor: the file does not hold what they ask to be allocated."""
    if data["factors"] is None:
        return []
    settings = {key: value for key, value in data["factors"].items() if key != "kind"}
    factors = FACTORS[data["factors"]["kind"]](**settings)
    if not factors.low_rank:  # its tensors may all be smaller than its rank, and none is made of the rank alone
        return []
    layers = (data.get("ranks") or {}).values()
    ranks = [layer if isinstance(layer, int) else layer["rank"] for layer in layers]
    most = max([getattr(factors, "rank", 0), *ranks])
    return [f"rank {most}: no side of a tensor in the file is longer than {largest}"] if most > largest else []


def _changed_tensors(
    header: Mapping[str, Any], found: Mapping[str, TensorHeader], tensors: Mapping[str, Tensor]
) -> list[str]:
    """What is wrong with the tensors as the header records them; version 1 records only their names."""
    recorded = header.get("tensors", header.get("roles", found))
    wrong = []
    if missing := [key for key in recorded if key not in found]:
        wrong.append(f"missing tensors: {listed(missing)}")
    if extra := [key for key in found if key not in recorded]:
        wrong.append(f"unexpected tensors: {listed(extra)}")
    if "tensors" not in header:
        return wrong
    if header["roles"].keys() != recorded.keys():
        wrong.append(f"{HEADER} lists other tensors under roles than under tensors")
    changed = []
    for key in (key for key in recorded if key in found):
        record, now = recorded[key], found[key]
        if list(now.shape) != record["shape"]:
            wrong.append(f"{listed([key])} is {now.shape}, expected {tuple(record['shape'])}")
        elif now.dtype != record["dtype"]:
            wrong.append(f"{listed([key])} is {now.dtype}, expected {listed([record['dtype']])}")
        elif tensor_sha256(tensors[key]) != record["sha256"]:
            changed.append(key)
    if changed:
        wrong.append(f"tensors changed since the adapter was saved: {listed(changed)}")
    return wrong + ([] if not wrong else _not_finite(tensors))


# ---- what a folder holds must fit together ---------------------------------------------------------------------------


def contents_problems(file: AdapterFile) -> list[str]:
    """Why the parts of an adapter do not fit each other, whatever the model, one phrase each."""
    r, paths = file.recipe, file.paths
    wrong = _name_problems(file)
    if r.factors is not None and not paths:
        wrong.append("its method adapts layers, and it lists none")
    elif r.factors is None and paths:
        wrong.append(f"its method adapts no layer, and it lists {listed(paths)}")
    elif r.ranks is not None and (odd := set(paths) ^ set(r.ranks.adapted)):
        wrong.append(f"rank map and list of layers differ in {listed(sorted(odd))}")
    if wrong:
        return wrong
    away = starts.added(r.start) if file.starts_anew else ()
    held = {path: [role for role in roles if role not in away] for path, roles in held_roles(r, paths).items()}
    expected = {f"{path}.{role}": role for path, roles in held.items() for role in roles}
    if missing := [key for key, role in expected.items() if key not in file.tensors and not _sized(r, role)]:
        wrong.append(f"missing tensors: {listed(sorted(missing))}")
    elif bare := [p for p, roles in held.items() if roles and not any(f"{p}.{role}" in file.tensors for role in roles)]:
        wrong.append(f"no tensors of {listed(bare)}")
    rest = [key for key in file.tensors if key not in expected]
    heads = frozenset(file.heads)
    of_head = {key: inside(key, heads) for key in rest}
    extra = [key for key in rest if of_head[key] is None and not _of_base(r, key)]
    if extra:
        wrong.append(f"unexpected tensors: {listed(extra)}")
    if bare := sorted(heads - set(of_head.values())):
        wrong.append(f"no tensors of the head {listed(bare)}")
    wrong += _not_finite(file.tensors)
    return wrong or _shape_problems(file, held)


def _sized(r: Recipe, role: str) -> bool:
    """Whether it depends on the size of a layer if it has the role, as with a dense update."""
    return not r.low_rank and r.factors is not None and role in r.factors.roles


def _of_base(r: Recipe, key: str) -> bool:
    """Whether a recipe trains a tensor of that name in the base."""
    return r.learn_base == "all" or (r.learn_base == "bias" and key.rpartition(".")[2] == "bias")


def _name_problems(file: AdapterFile) -> list[str]:
    """Names that are empty, far too long, given twice, or inside one another."""
    paths, heads, wrong = [*file.paths, *file.heads], frozenset(file.heads), []
    if not file.name:
        wrong.append("the adapter has no name")
    coverage = {f"coverage {pattern}": covered for pattern, covered in file.coverage.items()}
    for what, names in {"head": file.heads, "labels": file.labels, **coverage}.items():
        if len(set(names)) < len(names):
            twice = next(name for name, times in Counter(names).items() if times > 1)
            wrong.append(f"{listed([what])} gives {listed([twice])} twice")
    if odd := [name for name in paths if not 0 < len(name) <= LONGEST_NAME]:
        wrong.append(f"the name of a layer or head has {len(odd[0])} characters: expected 1 to {LONGEST_NAME}")
    elif nested := [name for name in paths if inside(name, heads)]:
        wrong.append(f"inside a module of the head: {listed(nested)}")
    elif both := heads.intersection(file.paths):
        wrong.append(f"both adapted and a module of the head: {listed(sorted(both))}")
    return wrong


def inside(name: str, paths: Collection[str]) -> str | None:
    """The first of the modules that a tensor or module of that name lies in."""
    parents = (name[:i] for i, letter in enumerate(name[:LONGEST_NAME]) if letter == ".")
    return next((parent for parent in parents if parent in paths), None)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """NaN or infinite values; dtypes of one byte are left to the check of dtypes."""
    keys = [key for key, t in tensors.items() if _wide(t) and not t.isfinite().all()]
    return [f"values that are not finite: {listed(keys)}"] if keys else []


def _wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def held_roles(r: Recipe, paths: Sequence[str]) -> dict[str, list[str]]:
    """Path -> roles whose tensors a file may hold for that layer: what layers share is held by the first of them."""
    first: dict[str, str] = {}  # share -> its first layer
    held = {}
    for path in paths:
        at = r.at(path) if r.ranks is not None else r
        roles = list(at.roles)
        layer = None if r.ranks is None else r.ranks.layers[path]
        if layer is not None and layer.gates is not None:
            roles.append("gates")
        if layer is not None and layer.share is not None and first.setdefault(layer.share, path) != path:
            assert at.factors is not None
            roles = [role for role in roles if role not in at.factors.shared]
        held[path] = roles
    return held


def layer_shapes(
    r: Recipe, path: str, out_features: int, in_features: int, count: int | None = None
) -> dict[str, Tensor]:
    """Role -> a tensor without values that has the shape and dtype of the role in one layer, or a stack of `count`."""
    at, generator = r.at(path), Generator()
    assert at.factors is not None
    with torch.device("meta"):
        shapes = starts.blank(at.start, at.factors, out_features, in_features, generator)
        if r.gain:
            shapes["m"] = torch.empty(out_features)  # (out,)
        layer = None if r.ranks is None else r.ranks.layers[path]
        if layer is not None and layer.gates is not None:
            shapes["gates"] = torch.empty(len(layer.gates))  # (r,)
    return shapes if count is None else {role: t.expand(count, *t.shape) for role, t in shapes.items()}


def unlike(key: str, tensor: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor of a file cannot fill one of a model; any floating dtype fills any other."""
    if tensor.shape != wanted.shape:
        return f"{listed([key])} is {tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
    if not (_wide(tensor) if wanted.is_floating_point() else tensor.dtype == wanted.dtype):
        return f"{listed([key])} is {tensor.dtype}, expected {wanted.dtype}".replace("torch.", "")
    return None


def _shape_problems(file: AdapterFile, held: Mapping[str, list[str]]) -> list[str]:
    """Tensors whose shapes do not fit the recipe, or the other tensors of their layer."""
    wrong: list[str] = []
    firsts: dict[str, str] = {}  # share -> the layer that holds what is shared
    for path, roles in held.items():
        share = None if file.recipe.ranks is None else file.recipe.ranks.layers[path].share
        first = path if share is None else firsts.setdefault(share, path)
        size = _layer_size(file, path, first)
        if isinstance(size, str):
            wrong.append(size)
        elif size is not None:
            if misfit := file.recipe.at(path).factors.misfit(*size):  # type: ignore[union-attr]
                wrong.append(f"{misfit} ({path})")
                continue
            A = file.tensors.get(f"{first}.A")
            shapes = layer_shapes(file.recipe, path, *size, len(A) if A is not None and A.ndim == 3 else None)
            found = (unlike(f"{path}.{role}", file.tensors[f"{path}.{role}"], shapes[role]) for role in roles)
            wrong += [problem for problem in found if problem is not None]
        if len(wrong) >= 10:
            break
    return wrong


def _layer_size(file: AdapterFile, path: str, first: str) -> tuple[int, int] | str | None:
    """(out, in) of a layer as its tensors tell it, or what is wrong with them, or None if they do not tell.

    `first` holds what the layer shares with others.
    """
    factors = file.recipe.at(path).factors
    assert factors is not None
    if not factors.low_rank:
        odd = [
            key for role in factors.roles if (key := f"{path}.{role}") in file.tensors and not _wide(file.tensors[key])
        ]
        return f"{listed(odd)}: expected floating numbers of 16 bits or more" if odd else None
    if not {"A", "B"} <= set(factors.roles) and "b" not in factors.roles:
        return None
    if "A" not in factors.roles:  # only vectors, from which the columns of the weight are not known, nor needed
        b = file.tensors[f"{path}.b"]
        return (len(b), 1) if b.ndim == 1 else f"{path}.b is {tuple(b.shape)}, expected one dimension"
    A, B = (file.tensors[f"{first}.{role}"] for role in "AB")
    if A.ndim == B.ndim == 3 and len(A) == len(B):  # a stack of experts
        return B.shape[1], A.shape[2]
    if A.ndim != 2 or B.ndim != 2:
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} of {listed([path])}: expected two dimensions each"
    layers = factors.shape(1, 1)[0]  # that share B (layers * out, r)
    if len(B) % layers:
        return f"B {tuple(B.shape)} of {listed([path])}: expected a multiple of {layers} rows"
    return len(B) // layers, A.shape[1]
