"""The address of a run: sha256 over what decides its result, so that equal runs are one run, whoever asks for it.

    address = first 16 hex of sha256(settings that differ from their defaults, recipe, hash of data, hash of base)

A setting at its default is left out, so a version that adds a setting keeps the addresses it had. How a method is
written does not matter: `lora+` and `lora` with lr_ratio 16 and its rate are one recipe. Where data and model lie does
not matter either, what is in them does.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loralab import models
from loralab.data import glue
from loralab.recipe import FACTORS, Recipe, to_json
from loralab.run import Settings
from loralab.run.settings import NOT_RESULT, SOURCE
from loralab.run.setup import task_of

VERSION = 1  # raise it when a default changes what runs come to: old addresses then mean nothing
LENGTH = 16  # hex digits: two of a million runs meet with a chance of 3e-8
IN_RECIPE = {"method", "rank", "alpha", "lr", "lr_ratio", "dropout", "ranks", "policy", "store", "set"}
IN_HASHES = {*SOURCE, "model"}
HUB = "hub "  # before the name of a model that is still there, in the place of its hash
MODEL_FILES = ("config.json", "*.safetensors", "*.gguf", "tokenizer*", "vocab*", "merges.txt", "*.model")


@dataclass(frozen=True)
class Data:
    """What a task's rows are known by."""

    sha256: str
    train: int | None  # rows
    here: bool  # false where they are still on the hub


def address(settings: Settings) -> str:
    text = json.dumps(_numbers(content(settings)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def content(settings: Settings) -> dict[str, Any]:
    """What the address is the hash of."""
    recipe = settings.recipe()
    left_out = NOT_RESULT | IN_RECIPE | IN_HASHES | ({"targets"} if recipe.factors is None else set())
    own = {f.name: f.default for f in dataclasses.fields(Settings) if f.name not in left_out}
    own["dtype"], given = "float32", {**settings.to_json(), "dtype": str(settings.precision).removeprefix("torch.")}
    return {
        "version": VERSION,
        "settings": {key: given[key] for key, default in own.items() if given[key] != default},
        "recipe": _recipe(recipe),
        "data": data(settings).sha256,
        "base": base(settings.model),
    }


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """Without what is at its default."""
    own, usual = to_json(recipe), to_json(Recipe())
    factors = own.pop("factors")
    if recipe.factors is not None:
        of_kind = dataclasses.asdict(FACTORS[recipe.factors.kind]())
        factors = {key: value for key, value in factors.items() if key not in of_kind or value != of_kind[key]}
    return {"factors": factors, **{key: value for key, value in own.items() if value != usual[key]}}


def _numbers(value: Any) -> Any:
    """Whole numbers as floats: 16 and 16.0 are one setting."""
    if isinstance(value, dict):
        return {key: _numbers(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(x) for x in value]
    return float(value) if type(value) is int else value


def data(settings: Settings) -> Data:
    """The hash of a task's rows; of a task that would come from the hub its name, as nothing is fetched to plan."""
    return _data(settings.only(SOURCE))


def is_here(settings: Settings) -> bool:
    """Whether rows and model can be read without a network."""
    return data(settings).here and not base(settings.model).startswith(HUB)


@cache
def _data(s: Settings) -> Data:
    name = glue.canonical(s.task)
    if name is not None and s.data is None:
        return Data(f"{glue.HUB} {name}", glue.TABLE[name].official["train"], here=False)
    found = task_of(s)
    return Data(found.sha256, len(found.train), here=True)


@cache
def base(model: str) -> str:
    """The hash of a model's files; of a hub name the name, as nothing is fetched to plan."""
    place = models.resolve(model)
    if not isinstance(place, Path):
        return f"{HUB}{place}"
    files = sorted({file for pattern in MODEL_FILES for file in place.glob(pattern)})
    return hashlib.sha256(" ".join(f"{file.name} {models.sha256(file)}" for file in files).encode()).hexdigest()
