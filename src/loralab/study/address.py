"""The address of a run: sha256 over what decides its result, so that equal runs are one run, whoever asks for it.

    address = first 16 hex of sha256(settings that differ from their defaults, recipe, hash of data, hash of base)

A setting at its default is left out, so a version that adds a setting keeps the addresses it had. How a method is
written does not matter: `lora+` and `lora` with lr_ratio 16 and its rate are one recipe. Where data and model lie does
not matter either, what is in them does.

The tables below say by which key and from which default each setting counts. They are apart from the names and the
defaults in the code, which may change: an address of an older version stays what it was. A method that computes
something else than before, or a start that does, has a `revision` above 1, which is a part of its addresses.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from loralab import models
from loralab.data import glue
from loralab.disk import sha256
from loralab.methods import starts
from loralab.recipe import FACTORS, Recipe, to_json
from loralab.run import Settings
from loralab.run.settings import LEARNED, NOT_RESULT, SOURCE
from loralab.run.setup import objective_of, task_of
from loralab.run.start import checksum

VERSION = 1  # of the rule that makes addresses
LENGTH = 16  # hex digits: two of a million runs meet with a chance of 3e-8
IN_RECIPE = {"method", "rank", "alpha", "lr", "lr_ratio", "dropout", "ranks", "policy", "store", "set"}
IN_HASHES = {*SOURCE, "model", "from_adapter"} - {*LEARNED}
HUB = "hub "  # before the name of a model that is still there, in the place of its hash
MODEL_FILES = ("config.json", "*.safetensors", "*.gguf", "tokenizer*", "vocab*", "merges.txt", "*.model")

# Name in the code -> (key in addresses, value at which it is left out). Add lines, and rename on the left side only:
# another key or value on the right side gives every stored run another address.
Frozen = Mapping[str, tuple[str, Any]]
SETTINGS: Frozen = {
    "targets": ("targets", "all-linear"),
    "exclude": ("exclude", ()),
    "objective": ("objective", "classification"),
    "template": ("template", None),  # its hash
    "loss_on": ("loss_on", "auto"),
    "pack": ("pack", False),
    "train_rows": ("train_rows", None),
    "validation_rows": ("validation_rows", None),
    "generate_metric": ("generate_metric", None),
    "generate_rows": ("generate_rows", 100),
    "seed": ("seed", 0),
    "head_lr": ("head_lr", None),
    "epochs": ("epochs", 3),
    "batch_size": ("batch_size", 32),
    "accumulate": ("accumulate", 1),
    "max_length": ("max_length", 128),
    "keep": ("keep", 0.9),
    "rounds": ("rounds", 1),
    "span": ("span", None),
    "dtype": ("dtype", "float32"),  # what it is on the machine, not `auto`
    "speed": ("speed", "auto"),
    "checkpointing": ("checkpointing", False),
    "attention": ("attention", None),
    "weight_decay": ("weight_decay", 0.01),
    "schedule": ("schedule", "linear"),
    "warmup": ("warmup", 0.06),
    "clip": ("clip", 1.0),
    "selection": ("selection", "held-out"),
    "patience": ("patience", 0),
    "max_steps": ("max_steps", None),
    "max_time": ("max_time", None),
    "eval_every": ("eval_every", 0),
    "held_out": ("held_out", "tenth"),
    "class_weights": ("class_weights", "none"),
    "select_by": ("select_by", None),
}
RECIPE: Frozen = {
    "start": ("start", "kaiming"),
    "gain": ("gain", False),
    "exact_gain": ("exact_gain", False),
    "store": ("store", None),
    "train": ("train", None),
    "lr": ("lr", 1e-3),
    "lr_ratio": ("lr_ratio", 1.0),
    "dropout": ("dropout", 0.0),
    "ranks": ("ranks", None),
    "policy": ("plan", None),
}
LORA: Frozen = {"rank": ("rank", 8), "alpha": ("alpha", 16.0), "stabilized": ("stabilized", False)}
PROJECTION: Frozen = {"projection_seed": ("projection_seed", 0), "source": ("source", "philox-1")}
OF_KIND: Mapping[str, Frozen] = {  # kind of factors -> its settings; the kinds are names of the file format
    "lora": LORA,
    "vera": {"rank": ("rank", 256), "d_start": ("d_start", 0.1), **PROJECTION},
    "lora-fa-precond": {**LORA, "delta": ("delta", 1e-8)},
    "dylora": {**LORA, "minimum": ("minimum", 1), "frozen": ("frozen", False)},
    "delta-lora": {**LORA, "follow": ("follow", 2.0), "wait": ("wait", 500)},
    "adalora": {
        **LORA,
        "rank": ("rank", 12),
        "target_rank": ("target_rank", None),
        "total_steps": ("total_steps", None),
        "tinit": ("tinit", None),
        "tfinal": ("tfinal", None),
        "every": ("every", 1),
        "beta1": ("beta1", 0.85),
        "beta2": ("beta2", 0.85),
        "orthogonality": ("orthogonality", 0.5),
    },
    "loha": {**LORA, "rank": ("rank", 4), "alpha": ("alpha", 8.0)},
    "miss": {"rank": ("rank", 8)},
    "ia3": {"inputs": ("inputs", ())},
    "oft": {"block": ("block", 32), "one_block": ("one_block", False), "terms": ("terms", 0)},
    "lora-xs": {**LORA, "rank": ("rank", 16)},
    "superlora": {
        **LORA,
        "split": ("split", 1),
        "order": ("order", 2),
        "core": ("core", False),
        "fold": ("fold", False),
        "ratio": ("ratio", 1.0),
        "groups": ("groups", 1),
        "projection": ("projection", "shuffle"),
        **PROJECTION,
    },
}


@dataclass(frozen=True)
class DataIdentity:
    """What a task's rows are known by."""

    sha256: str
    train: int | None  # rows
    here: bool  # false where they are still on the hub


