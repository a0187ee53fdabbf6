"""What a user or a library does to a model beside training it: the fast path follows exactly, or refuses with a reason.

Forwards and arguments of others, weights that change between the passes, what is saved, tensors in place of numbers.
The right value comes from the plain path, in float64.
"""

import copy
import functools
import re
import types

import pytest
import torch
from archs import shake
from safetensors.torch import load_file
from test_fast import double
from test_fast_calls import KINDS, alike, given, made, pads, passed
from test_fast_decoders import exact  # noqa: F401
from test_fast_encoders import exact as exact_positions  # noqa: F401
from test_odd_modules import one_process  # noqa: F401 (fixture)
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import loralab
from loralab import adapters as handles
from loralab.fast import prepare
from loralab.fast.layers import layers_of

pytestmark = pytest.mark.usefixtures("exact")
ORDERS = ["wrap, fast", "wrap, fast, off", "fast, wrap", "fast, wrap, fast", "fast, wrap, off"]
SOME = ["bert", "mpnet", "modernbert", "llama", "gemma"]


def obstacles(model):
    """Why each layer takes its own forward, as texts."""
    return [None if (why := layer.forward.why_plain()) is None else why.text for layer in layers_of(model)]


# ---- forwards of others ----------------------------------------------------------------------------------------------


def louder(forward):
    def loud(*args, **kwargs):
        out = forward(*args, **kwargs)
        return tuple(1.5 * t for t in out) if isinstance(out, tuple) else 1.5 * out

    return loud


def wrap(module):
    """Put a function around the forward of one module, as hooks of accelerate do."""
    module.forward = louder(module.forward)


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize(
    "order", ["wrap, fast", "fast, wrap", "fast, wrap, fast", "fast, wrap, off", "wrap, fast, off"]
)
def test_a_forward_of_somebody_else_stays(kind, order):
    """It was overwritten by `fast()`, and `speed="off"` or a second call deleted it."""
    plain, _, _ = made(kind, False)
    quick, _, _ = made(kind, False)
    wrap(layers_of(plain)[0])
    wrap(dropout_of(plain))
    for step in order.split(", "):
        if step == "wrap":
            wrap(layers_of(quick)[0])
            wrap(dropout_of(quick))
        else:
            choices = prepare(quick, "off" if step == "off" else "auto")
    batch = given(kind, attention_mask=pads("right"))
    alike(passed(quick, batch), passed(plain, batch))
    if order == "wrap, fast":
        assert re.search(r"1 of \d layers take their own forward: \S+ has a forward of its own", str(choices))
    handles.of(quick).detach()
    assert "forward" in vars(layers_of(quick)[0])


def dropout_of(model):
    """A dropout that the first layer calls, or one beside the layers, so that every model has one."""
    own = [m for m in layers_of(model)[0].modules() if type(m) is nn.Dropout]
    model.beside = nn.Dropout(0.0)
    return (own or [model.beside])[0]


def test_dropout_is_that_of_torch_where_torch_is_changed(monkeypatch):
    model, _, _ = made("bert", True)
    x, drop = torch.randn(5, 7), next(m for m in model.modules() if type(m) is nn.Dropout)
    drop.train().p = 0.5
    assert (drop(input=x) == 0).any()
    drop.inplace = True
    changed = x.clone()
    drop(changed)
    assert (changed == 0).any()  # its result is not used
    drop.inplace = False
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *_: 3 * x)
    torch.testing.assert_close(drop(x), 3 * x)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: 2 * x)
    torch.testing.assert_close(drop(x), 2 * x)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])
def test_an_argument_that_attention_reads_is_not_dropped(kind):
    bias = torch.randn(5, 1, 9, 9, generator=torch.Generator().manual_seed(3)).double()
    (plain, _, _), (quick, _, _) = made(kind, False), made(kind, True)
    without = passed(plain, given(kind))
    for model in (plain, quick):
        model.set_attn_implementation("sdpa")
    right = passed(plain, given(kind, position_bias=bias))
    assert not torch.allclose(right[0], without[0], atol=1e-6)
    alike(passed(quick, given(kind, position_bias=bias)), right)
    alike(passed(quick, given(kind)), without)
    assert obstacles(quick) == [None] * len(layers_of(quick))


@pytest.mark.parametrize("more", [{"scaling": 0.5}, {"query": 1}, {"dropout": 0.5}])
def test_an_argument_that_attention_refuses_is_refused(more):
    for quick in (False, True):
        with pytest.raises(TypeError, match=next(iter(more))):
            made("llama", quick)[0](**given("llama", **more))


# ---- between the passes ----------------------------------------------------------------------------------------------


