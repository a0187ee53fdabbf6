"""Linear layers that bitsandbytes loaded in 4 or 8 bit: kept as they are, and multiplied by their own forward."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "bitsandbytes"
FLAGS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


WHOLE = "the weights of this GGUF model are whole, so it no longer says that it is quantized: Trainer takes it"


class WholeNote(UserWarning):
    """A model of a GGUF file whose weights are whole, and which transformers takes for a quantized one."""


class Loaded(nn.Module):
    """W (out, in) in the codes of bitsandbytes; y = W x + b is what its layer computes.

    A layer in 8 bit also rounds x to 8 bit, so a merged model differs from the adapted one by that rounding.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = layer.out_features, layer.in_features

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,)."""
        return self.layer.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, x)  # type: ignore[no-any-return]

    def linear(self, x: Tensor) -> Tensor:
        """W x: (..., in) -> (..., out), of the weight as kept."""
        return F.linear(x, self.dense().to(x.dtype))

    def dense(self) -> Tensor:
        """W (out, in) as kept, in float32."""
        return dense(self.layer)

    def square_norms(self) -> Tensor:
        """|W_i|^2 (out,)."""
        return self.dense().square().sum(1)

    def restore(self, layer: Any, W: Tensor | None) -> nn.Module:
        """The layer as it was, or a plain linear layer with the weight W (out, in)."""
        return layer if W is None else plain(layer, W)


def plain(layer: Any, W: Tensor) -> nn.Linear:
    """A plain linear layer with the weight W (out, in) and the bias of `layer`."""
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(W, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(W.dtype), requires_grad=False)
    return linear.train(layer.training)


def is_loaded(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes."""
    return isinstance(module, nn.Linear) and type(module).__module__.split(".")[0] == PACKAGE


def dense(layer: Any) -> Tensor:
    """W (out, in) of a layer of bitsandbytes, in float32."""
    import bitsandbytes.functional as bnb

    weight = layer.weight
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        if state is None:  # not moved to a device yet: still whole
            return weight.detach().float()  # type: ignore[no-any-return]
        codes = weight.data
        if getattr(state, "packing_format_for_cpu", False):  # by an inference on the CPU; undone on a copy
            state = copy.deepcopy(state)
            state.original_nested = False  # else its statistics would be rounded anew
            codes, state = bnb._convert_weight_packed_for_cpu_inverse(codes.clone(), state)
            state.absmax, state.nested = state.absmax.T.reshape(-1).float(), False  # (blocks,)
        found: Tensor = bnb.dequantize_4bit(codes, state)
        return found.float().view(layer.out_features, layer.in_features)
    scale = layer.state.SCB if layer.state.SCB is not None else weight.SCB
    codes = layer.state.CB if layer.state.CB is not None else weight.data
    if scale is None:
        return weight.detach().float()  # type: ignore[no-any-return]
    return codes.float() * (scale.float() / 127).unsqueeze(1)  # type: ignore[no-any-return]


def whole_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what bitsandbytes left whole in a model: embeddings, norms."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def open_whole(model: nn.Module) -> bool:
    """Let transformers know that the weights of a GGUF file were dequantized at load; whether there was need to.

    Its Trainer refuses a model that says it is quantized. One whose weights stay packed is left as it is.
    """
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    method = getattr(model, "quantization_method", None) or getattr(method, "quant_method", None)
    if not vars(model).get("is_quantized") or str(getattr(method, "value", method)).lower() != "gguf":
        return False
    if any(type(module).__name__.startswith("Gguf") for module in model.modules()):
        return False
    make_plain(model)
    return True


def make_plain(model: nn.Module) -> None:
    """Give a model plain linear layers in the place of those of bitsandbytes, and a config that does not name it."""
    if not any(vars(model).get(flag) for flag in FLAGS):
        return
    for path, layer in [(path, module) for path, module in model.named_modules() if is_loaded(module)]:
        model.set_submodule(path, plain(layer, dense(layer).to(whole_dtype(model))))
    holders = [(model, FLAGS), (getattr(model, "config", None), ("quantization_config",))]
    for holder, name in [(holder, name) for holder, names in holders for name in names]:
        if name in getattr(holder, "__dict__", {}):
            delattr(holder, name)
