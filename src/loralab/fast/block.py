"""Computes a layer of an encoder or decoder as one autograd function wherever the layer itself would compute the same.

A `Block` stands in the place of a layer's `forward` and follows the model: at each call it looks whether something in
the layer that the function takes as frozen learns, whether a module or a function that it calls was replaced or has a
hook, and whether the call asks for something that the function does not do. Then the layer's own forward runs, and
`Block.why_plain` says why. These checks take some forty to seventy microseconds a layer and step.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from loralab.active import Active
from loralab.errors import UserError
from loralab.fast.code import ATTENTIONS, Called, Obstacle, called, changed, foreign
from loralab.fast.decoder_layer import DecoderModules
from loralab.fast.encoder_layer import LayerModules
from loralab.fast.function import Joined, LayerFunction
from loralab.fast.joined import by_product
from loralab.fast.masks import has_own_streams
from loralab.fast.pre_norm_layer import PreNormModules
from loralab.fast.shared import LayerCall, ReadWeights, autocasts, no_autocast
from loralab.layer import FAST, Adapted, has_own_forward
from loralab.stores.float import Float
from loralab.stores.quantized import Quantized

try:  # hooks that transformers leaves on a model do nothing unless it collects outputs
    from transformers.utils.output_capturing import _active_collector as collector
except ImportError:
    collector = None

HARMLESS = {  # arguments of a call that change nothing of what a layer computes, whatever their value
    "attention_mask", "position_ids", "cache_position", "use_cache", "num_items_in_batch",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
ASKED = ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict")  # harmless where false
READ_ANEW = ("training", "p")  # attributes of modules that a block looks up at each call
COLLECTING = "transformers.utils.output_capturing"

TRACED = "torch.compile or torch.func traces the model"
OFF = Obstacle("the fast path was taken off since; call it again")

Modules = LayerModules | PreNormModules | DecoderModules
Find = Callable[[Any], Modules]  # layer -> its modules


class _Seen(NamedTuple):
    """What a module was when a block looked at it: its class, how it is called, its children, what else it holds."""

    module: nn.Module
    kind: type
    functions: tuple[Any, Any]  # forward and __call__ of its class
    children: tuple[nn.Module | None, ...]
    held: tuple[tuple[str, Any], ...]
    size: int  # of everything it holds

    @classmethod
    def of(cls, module: nn.Module) -> "_Seen":
        kind, held = type(module), [(key, value) for key, value in vars(module).items() if _is_held(key)]
        children = tuple(module._modules.values())
        return cls(module, kind, (kind.forward, kind.__call__), children, tuple(held), len(vars(module)))

    def changed(self) -> bool:
        now, kind = vars(self.module), self.kind
        return (
            type(self.module) is not kind
            or kind.forward is not self.functions[0]
            or kind.__call__ is not self.functions[1]
            or tuple(now["_modules"].values()) != self.children
            or len(now) != self.size
            or any((x := now.get(key)) is not value and not _is_same_number(x, value) for key, value in self.held)
        )


def _is_held(key: str) -> bool:
    return not key.startswith("_") and key not in READ_ANEW and key != "forward"


def _is_same_number(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and a == b


class Block:
    """Takes the place of a layer's `forward`; `find` says where the architecture has the parts of a layer."""

    def __init__(self, layer: nn.Module, find: Find, active: Active) -> None:
        self.layer, self.find, self.active = layer, find, active
        self.obstacle: Obstacle | None = None  # in the last call, and not in every one
        self.seen: list[_Seen] = []  # of a layer that is not read yet
        self._found = False

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward returns for these arguments; hidden_states (b, t, d)."""
        # checkpointing runs a layer without gradients first: the second time must draw the same dropout
        learning = torch.is_grad_enabled() or self.layer.training
        never = Obstacle(TRACED) if torch.compiler.is_compiling() else self._why_never(learning)  # reads no structure
        told = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        if len(args) > len(self.positional):
            never = Obstacle("more arguments are given than it names")
        self.obstacle = None if never else self._why_not_now(hidden_states, attention_mask, told, learning)
        self.active.check(len(hidden_states))
        if obstacle := never or self.obstacle:
            self._refuse_shared_dropout(obstacle)
            return type(self.layer).forward(self.layer, hidden_states, attention_mask, *args, **kwargs)
        given = self.modules.given(told)
        if self._checkpoints():
            out = self.layer._gradient_checkpointing_func(  # type: ignore[operator]
                partial(self._compute, mask=attention_mask, given=given), hidden_states
            )
        else:
            out = self._compute(hidden_states, attention_mask, given)
        return (out,) if self.modules.returns_tuple else out

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its layer anew, so that no function of a class need be pickled."""
        return {**vars(self), "seen": [], "called": [], "products": None}

    def why_plain(self) -> Obstacle | None:
        """Why the next training step of this layer takes its own forward; None if it does not, as far as is known."""
        return self._why_never(learning=True) or self._why_not_on(self._device(), self._all_names()) or self.obstacle

    # ---- computing -----------------------------------------------------------------------------------------------

    def _compute(self, x: Tensor, mask: Tensor | None, given: tuple[Tensor | None, ...]) -> Tensor:
        """The output (b, t, d) in the dtype of x; under autocast products run in autocast's dtype."""
        device, dtype = x.device.type, x.dtype
        if autocasts(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with no_autocast(device):
            out = self._in_one(x.to(dtype), _in_dtype(mask, dtype), [_in_dtype(t, dtype) for t in given])
        return out.to(x.dtype)

    def _in_one(self, x: Tensor, mask: Tensor | None, given: list[Any]) -> Tensor:
        m, products = self.modules, self.products
        read = ReadWeights(self.inner) if torch.is_grad_enabled() else None
        call, nothing = LayerCall(m, products, m.dropout, self.active.streams, read), [False] * len(products)
        if not call.wants_gradient and not self.active.drawn:
            joined = [product.active_update(self.active, x.dtype) for product in products]
            return m.compute(call, x, mask, given, Joined(joined, nothing))[0]
        updates = [layer.active_update() if isinstance(layer, Adapted) else None for layer in m.linear]
        flat = [t for u in updates for t in ((None, None, None) if u is None else u)]
        if call.wants_gradient:
            return LayerFunction.apply(call, x, mask, len(given), *given, *flat)  # type: ignore[no-untyped-call, no-any-return]
        own = by_product(flat, products)  # what was drawn for a training step holds in a pass without gradients too
        joined = [p.join(u, x.dtype) for p, u in zip(products, own, strict=True)]
        return m.compute(call, x, mask, given, Joined(joined, nothing))[0]

    def _checkpoints(self) -> bool:
        """Whether gradient checkpointing is up to this forward, as from transformers 5.2x on, and not to the call."""
        if not (getattr(self.layer, "gradient_checkpointing", False) and self.layer.training):
            return False
        if has_own_streams(self.active.streams) and any(self.modules.dropout):
            raise UserError("runs that share a pass draw their own dropout, which checkpointing would draw again")
        return type(self.layer).__call__ is nn.Module.__call__

    def _refuse_shared_dropout(self, obstacle: Obstacle) -> None:
        """Raise UserError where the layer's own attention would draw one dropout for rows of several runs."""
        if has_own_streams(self.active.streams) and (not self._found or self.modules.attention_p):
            raise UserError(f"runs cannot share a pass through the layer's own forward: {obstacle.text}")

    # ---- what the layer consists of ------------------------------------------------------------------------------

    def read_structure(self, moves: bool) -> None:
        """Find the modules again, as at the start and whenever one was replaced; `moves` lays weights side by side."""
        self.misfit: Obstacle | None = None
        self.inner = _inner(self.layer)
        self.seen = [_Seen.of(module) for module in (self.layer, *self.inner)]
        self.called: list[Called] = called((self.layer, *self.inner))
        self.positional = tuple(islice(signature(type(self.layer).forward).parameters, 3, None))
        configs = (module.__dict__.get("config") for module in self.inner)  # of the part that computes attention
        self.config = next((config for config in configs if config is not None), None)
        self._found = False
        try:
            self.modules = self.find(self.layer)
        except AttributeError as error:
            self.misfit = Obstacle(f"its parts are not where a {type(self.layer).__name__} has them: {error}")
            return
        except KeyError as error:
            self.misfit = Obstacle(str(error.args[0]))
            return
        self._found = True
        self.misfit = _misfit(self.modules, self.seen) or foreign((self.layer, *self.inner), self.called)
        if self.misfit is None:
            self.products = self.modules.products()
            adapted = [layer for layer in self.modules.linear if isinstance(layer, Adapted)]
            self.active = adapted[0].active if adapted else self.active
            if moves and self._obstacle_in_structure(learning=True) is None:
                for product in self.products:
                    product.put_side_by_side()

    # ---- what keeps the layer from being computed in one ---------------------------------------------------------

    def _why_never(self, learning: bool) -> Obstacle | None:
        """What stands in the way whatever the input: structure, hooks, attention, and with `learning` what learns."""
        placed: object = self.layer.__dict__.get(FAST)
        if placed is not self:
            return Obstacle("has a forward of its own", self.layer) if has_own_forward(self.layer) else OFF
        if not self.seen or any(seen.changed() for seen in self.seen) or changed(self.called):
            # weights that FSDP gathered for this pass are not to be moved
            self.read_structure(moves=not (distributed.is_available() and distributed.is_initialized()))
        return self._obstacle_in_structure(learning)

    def _obstacle_in_structure(self, learning: bool) -> Obstacle | None:
        """What stands in the way in the structure as it was read last."""
        if self.misfit is not None:
            return self.misfit
        for module in self.inner:
            if _has_hooks(module) and not _idle(module):
                return Obstacle("has a hook", module)
            if has_own_forward(module):
                return Obstacle("has a forward of its own", module)
            if learning:
                for key, p in module._parameters.items():
                    if p is not None and p.requires_grad:
                        return Obstacle(f"{key} learns", module)
        if _has_any_global_hook():
            return Obstacle("hooks on all modules of the process are set")
        return None if self._attention() in (None, *ATTENTIONS) else Obstacle(f"attention is {self._attention()}")

    def _attention(self) -> str | None:
        """What transformers calls the attention of this layer; None for a layer with no choice of it."""
        return getattr(self.config, "_attn_implementation", None)

    def _why_not_now(self, x: Tensor, mask: Tensor | None, told: Mapping[str, Any], learning: bool) -> Obstacle | None:
        """What stands in the way in this call; `told` are its other arguments."""
        if told.get("output_attentions"):
            return Obstacle("attention weights are asked for")
        if told.get("past_key_values") is not None:
            return Obstacle("a cache of keys and values is given")
        for key, value in told.items():
            harmless = key in HARMLESS or key in self.modules.reads or (key in ASKED and not value)
            if value is not None and not harmless:
                return Obstacle(f"{key} is given")
        if (text := self._misfit_of_mask(x, mask)) is not None:
            return Obstacle(text)
        given = self.modules.given(told)
        if learning and any(t is not None and t.requires_grad for t in (mask, *given)):
            return Obstacle("the positions or the mask learn")
        if (text := self.modules.misfit(x, mask, given)) is not None:
            return Obstacle(text)
        if (text := _traced()) is not None:
            return Obstacle(text)
        keywords = getattr(vars(self.layer).get("_gradient_checkpointing_func"), "keywords", {})
        if learning and keywords.get("context_fn") is not None:
            return Obstacle("checkpointing chooses what it keeps (context_fn)")
        for layer in self.modules.linear:
            if isinstance(layer, Adapted):
                for name in self.active.names:
                    recipe = layer.recipes.get(name)
                    if recipe is not None and not recipe.low_rank:
                        return Obstacle(f"{name} adds no low-rank product", layer)
                    if recipe is not None and recipe.dropout and layer.training:
                        return Obstacle(f"{name} drops a part of its input", layer)
        return self._why_not_on(x.device.type, self.active.names)

    def _misfit_of_mask(self, x: Tensor, mask: Tensor | None) -> str | None:
        """Why attention with this mask, or without one, is computed by the layer itself."""
        attention = self._attention()
        if mask is None:
            everywhere = self.modules.causal and attention == "eager" and x.shape[1] > 1
            return "no mask is given, and eager attention then looks ahead" if everywhere else None
        if mask.is_floating_point() or (mask.dtype == torch.bool and attention == "sdpa"):
            return None
        return f"a mask in {mask.dtype} is given"

    def _why_not_on(self, device: str, names: tuple[str, ...]) -> Obstacle | None:
        """Where another device than the CPU computes the layer's own forward faster (docs/decisions.md)."""
        if device == "cpu" or len(names) > 1 or has_own_streams(self.active.streams):
            return None
        adapted = [layer for layer in self.modules.linear if isinstance(layer, Adapted)]
        if any(layer.recipes[name].gain for layer in adapted for name in names if name in layer.recipes):
            return None
        return Obstacle(f"on {device} it pays with a gain (DoRA) or several adapters in a batch only")

    def _device(self) -> str:
        return next(self.layer.parameters()).device.type

    def _all_names(self) -> tuple[str, ...]:
        """Of every adapter with a part in this layer."""
        adapted = [layer for layer in self.modules.linear if isinstance(layer, Adapted)] if self._found else []
        return tuple(dict.fromkeys(name for layer in adapted for name in layer.recipes))


def _inner(layer: nn.Module) -> list[nn.Module]:
    """The modules inside a layer whose calls a block leaves out: all, of an adapted one itself and its base."""
    found: list[nn.Module] = []
    for child in layer.children():
        found.append(child)
        found += [child.base] if isinstance(child, Adapted) else _inner(child)
    return found


def _misfit(m: Modules, seen: Sequence[_Seen]) -> Obstacle | None:
    """What is not as the block computes it: a layer of a quantization package, a weight that is no parameter, say."""
    bases = [layer.base if type(layer) is Adapted else layer for layer in m.linear]
    classes = [
        *((base, (nn.Linear, Float, Quantized)) for base in bases),
        *m.checked,
    ]
    if (wrong := next((module for module, known in classes if type(module) not in known), None)) is not None:
        return Obstacle(f"is a {type(wrong).__name__}", wrong)
    for base in bases:
        weight = base._parameters.get("weight")
        if weight is not None and type(weight) not in (nn.Parameter, FakeTensor):
            return Obstacle(f"has a weight that is a {type(weight).__name__}", base)
    for one in seen:
        if _has_hooks(one.module):  # that is told, whatever the hook computes
            continue
        if (key := next((key for key, value in one.held if isinstance(value, Tensor)), None)) is not None:
            return Obstacle(f"has {key} as a tensor that is no parameter", one.module)
    with torch.no_grad(), _disable_current_modes():  # an estimate of memory has tensors without values
        x = torch.linspace(-4, 4, 9, dtype=torch.float64, device="cpu")
        same = torch.allclose(type(m.activation).forward(m.activation, x), m.activate(x), rtol=1e-9)
    return None if same else Obstacle("computes something else than its class", m.activation)


def _traced() -> str | None:
    """What follows or changes the operations of this call, and so would miss what a block does in one."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return TRACED
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces the model"
    if forward_ad._current_level >= 0:
        return "derivatives are taken forward (torch.autograd.forward_ad)"
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():
            if type(mode) is not DeviceContext:
                return f"a {type(mode).__name__} changes torch's functions"
    if torch._C._len_torch_dispatch_stack() and type(_get_current_dispatch_mode()).__module__ == checkpoint.__name__:
        return "checkpointing chooses what it keeps (context_fn)"
    return None


def _has_hooks(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _idle(module: nn.Module) -> bool:
    """Whether the only hooks of a module are those of transformers and it collects nothing now."""
    hooks = [
        hook
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in hooks.values()
    ]
    if module._backward_pre_hooks or any(getattr(hook, "__module__", None) != COLLECTING for hook in hooks):
        return False
    return collector is not None and not (collector.get() or {}).keys() - {"hidden_states", "_hidden_states_layers"}


def _in_dtype(added: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores, in that dtype: its lowest number stays a number, -inf stays that, a boolean mask too."""
    if added is None or added.dtype in (dtype, torch.bool):
        return added
    lowest = torch.finfo(dtype).min
    if torch.finfo(added.dtype).min >= lowest:
        return added.to(dtype)
    return torch.where(added.isinf(), added, added.clamp(min=lowest)).to(dtype)
