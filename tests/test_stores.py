"""Weights kept in few bits, against slow oracles: what is kept, what the product gives, what backward keeps."""

import copy
import sys

import pytest
import torch
from archs import build, rows, shake
from conftest import Largest
from scipy import stats
from torch.nn import functional as F

import loralab
from loralab.analysis import merge_errors
from loralab.errors import UserError
from loralab.optimizers import adamw
from loralab.recipe import recipe
from loralab.run.memory import tensor_bytes
from loralab.stores import STORES, nf4
from loralab.stores.int2 import EDGE, LEVELS
from loralab.stores.quantized import quantization_report

QUANTIZED = ["int8", "nf4", "nf4-dq", "int2"]
SIZES = [(13, 11), (37, 24), (64, 128)]  # less than three blocks and odd; blocks across rows; whole blocks
BITS = {"int8": 8.0417, "nf4": 4.5, "nf4-dq": 4.127, "int2": 2.5}  # of a 768 x 768 weight
ERROR = {"int8": 0.01, "nf4": 0.10, "nf4-dq": 0.10, "int2": 0.45}


def weight(out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(0.1, 3.0, out_features).unsqueeze(1)  # rows of different lengths
    W = torch.randn(out_features, in_features, generator=generator) * lengths
    return W, torch.randn(out_features, generator=generator)


def stored(store, size=(37, 24), bias=True):
    W, b = weight(*size)
    return W, STORES[store](W, b if bias else None)


def normal_levels():
    """The NF4 code book as QLoRA describes it: eight positive quantiles of a normal, zero, seven negative ones."""

    def quantiles(count):
        return [stats.norm.ppf(0.9677083 + (0.5 - 0.9677083) * i / count) for i in range(count)]

    levels = sorted([*quantiles(8), 0.0, *[-q for q in quantiles(7)]])
    return torch.tensor([level / max(levels) for level in levels], dtype=torch.float64)


def blockwise(W, levels, scale_of):
    """A block of 64 at a time: divide by its scale, take the nearest level, multiply."""
    flat, out = W.double().flatten(), []
    for block in flat.split(64):
        scale = scale_of(block)
        out += [levels[(value / scale - levels).abs().argmin()] * scale for value in block]
    return torch.stack(out).view(W.shape)


def test_the_code_book_of_nf4_is_the_paper_s():
    base = STORES["nf4"](torch.linspace(-1, 1, 64).view(8, 8), None)
    found = base.dense().unique().double()
    torch.testing.assert_close(found, normal_levels(), rtol=0, atol=1e-6)
    printed = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    printed += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    torch.testing.assert_close(found, torch.tensor(printed).double(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", SIZES)
def test_nf4_is_the_nearest_of_16_levels_in_blocks_of_64(size):
    W, base = stored("nf4", size)
    expected = blockwise(W, normal_levels(), lambda block: block.abs().max())
    torch.testing.assert_close(base.dense().double(), expected, rtol=0, atol=1e-6 * float(W.abs().max()))


@pytest.mark.parametrize("size", SIZES)
def test_double_quantization_changes_the_scale_of_a_block_a_little_and_nothing_else(size):
    W, base = stored("nf4-dq", size)
    once = STORES["nf4"](W, None)
    assert torch.equal(base.get_buffer("codes"), once.get_buffer("codes"))
    ratio = (base.dense() / once.dense()).flatten().split(64)  # a level of zero gives nan
    scales = torch.stack([block.nanmedian() for block in ratio])
    for block, scale in zip(ratio, scales, strict=True):
        torch.testing.assert_close(block[~block.isnan()], scale.expand((~block.isnan()).sum()), rtol=1e-5, atol=0)
    absmax = once.get_buffer("absmax").view(torch.float32)
    away = (scales * absmax - absmax).abs().max()
    assert 0 < away < 0.02 * (absmax - absmax.mean()).abs().max()  # 8 bits of what is left when the mean is taken


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_encoded_part_by_part_is_what_bitsandbytes_makes_of_it_whole(double, monkeypatch):
    monkeypatch.setattr(nf4, "AT_ONCE", 7)  # 61 x 67 values are 64 blocks, the last one padded
    W = torch.randn(61, 67, generator=torch.Generator().manual_seed(3))
    codes, state = nf4.library().quantize_4bit(
        F.pad(W.flatten(), (0, 9)), blocksize=64, quant_type="nf4", compress_statistics=double
    )
    kept = nf4.encode(W, double)
    assert torch.equal(kept["codes"], codes)
    if double:
        assert torch.equal(kept["absmax_codes"], state.absmax)
        assert torch.equal(kept["absmax_scale"], state.state2.absmax)
        torch.testing.assert_close(kept["absmax_mean"], state.offset, rtol=0, atol=0)
    else:
        assert torch.equal(kept["absmax"], state.absmax)


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_the_nearest_whole_number_of_127ths_of_the_largest_in_a_row(size):
    W, base = stored("int8", size)
    expected = []
    for row in W.double():
        scale = row.abs().max() / 127
        expected.append(torch.tensor([round(float(value / scale)) for value in row], dtype=torch.float64) * scale)
    torch.testing.assert_close(base.dense().double(), torch.stack(expected), rtol=1e-6, atol=1e-9)
    assert base.get_buffer("codes").dtype == torch.int8


@pytest.mark.parametrize("size", SIZES)
def test_int2_is_the_nearest_of_4_levels_of_the_root_mean_square_of_a_block(size):
    W, base = stored("int2", size)
    expected = blockwise(W, torch.tensor(LEVELS, dtype=torch.float64), lambda block: block.square().mean().sqrt())
    torch.testing.assert_close(base.dense().double(), expected, rtol=1e-6, atol=1e-6)


def test_the_levels_of_int2_are_the_k_means_of_a_normal():
    inner, outer = 0.1, 3.0
    for _ in range(500):
        edge = (inner + outer) / 2
        inner = (stats.norm.pdf(0) - stats.norm.pdf(edge)) / (stats.norm.cdf(edge) - 0.5)
        outer = stats.norm.pdf(edge) / stats.norm.sf(edge)
    assert pytest.approx([-outer, -inner, inner, outer], abs=1e-6) == LEVELS
    assert pytest.approx((inner + outer) / 2, abs=1e-6) == EDGE


@pytest.mark.parametrize("store", QUANTIZED)
def test_a_weight_of_zeros_stays_zero_and_what_is_not_finite_is_not_hidden(store):
    W = torch.zeros(13, 11)
    assert torch.equal(STORES[store](W, None).dense(), W)
    W[3, 4] = torch.nan
    assert STORES[store](W, None).dense().isnan().any()


# ---- the product ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", QUANTIZED)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_the_product_is_that_of_the_dense_weight_and_so_is_its_gradient(store, size, lead):
    _, base = stored(store, size)
    x = torch.randn(*lead, size[1], requires_grad=True)
    ours, theirs = base(x), F.linear(x, base.dense(), base.bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(base.linear(x), F.linear(x, base.dense()), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(base.square_norms(), base.dense().square().sum(1))


@pytest.mark.parametrize("store", QUANTIZED)
@pytest.mark.parametrize("learned", [(True, False), (False, True), (True, True)])
def test_gradients_are_finite_differences(store, learned):
    _, base = stored(store, (13, 11))
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=learned[0])
    bias = torch.randn(13, dtype=torch.float64, requires_grad=learned[1])
    assert torch.autograd.gradcheck(base.linear, (x, bias))
    torch.testing.assert_close(base.linear(x, bias), F.linear(x, base.dense().double(), bias))


@pytest.mark.parametrize("store", QUANTIZED)
def test_the_product_is_in_the_dtype_of_x_or_of_autocast(store):
    _, base = stored(store)
    x = torch.randn(5, 24)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        y = base(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y, F.linear(x.to(dtype), base.dense().to(dtype), base.bias.to(dtype)))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = base(x), F.linear(x, base.dense(), base.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    ones = torch.ones_like(y)
    torch.testing.assert_close(x.grad, (ones @ base.dense().bfloat16()).float(), rtol=1e-2, atol=1e-2)


def kept_for_backward(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("store", QUANTIZED)
def test_backward_keeps_nothing_dense(store):
    _, base = stored(store, (64, 128))
    x = torch.randn(3, 128, requires_grad=True)
    assert [t.shape for t in kept_for_backward(lambda: F.linear(x, base.dense(), base.bias)) if t.numel() == 64 * 128]
    assert kept_for_backward(lambda: base(x)) == []
    for method in ("lora", "dora"):
        model = build("bert")
        adapters = loralab.attach(model, method, store=store, rank=2)
        layer = next(layer for layer in adapters.layers.values() if layer.out_features == 37)
        z = torch.randn(3, 24, requires_grad=True)
        assert all(t.numel() < 37 * 24 for t in kept_for_backward(lambda layer=layer, z=z: layer(z)))


# ---- as a module ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", QUANTIZED)
def test_bits_per_weight_are_counted_from_all_that_is_kept(store):
    _, base = stored(store, (768, 768), bias=False)
    report = quantization_report(torch.nn.ModuleDict({"layer": base}))["layer"]
    assert report.values == 768 * 768
    assert report.bytes == tensor_bytes([*base.parameters(), *base.buffers()])
    assert report.bits == pytest.approx(BITS[store], abs=1e-3)


@pytest.mark.parametrize("store", QUANTIZED)
@pytest.mark.parametrize("size", SIZES)
def test_the_error_reported_is_that_of_the_weight(store, size):
    W, base = stored(store, size)
    assert base.error == pytest.approx(float((W - base.dense()).norm() / W.norm()), rel=1e-5)
    assert 0 < base.error < ERROR[store]


def test_the_report_of_a_model_names_the_layers_it_stores():
    model = build("bert")
    adapters = loralab.attach(model, "qlora", targets="attention-qv", rank=2)
    report = quantization_report(model)
    assert sorted(report) == sorted(adapters.spec(None).paths)
    assert quantization_report(adapters) == report
    assert quantization_report(build("bert")) == {}


@pytest.mark.parametrize("store", QUANTIZED)
def test_copies_casts_and_state_dicts_keep_every_bit(store):
    _, base = stored(store)
    dense = base.dense()
    assert torch.equal(copy.deepcopy(base).dense(), dense)
    for cast in ("half", "bfloat16", "double"):
        assert torch.equal(getattr(copy.deepcopy(base), cast)().dense(), dense)
    _, other = weight(37, 24, seed=1)[0], STORES[store](weight(37, 24, seed=1)[0], weight(37, 24, seed=1)[1])
    other.load_state_dict(base.state_dict())
    assert torch.equal(other.dense(), dense)
    assert base.to("meta").get_buffer("codes").device.type == "meta"


@pytest.mark.parametrize("store", QUANTIZED)
def test_a_gain_over_a_quantized_base_takes_the_norm_of_the_weight_as_kept(store):
    adapters = loralab.attach(build("bert"), "dora", store=store, rank=3)
    layer = next(layer for layer in adapters.layers.values() if layer.out_features == 37)
    fresh = layer.lower("default").gain
    assert torch.equal(fresh, torch.ones(37))
    shake(adapters, "default")
    u = layer.lower("default")
    lengths = (layer.base.dense() + u.B @ u.A).norm(dim=1)
    torch.testing.assert_close(u.gain * lengths, layer.roles("default")["m"], rtol=1e-4, atol=1e-5)


def test_a_model_without_biases_can_be_stored():
    model = build("llama")
    adapters = loralab.attach(model, "qdora", head=True, rank=2)
    shake(adapters, "default")
    out = model(**rows()).logits
    out.sum().backward()
    assert all(t.grad is not None for t in adapters.state().values() if t.requires_grad)
    torch.testing.assert_close(adapters.merge()(**rows()).logits, out, rtol=0, atol=1e-4)


def test_without_bitsandbytes_the_error_says_what_to_install_and_the_model_is_as_it_was(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    model, before = build("bert"), build("bert")
    with pytest.raises(loralab.UserError, match=r"pip install loralab\[quant\]"):
        loralab.attach(model, "qlora")
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert all(p.requires_grad for p in model.parameters())
    loralab.attach(model, "lora", store="int8")


def test_training_moves_the_adapter_and_no_bit_of_the_base():
    model = build("bert")
    adapters = loralab.attach(model, "qlora", head=True, rank=2)
    before = {key: t.clone() for key, t in model.named_buffers()}
    optimizer = adamw(adapters.parameter_groups(lr=1e-2))
    losses = []
    for _ in range(20):
        loss = model.train()(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(t, before[key]) for key, t in model.named_buffers())


# ---- merging -------------------------------------------------------------------------------------------------------


def test_a_merge_is_dequantized_plus_update_in_float32_then_rounded_once():
    model = build("bert").bfloat16()
    adapters = loralab.attach(model, "qlora", targets="attention-qv", rank=3)
    shake(adapters, "default")
    path = adapters.spec(None).paths[0]
    layer = adapters.layers[path]
    u = layer.lower("default")
    W = layer.base.dense() + u.B @ u.A
    assert torch.equal(adapters.merge().get_submodule(path).weight, W.bfloat16())
    assert torch.equal(adapters.merge(dtype="float32").get_submodule(path).weight, W)
    for dtype in ("float32", torch.bfloat16, "float16"):
        merged = adapters.merge(dtype=dtype)
        assert {str(p.dtype).removeprefix("torch.") for p in merged.parameters()} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("dtype", ["nf4", "nf4-dq", "int8", torch.int8, "float64"])
def test_a_merge_into_few_bits_is_refused(dtype):
    adapters = loralab.attach(build("bert"), "qlora", rank=2)
    with pytest.raises(loralab.UserError, match="float32, bfloat16, float16; fewer bits"):
        adapters.merge(dtype=dtype)


@pytest.mark.parametrize("store", [None, *QUANTIZED])
def test_the_errors_of_merging_grow_with_what_is_rounded_away(store):
    model = build("bert")
    adapters = loralab.attach(model, "lora", head=True, rank=3, store=store)
    shake(adapters, "default", std=0.05)
    errors = merge_errors(adapters, None, rows())
    again = [] if store is None else [f"{store}, quantized again"]
    assert list(errors) == ["float32", "bfloat16", "float16", *again]
    assert errors["float32"] < 1e-5 < errors["float16"] < errors["bfloat16"]
    if store in ("nf4", "nf4-dq", "int2"):
        assert errors[again[0]] > 2 * errors["bfloat16"]


# ---- the optimizer -------------------------------------------------------------------------------------------------


def test_paging_says_that_it_does_nothing_on_cpu_and_changes_no_result():
    results = []
    for paged in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.1, "role": "B"}]
        if paged:
            with pytest.warns(UserWarning, match="paged=True does nothing on cpu"):
                optimizer = adamw(groups, paged=True)
        else:
            optimizer = adamw(groups)
        p.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(3))


@pytest.mark.parametrize(
    ("method", "store", "told"),
    [
        ("qlora", "int8", "choose method='lora' with store='int8'"),
        ("qlora", "nf4", "choose method='lora' with store='nf4'"),
        ("qdora", None, "choose method='dora'$"),
    ],
)
def test_a_method_whose_name_is_its_store_takes_no_other(method, store, told):
    with pytest.raises(UserError, match=f"method '{method}' means W kept in nf4-dq.*{told}"):
        recipe(method, store=store)


@pytest.mark.parametrize(
    ("method", "store"), [("qlora", "nf4-dq"), ("lora", "int8"), ("loftq", "int2"), ("dora", None)]
)
def test_its_own_store_may_be_said_and_other_methods_take_any(method, store):
    assert recipe(method, store=store).store == store


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("bias", [True, False])
def test_no_row_of_a_slice_or_a_transposed_input_gets_a_weight_of_its_own(store, bias):
    """torch copies a frozen W for each of b where x (b, t, in) cannot be seen as (b t, in)."""
    W, b = weight(37, 24)
    base = STORES[store](W, b if bias else None)
    for x in (torch.randn(9, 4, 24)[:, -1:], torch.randn(9, 24, 2).mT):
        x = x.requires_grad_()
        with Largest() as largest:
            y = base(x)
            y.backward(torch.randn(y.shape[-1], *y.shape[:-1]).movedim(0, -1).to(y.dtype))
        assert largest.values < 2 * W.numel()
        torch.testing.assert_close(y, base(x.clone(memory_format=torch.contiguous_format)), rtol=1e-5, atol=1e-5)