def address(settings: Settings) -> str:
    """The 16 hex digits that name a run. Raises UserError for a method, task or model that does not exist."""
    text = json.dumps(_numbers(content(settings)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def content(settings: Settings) -> dict[str, Any]:
    """What the address is the hash of."""
    recipe = settings.recipe()
    left_out = NOT_RESULT | IN_RECIPE | IN_HASHES | ({"targets", "exclude"} if recipe.factors is None else set())
    values = {**settings.to_json(), "dtype": str(settings.precision).removeprefix("torch.")}
    values["objective"] = objective_of(settings).name
    if settings.template is not None:
        values["template"] = sha256(settings.template)
    defaults = {f.name: f.default for f in fields(Settings)}
    return {
        "version": VERSION,
        "settings": _changed({k: values[k] for k in defaults if k not in left_out}, SETTINGS, defaults),
        "recipe": _recipe(recipe),
        "data": data(settings).sha256,
        "base": base(settings.model),
        **({} if settings.from_adapter is None else {"from_adapter": adapter(settings.from_adapter)}),
    }


def _changed(values: Mapping[str, Any], table: Frozen, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the table's, by its keys; what the table does not have counts by its own name."""
    found = {}
    for name, value in values.items():
        key, default = table.get(name, (name, defaults.get(name)))
        if value != default:
            found[key] = value
    return found


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what is at its default."""
    values = to_json(recipe)
    values.pop("factors")
    factors = None if recipe.factors is None else {"kind": recipe.factors.kind, **_factors(recipe.factors)}
    revised = starts.revision(recipe.start)
    started = {} if revised == 1 else {"start_revision": revised}
    return {"factors": factors, **_changed(values, RECIPE, to_json(Recipe())), **started}


def _factors(factors: Any) -> dict[str, Any]:
    found = _changed(asdict(factors), OF_KIND.get(factors.kind, {}), asdict(FACTORS[factors.kind]()))
    return found if factors.revision == 1 else {**found, "revision": factors.revision}


def _numbers(value: Any) -> Any:
    """Whole numbers as floats: 16 and 16.0 are one setting."""
    if isinstance(value, dict):
        return {key: _numbers(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(x) for x in value]
    return float(value) if type(value) is int else value


def data(settings: Settings) -> DataIdentity:
    """The hash of a task's rows; of a task that would come from the hub its name, as nothing is fetched to plan."""
    return _data(settings.only(SOURCE))


def is_here(settings: Settings) -> bool:
    """Whether rows and model can be read without a network."""
    return data(settings).here and not base(settings.model).startswith(HUB)


@cache
def _data(s: Settings) -> DataIdentity:
    name = glue.canonical(s.task)
    if name is not None and s.data is None:
        return DataIdentity(f"{glue.HUB} {name}", glue.TABLE[name].official["train"], here=False)
    task = task_of(s)
    return DataIdentity(task.sha256, len(task.train), here=True)


def adapter(folder: Path) -> str:
    """The hash of the files of an adapter that a run starts from; where it is not there yet its name, to plan with."""
    return _adapter(folder) if folder.exists() else f"not there: {folder}"


_adapter = cache(checksum)


@cache
def base(model: str) -> str:
    """The hash of a model's files; of a hub name the name, as nothing is fetched to plan."""
    place = models.resolve(model)
    if not isinstance(place, Path):
        return f"{HUB}{place}"
    files = sorted({file for pattern in MODEL_FILES for file in place.glob(pattern)})
    return hashlib.sha256(" ".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()
