"""What an adapter is, and the tensors that it holds: in the layers, in its head and in the base itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from loralab.layer import Adapted, AdaptedHead
from loralab.recipe import Recipe
from loralab.targets import Coverage, shape_of

if TYPE_CHECKING:
    from loralab.attach import Adapters

Tensors = Mapping[str, tuple[str, Tensor]]  # path.role -> (role, live tensor)


@dataclass(frozen=True)
class Entry:
    """What the handle knows of one adapter."""

    recipe: Recipe
    coverage: Coverage | None  # None: no layer is adapted
    heads: tuple[str, ...]  # paths of the modules that are its head
    labels: tuple[str, ...]
    base_names: tuple[str, ...]  # tensors of the base that learn in place (full fine-tuning)

    @property
    def paths(self) -> list[str]:
        return [] if self.coverage is None else self.coverage.paths


def base_tensor(model: nn.Module, key: str) -> Tensor:
    """A tensor of an adapted model by the name it had before `attach`."""
    *path, last = key.split(".")
    module = model
    for part in path:
        module = module.get_submodule(part)
        if isinstance(module, AdaptedHead):
            module = module.base
    return getattr(module.original[0] if isinstance(module, Adapted) else module, last)  # type: ignore[no-any-return]


def tensors_of(handle: "Adapters", name: str) -> dict[str, tuple[str, Tensor]]:
    """See `Adapters.tensors`."""
    entry = handle.entry(name)
    out = {f"{p}.{role}": (role, t) for p in entry.paths for role, t in handle.layers[p].roles(name).items()}
    out |= {key: (key.rpartition(".")[2], base_tensor(handle.model, key)) for key in entry.base_names}
    for path in entry.heads:
        out |= {f"{path}.{key}": ("head", t) for key, t in handle.heads[path].copies[name].named_parameters()}
    return out


def constants_of(model: nn.Module, entry: Entry) -> dict[str, Tensor]:
    """The frozen tensors that all layers of an adapter share, and no file holds."""
    recipe = entry.recipe
    if recipe.factors is None:
        return {}
    sizes = {path: shape_of(model.get_submodule(path)) for path in entry.paths}
    return recipe.factors.constants([recipe.at(path).factors.shape(*size) for path, size in sizes.items()])  # type: ignore


def once(held: Tensors) -> dict[str, tuple[str, Tensor]]:
    """The entries of `tensors_of` without what layers share: it stays under the first layer that has it."""
    first = {id(tensor): key for key, (_, tensor) in reversed(list(held.items()))}
    return {key: pair for key, pair in held.items() if first[id(pair[1])] == key}


def counts_of(held: Tensors) -> dict[str, int]:
    """Numbers of values that learn: in the adapter, in its head, and both together."""
    learned = [(role, t.numel()) for role, t in once(held).values() if t.requires_grad]
    head = sum(size for role, size in learned if role == "head")
    adapter = sum(size for role, size in learned if role != "head")
    return {"adapter": adapter, "head": head, "trainable": adapter + head}