def in_place(parent, key):
    with torch.no_grad():
        getattr(parent, key).mul_(2)


def by_data(parent, key):
    parent._parameters[key].data = 2 * getattr(parent, key).data


def anew(parent, key):
    setattr(parent, key, nn.Parameter(2 * getattr(parent, key).detach(), requires_grad=False))


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("change", [in_place, by_data, anew])
@pytest.mark.parametrize("of", ["base", "norm"])
def test_a_weight_that_changes_before_backward_is_no_other_gradient(kind, change, of):
    """Backward read the weights anew: the gradient was that of other weights than the loss."""
    model, _, _ = made(kind, True)
    batch = given(kind)
    before = passed(model, batch)
    loss = model.train()(**batch).logits.sum()
    inside = [m for m in layers_of(model)[1].modules() if isinstance(m._parameters.get("weight"), nn.Parameter)]
    norms = [m for m in inside if m.weight.ndim == 1]
    parent = norms[0] if of == "norm" else next(m for m in inside if m.weight.ndim == 2 and m not in norms)
    change(parent, "weight")
    with pytest.raises(loralab.UserError, match="changed between the forward and the backward pass"):
        loss.backward()
    assert passed(model, batch)[0].shape == before[0].shape  # the next step is one of the new weights


def test_an_output_can_be_changed_in_place():
    for kind in SOME:
        results = []
        for quick in (False, True):
            model, _, _ = made(kind, quick)
            layers_of(model)[0].register_forward_hook(lambda m, args, out: add_half(out))
            results.append(passed(model, given(kind)))
        alike(results[1], results[0])


def add_half(out):
    (out[0] if isinstance(out, tuple) else out).add_(0.5)


# ---- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME)
def test_no_weight_shares_its_storage_with_another(kind, tmp_path):
    """accelerate and safetensors take tensors of one storage for tied, and write one of them."""
    accelerate = pytest.importorskip("accelerate")
    model, adapters, _ = made(kind, True)
    passed(model, given(kind))
    names = set(model.state_dict())
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    tied = set(model.all_tied_weights_keys)
    assert names - set(load_file(tmp_path / "model.safetensors")) <= tied
    adapters.detach()
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "plain"))
    assert set(model.state_dict()) - set(load_file(tmp_path / "plain/model.safetensors")) <= tied
    assert all(p.untyped_storage().nbytes() == p.numel() * p.itemsize for p in model.parameters())


def test_shared_memory_stays_shared():
    model, _, _ = made("bert", False)
    model.share_memory()
    prepare(model)
    passed(model, given("bert"))
    assert all(p.is_shared() for p in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("order", ["fast, divide", "divide, fast"])
@pytest.mark.usefixtures("one_process")
def test_a_base_that_fsdp_divides_is_read_where_it_is_now(kind, order):
    """Weights that FSDP had gathered were laid anew, and later edits of the base were not seen."""
    from torch.distributed.fsdp import fully_shard

    results = []
    for quick in (False, True):
        model, _, _ = made(kind, False)
        for step in order.split(", "):
            if step == "fast" and quick:
                prepare(model)
            elif step == "divide":
                for module in (*layers_of(model), model):
                    fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        found = []
        for _ in range(3):
            found.append(passed(model, given(kind))[0].detach())
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith("base.weight"):
                        p.mul_(1.1)
        assert (found[0] - found[2]).abs().max() > 1e-3
        results.append(found)
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-9 * plain.abs().max().item())


# ---- values that are not numbers -------------------------------------------------------------------------------------


def attention(model):
    layer = layers_of(model)[1]
    return layer.attention.self if hasattr(layer, "attention") else layer.self_attn


def set_scaling(value):
    def change(model):
        model.set_attn_implementation("eager")
        attention(model).scaling = value

    return change


def weight_of_a_norm(model):
    norm = next(m for m in layers_of(model)[1].modules() if "Norm" in type(m).__name__)
    weight = 2 * norm.weight.detach()
    del norm.weight
    norm.weight = weight


def other_activation(model):
    part = layers_of(model)[1]
    part = part.intermediate.intermediate_act_fn if hasattr(part, "intermediate") else part.mlp.act_fn
    part.forward = types.MethodType(lambda self, x: torch.relu(x), part)


def inside_of_the_activation(model):
    layers_of(model)[1].intermediate.intermediate_act_fn.act = torch.relu


def config_of_one_layer(model):
    own = attention(model)
    own.config = copy.deepcopy(own.config)
    own.config._attn_implementation = "flex_attention"


