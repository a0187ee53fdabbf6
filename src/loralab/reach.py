"""What of a model an adapter can reach: every parameter in one part, and for each part why not, if it cannot."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from loralab import kinds
from loralab.experts import AdaptedExperts, AdaptedStack
from loralab.heads import under
from loralab.kinds.stack import stacks_of
from loralab.layer import Adapted, AdaptedHead, plain_modules

READ_PAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they read the .weight of layers inside themselves
VECTORS, MATRIX, STACK = "vectors", "matrix", "stack of matrices"  # kinds of parameters that are no layer's
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Part:
    """A layer with its bias, a parameter that is no layer's, or the vectors of a module."""

    path: str  # of the layer or module, or of the parameter
    kind: str  # of the layer (see `kinds`), or VECTORS, MATRIX, STACK
    values: int  # that no part before it counts
    shape: tuple[int, ...]  # of the weight; of the vectors together
    obstacle: str | None = None  # why no adapter reaches it
    mendable: bool = False  # whether the user can take the obstacle away, so that it is a mistake to go on
    shared: str | None = None  # the part that has the same weight

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer of a kind that adapters know."""
        return self.kind not in (VECTORS, MATRIX, STACK)


def parts(model: nn.Module, outside: Sequence[str] = ()) -> list[Part]:
    """Every parameter of the model in one part; what lies in a module of `outside` (the head) is left out."""
    found: list[Part] = []
    first: dict[int, str] = {}  # identity of a parameter -> the part that counts it
    for path, module in plain_modules(model):
        if not under(path, outside):
            found += _of_module(model, path, module, first)
    return found


def tied_to(model: nn.Module, path: str) -> list[str]:
    """The layers that have the very weight of the one at `path`, itself left out."""
    found = parts(model)
    first = next((part.shared or part.path for part in found if part.path == path and part.is_layer), None)
    return [p.path for p in found if p.is_layer and first in (p.path, p.shared) and p.path != path]


def _of_module(model: nn.Module, path: str, module: nn.Module, first: dict[int, str]) -> Iterator[Part]:
    layer = module.original[0] if isinstance(module, Adapted) else module
    tensors = dict(layer.named_parameters(recurse=False))
    if (kind := kinds.kind_of(layer)) is not None:
        yield _layer_part(model, path, module, kind.name, first)
        tensors.pop("weight", None), tensors.pop("bias", None)
    elif (refused := kinds.refusal(layer)) is not None:  # a package keeps its weight, perhaps in buffers
        sides = tuple(getattr(layer, name, 0) for name in ("out_features", "in_features"))
        yield Part(path, kinds.LINEAR.name, sides[0] * sides[1], sides, refused)
        return
    for name in stacks_of(layer) if not isinstance(module, AdaptedExperts) else ():
        first[id(p := tensors.pop(name))] = f"{path}.{name}"
        yield Part(f"{path}.{name}", kinds.EXPERTS.name, p.numel(), tuple(p.shape))
    vectors = 0
    for name, p in tensors.items():
        place = f"{path}.{name}" if path else name
        if id(p) in first:
            continue
        first[id(p)] = place
        if p.ndim < 2:
            vectors += p.numel()
        else:
            yield Part(place, MATRIX if p.ndim == 2 else STACK, p.numel(), tuple(p.shape), _held(layer, p))
    if vectors:
        yield Part(path or "(the model itself)", VECTORS, vectors, (vectors,))


def _layer_part(model: nn.Module, path: str, module: Any, kind: str, first: dict[int, str]) -> Part:
    layer = module.original[0] if isinstance(module, Adapted) else module
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if isinstance(module, Adapted) and weight is None:  # kept in a store
        weight = module.own_weight()
    if isinstance(module, Adapted) or isinstance(weight, Tensor):
        out, inner = (module.out_features, module.in_features) if isinstance(module, Adapted) else kinds.size(layer)
        shape: tuple[int, ...] = (*([module.count] if isinstance(module, AdaptedStack) else []), out, inner)
    else:
        shape = tuple(getattr(weight, "shape", ()))
    sharer = None if weight is None else first.get(id(weight))
    if weight is not None:
        first.setdefault(id(weight), path)
    values = 0 if sharer else _product(shape)
    if parametrize.is_parametrized(layer):  # its weight is made of other parameters
        own = {id(p): p.numel() for p in layer.parameters() if id(p) not in first}
        values = sum(own.values())
        first.update(dict.fromkeys(own, path))
    elif isinstance(bias, Tensor) and id(bias) not in first:
        first[id(bias)] = path
        values += bias.numel()
    mendable = None if isinstance(module, Adapted) else obstacle(module)
    return Part(path, kind, values, shape, mendable or why_not(model, path, module), mendable is not None, sharer)


def _product(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _held(module: nn.Module, p: nn.Parameter) -> str:
    """Why a matrix that a module holds itself cannot be adapted."""
    name = type(module).__name__
    if isinstance(module, TRANSPOSED):
        return f"a transposed convolution ({name}) is no layer that adapters know"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights past any layer"
    what = "a table or matrix" if p.ndim == 2 else f"a tensor of {p.ndim} dimensions, such as the experts of a mixture,"
    return f"{what} that {name} holds and reads itself, and no layer"


def why_not(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why a layer of a known kind, with plain parameters, cannot be adapted; None if it can."""
    if isinstance(module, Adapted):
        return None
    return _read_past(model, path) or kinds.refusal(module)


def _read_past(model: nn.Module, path: str) -> str | None:
    """Why an adapter on a layer would do nothing: a module around it reads its weight itself."""
    for parent in ["", *(path[:i] for i, char in enumerate(path) if char == ".")]:
        module = model.get_submodule(parent)
        if isinstance(module, AdaptedHead):
            return None
        if isinstance(module, READ_PAST):
            return (
                f"{type(module).__name__} at {parent or 'the top'} reads its weight past the module, so an adapter "
                "there would do nothing: leave it out of targets"
            )
    return None


def obstacle(module: nn.Module) -> str | None:
    """Why a module, with what is inside, cannot be adapted or copied as it is, and what to do; None if it can."""
    for inner in module.modules():
        if isinstance(inner, Adapted):
            continue
        if parametrize.is_parametrized(inner):
            names = ", ".join(inner.parametrizations)  # type: ignore[arg-type]
            return (
                f"its {names} is computed by a parametrization: first make it a plain parameter, with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if computed := [n for n in ("weight", "bias") if isinstance(inner.__dict__.get(n), Tensor)]:
            return (
                f"its {computed[0]} is no parameter but computed at every call (weight_norm, spectral_norm, pruning): "
                "first make it one, with torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove"
            )
        if (problem := _away(inner)) is not None:
            return problem
    return None


def _away(module: nn.Module) -> str | None:
    """Why the weights of a module cannot be read: they are elsewhere, and brought in for a moment at every call."""
    hooks = [hook := getattr(module, "_hf_hook", None), *getattr(hook, "hooks", ())]
    meta = any(t.is_meta and not isinstance(t, FakeTensor) for t in module.parameters(recurse=False))
    if meta or any(getattr(hook, "offload", False) for hook in hooks):
        return (
            "its weight is not in memory (the meta device, or offloaded by accelerate): load the model without "
            "offloading this layer, in fewer bits if it is too large, or leave it out of targets"
        )
    return None
