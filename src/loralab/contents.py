"""What the folder of an adapter says: its tensors and recipe, and the base and labels that they are for."""

from pathlib import Path
from typing import Any

from torch import nn

from loralab import peft_format
from loralab.adapted import AdaptedModel, AdapterSpec, once
from loralab.files import AdapterFile
from loralab.hashes import fingerprint
from loralab.methods.base import whole


def adapter_file(handle: AdaptedModel, name: str, saved_as: str) -> AdapterFile:
    """An adapter of a model as its folder holds it, under another name."""
    spec, tensors = handle.specs[name], once(handle.tensors(name))
    base = base_of(handle.model)
    return AdapterFile(
        name=saved_as,
        recipe=spec.recipe,
        coverage={} if spec.coverage is None else spec.coverage.matched,
        heads=list(spec.heads),
        labels=labels_of(spec, base["task_type"]),
        base={**base, "sha256": handle.base_sha256},
        tensors={key: whole(t) for key, (_, t) in tensors.items()},
        roles={key: role for key, (role, _) in tensors.items()},
        counts=handle.counts(name) | _unreached(spec),
        constants=constants_sha256(handle, spec),
    )


def constants_sha256(handle: AdaptedModel, spec: AdapterSpec) -> str | None:
    """sha256 of the frozen tensors that a method draws from a seed and no file holds; None where there are none."""
    drawn = handle.constants(spec)
    return fingerprint(sorted(drawn.items()), exact=True) if drawn else None


def _unreached(spec: AdapterSpec) -> dict[str, int]:
    """How many values of the model no target reaches, for `loralab inspect`, which has no model; empty where none."""
    count = 0 if spec.coverage is None else spec.coverage.unreached_values
    return {"unreached": count} if count else {}


def base_of(model: nn.Module) -> dict[str, Any]:
    """Name, model type, class and task of the base, as far as the model tells them."""
    config, kind = getattr(model, "config", None), type(model).__name__
    name = getattr(config, "_name_or_path", "") or kind
    return {
        "name": Path(name).name if Path(name).is_dir() else name,
        "model_type": getattr(config, "model_type", None),
        "class": kind,
        "task_type": peft_format.task_type(kind),
    }


def labels_of(spec: AdapterSpec, task: str | None) -> list[str]:
    """Names of the outputs; the names that transformers gives any model are none of a task without labels."""
    default = all(label == f"LABEL_{i}" for i, label in enumerate(spec.labels))
    return [] if default and task is not None and task not in peft_format.LABELLED else list(spec.labels)