CHANGES = [
    *((kind, set_scaling(value)) for kind in ("bert", "llama") for value in (0.7, torch.tensor(0.7).double())),
    ("bert", set_scaling(torch.tensor([0.1, 0.2, 0.3]).double().view(3, 1, 1))),
    *((kind, change) for kind in ("bert", "llama") for change in (weight_of_a_norm, other_activation)),
    ("bert", inside_of_the_activation),
]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
@pytest.mark.parametrize("when", ["before", "after", "after a step"])
def test_what_stands_in_the_place_of_a_number_or_a_parameter_is_followed(kind, change, when):
    (plain, _, _), (quick, _, _) = made(kind, False), made(kind, when != "before")
    if when == "after a step":
        passed(quick, given(kind))
    untouched = passed(plain, given(kind))
    for model in (plain, quick):
        change(model)
    if when == "before":
        prepare(quick)
    right = passed(plain, given(kind))
    assert not torch.allclose(right[0], untouched[0], atol=1e-6)
    alike(passed(quick, given(kind)), right)


def test_a_config_of_one_layer_is_asked():
    model, _, _ = made("bert", True)
    passed(model, given("bert"))
    config_of_one_layer(model)
    assert obstacles(model) == [None, "attention is flex_attention"]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_learned_temperature_learns(kind):
    model, _, _ = made(kind, True)
    model.set_attn_implementation("eager")
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    attention(model).scaling = 0.3 * torch.exp(t)
    passed(model, given(kind))
    assert t.grad is not None
    assert t.grad.abs() > 0


# ---- what follows every operation ------------------------------------------------------------------------------------


class Doubled(torch.overrides.TorchFunctionMode):
    """Doubles what attention gives."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.nn.functional.scaled_dot_product_attention else out


@pytest.mark.parametrize("kind", SOME)
def test_a_mode_that_changes_functions_of_torch_is_followed(kind):
    results = []
    for quick in (False, True):
        model, _, _ = made(kind, quick)
        model.set_attn_implementation("sdpa")
        with Doubled():
            results.append(passed(model, given(kind)))
        with torch.device("cpu"):  # a mode too, which changes nothing here
            passed(model, given(kind))
        assert not quick or obstacles(model) == [None] * len(layers_of(model))
    alike(results[1], results[0])


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_checkpointing_that_chooses_what_it_keeps(kind):
    results = []
    for quick in (False, True):
        model, _, _ = made(kind, quick)
        choose = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": choose})
        results.append(passed(model, given(kind)))
    alike(results[1], results[0])


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_rank_that_is_drawn_for_a_step_is_that_of_both_its_passes(kind, reentrant):
    """The first pass of reentrant checkpointing has no gradients: it ran at full rank, backward at the drawn one."""
    drawn = set()
    for seed in range(3):
        results = []
        for quick in (False, True):
            model = KINDS[kind](kind)
            adapters = loralab.attach(model, "dylora", rank=6, alpha=5.0, targets="all-linear", seed=seed)
            shake(adapters, "default")
            double(model, adapters)
            if quick:
                prepare(model)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            results.append(passed(model, given(kind)))
            drawn |= set(adapters.active.drawn.values())
        alike(results[1], results[0])
    assert drawn - {6}, "the full rank says nothing"


# ---- models of other kinds -------------------------------------------------------------------------------------------


def test_a_model_that_takes_numbers_keeps_its_dtype():
    """Its frozen layers were rounded to bfloat16, and met inputs in float32."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    adapters = loralab.attach(model, "lora", rank=2, targets=["2"])
    choices = adapters.fast("bfloat16", quiet=True)
    assert (choices.store, choices.autocast) == (None, True)
    model(torch.randn(2, 8)).sum().backward()


def test_codes_are_neither_adapted_nor_rounded():
    """float8 weights have their scale elsewhere: as numbers they were off by a factor of thousands."""
    model, adapters, _ = made("llama", False)
    adapters.detach()
    codes = layers_of(model)[0].mlp.up_proj
    codes.weight = nn.Parameter(codes.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(loralab.UserError, match="kept in float8_e4m3fn"):
        loralab.attach(model, "lora", rank=2, targets=["model.layers.0.mlp.up_proj"])
    adapters = loralab.attach(model, "lora", rank=2, targets="attention-qv")
    adapters.fast("bfloat16", quiet=True)
    assert codes.weight.dtype == torch.float8_e4m3fn


def test_attach_inside_inference_mode_is_refused():
    model = KINDS["bert"]("bert")
    with torch.inference_mode(), pytest.raises(loralab.UserError, match="attach before it"):
        loralab.attach(model, "lora", rank=2)
    loralab.attach(model, "lora", rank=2)
