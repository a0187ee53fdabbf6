"""Layer kinds in the normal form: merge = forward, gradients, mixed batches, files, and PEFT's function of each."""

import copy
import json
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import loralab
from loralab import kinds
from loralab.merging import TieNote
from loralab.methods.starts import STARTS
from loralab.read_past import read_by


class Same(nn.Linear):
    """Another way to compute W x + b."""

    def forward(self, x):
        y = torch.einsum("...i,oi->...o", x, self.weight)
        return y if self.bias is None else y + self.bias


class Rounding(nn.Linear):
    """Not linear in its weight."""

    def forward(self, x):
        return F.linear(x, self.weight.sign() * self.weight.abs().sqrt(), self.bias)


class Pair(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias), x


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.5


class Positions(nn.Embedding):
    """As BART's: it makes the numbers itself, and they are one row for all."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]).unsqueeze(0) + 2)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


LAYERS = {  # name -> (layer, its input)
    "linear subclass": (lambda: Same(7, 5), lambda: torch.randn(3, 4, 7)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=1), lambda: torch.randint(0, 11, (3, 4))),
    "scaled embedding": (lambda: Scaled(11, 6), lambda: torch.randint(0, 11, (3, 4))),
    "positions": (lambda: Positions(11, 6), lambda: torch.randint(0, 11, (3, 4))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(3, 4, 9)),
    "conv1d reflected": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect"),
                         lambda: torch.randn(3, 4, 9)),
    "causal conv1d": (lambda: Causal(4, 6, 3), lambda: torch.randn(3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, (2, 3), stride=(2, 1), bias=False), lambda: torch.randn(3, 3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, stride=2), lambda: torch.randn(3, 2, 4, 4, 4)),
}  # fmt: skip
METHODS = ["lora", "rslora", "dora", "vera", "pissa", "lokr"]


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def moved(handle, name, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role, t in handle.tensors(name).values():
            if role not in ("A0", "B0", "head") and t.is_floating_point():
                t.add_(0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype))


def made(key, method="lora", seed=0):
    """(model, handle, x) in float64 with a moved adapter `a`."""
    torch.manual_seed(seed)
    layer, x = (make() for make in LAYERS[key])
    model = Around(layer).double()
    handle = loralab.attach(model, method, name="a", targets=["layer"], rank=2)
    model.double()
    moved(handle, "a")
    return model, handle, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", LAYERS)
def test_merge_is_forward_and_a_fresh_adapter_changes_nothing(key, method):
    torch.manual_seed(0)
    layer, x = (make() for make in LAYERS[key])
    x = x.double() if x.is_floating_point() else x
    model = Around(layer).double()
    before = model(x)
    handle = loralab.attach(model, method, name="a", targets=["layer"], rank=2)
    model.double()
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    moved(handle, "a")
    y = model(x)
    assert (y - before).abs().max() > 1e-2
    plain = handle.merge()
    assert type(plain.layer) is type(layer)
    torch.testing.assert_close(plain(x), y, rtol=0, atol=1e-10)
    handle.detach()
    assert model.layer is layer
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("key", LAYERS)
def test_gradients_are_those_of_a_dense_weight(key):
    model, handle, x = made(key)
    x = x if x.is_floating_point() else x.clamp(2)  # what pads is left out of the gradient of a whole table
    plain = copy.deepcopy(handle.layers["layer"].original[0])
    A, B = (t.detach().clone().requires_grad_() for t in handle.state().values())
    D = 16 / 2 * B @ A
    D = D.T if isinstance(plain, nn.Embedding) else D.reshape(plain.weight.shape)
    weights = torch.randn(model(x).shape, dtype=torch.float64)
    right = functional_call(plain, {"weight": plain.weight.detach() + D}, (x,))
    (weights * right).sum().backward()
    (weights * model(x)).sum().backward()
    torch.testing.assert_close(model(x), right, rtol=0, atol=1e-10)
    for t, own in zip(handle.state().values(), (A, B), strict=True):
        torch.testing.assert_close(t.grad, own.grad, rtol=0, atol=1e-10)


def test_what_pads_learns_no_column_of_A_as_in_peft():
    model, handle, _ = made("embedding")
    model(torch.tensor([[1, 3], [1, 1]])).sum().backward()
    columns = handle.state()["layer.A"].grad.abs().sum(0)
    assert columns[3] > 0
    assert columns[1] == 0


@pytest.mark.parametrize("key", LAYERS)
def test_rows_of_several_adapters_are_the_rows_alone(key):
    model, handle, x = made(key, "dora")
    handle.add("b", "lora", targets=["layer"], rank=1)
    handle.add("c", "lokr", targets=["layer"], rank=2)
    model.double()
    moved(handle, "b", 4), moved(handle, "c", 5)
    ids = [1, 0, 1]
    for names in (["a", "b"], ["c", "b"]):
        with handle.use(names, ids=ids):
            mixed = model(x)
        for row, i in enumerate(ids):
            with handle.use(names[i]):
                alone = model(x)
            torch.testing.assert_close(mixed[row], alone[row % len(alone)], rtol=0, atol=1e-10)
    with handle.use(None):
        assert (model(x) - mixed).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
@pytest.mark.parametrize("key", LAYERS)
def test_files_hold_every_kind(key, method, tmp_path):
    model, handle, x = made(key, method)
    handle.save(tmp_path / "own")
    fresh = Around(copy.deepcopy(handle.merge().layer)).double()
    with torch.no_grad():
        fresh.layer.load_state_dict(handle.layers["layer"].original[0].state_dict())
    loralab.load(fresh, tmp_path / "own")
    fresh.double()
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-5)


OF_PEFT = [key for key in LAYERS if key not in ("positions", "conv1d reflected", "scaled embedding", "causal conv1d")]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("key", OF_PEFT)
def test_peft_computes_the_same_both_ways(key, dora, tmp_path):
    """Without PEFT's own gaps: it forgets dilation, padding modes and subclasses of embeddings and convolutions."""
    if dora and key == "conv3d":
        pytest.skip("PEFT has no DoRA of it in this form")
    model, handle, x = made(key, "dora" if dora else "lora")
    base = Around(copy.deepcopy(handle.layers["layer"].original[0]))
    handle.export(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").double()
        torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
    loralab.load(base, tmp_path / "theirs")
    base.double()
    torch.testing.assert_close(base(x), model(x), rtol=0, atol=1e-5)


# ---- refused by name -------------------------------------------------------------------------------------------------


def packed(path):
    """A layer that stands in for one of a package that is not installed: its module and name, codes in a buffer."""
    module, _, name = path.rpartition(".")

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.register_buffer("qweight", torch.zeros(1, 6, dtype=torch.int32))

        def forward(self, x):
            return x[..., :6]

    Packed.__module__, Packed.__name__ = module, name
    return Packed


class Codes(torch.Tensor):
    """A weight that stands in for one of torchao: the layer is an nn.Linear."""


Codes.__module__ = "torchao.quantization.quantize_.workflows.int8.int8_tensor"


def of_codes():
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Codes), requires_grad=False)
    return layer


def torchao():
    """The real one, where it is installed."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(8, 6))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


def hqq():
    """The real one, where it is installed."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=8)
    return quantize.HQQLinear(nn.Linear(8, 8), config, compute_dtype=torch.float32, device="cpu")


REFUSED = {
    "rounding": (lambda: Rounding(8, 8), "is not W x"),
    "pair": (lambda: Pair(8, 8), "something else than one tensor"),
    "standardized": (lambda: Standardized(8, 8, 1), "is not W x"),
    "grouped": (lambda: nn.Conv1d(8, 8, 1, groups=4), "4 groups"),
    "normed": (lambda: nn.Embedding(8, 8, max_norm=1.0), "max_norm"),
    "gptq": (packed("gptqmodel.nn_modules.qlinear.torch.TorchQuantLinear"), "TorchQuantLinear is a layer of GPTQ"),
    "auto-gptq": (packed("auto_gptq.nn_modules.qlinear.qlinear_cuda.QuantLinear"), "QuantLinear is a layer of GPTQ"),
    "awq": (packed("awq.modules.linear.gemm.WQLinear_GEMM"), "WQLinear_GEMM is a layer of AWQ"),
    "hqq": (packed("hqq.core.quantize.HQQLinear"), "HQQLinear is a layer of HQQ"),
    "torchao": (of_codes, "Codes is a layer of torchao"),
    "real torchao": (torchao, "is a layer of torchao"),
    "real hqq": (hqq, "HQQLinear is a layer of HQQ"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "past"),
    "attention in a layer": (lambda: nn.TransformerEncoderLayer(8, 2, 12), "past"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_layer_that_cannot_be_adapted_is_refused_by_name_and_told_under_all_linear(key):
    make, why = REFUSED[key]
    torch.manual_seed(0)
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(8, 8)})
    with pytest.raises(loralab.UserError, match=why):
        loralab.attach(model, rank=2, targets=r"odd.*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coverage = loralab.attach(model, rank=2).coverage()
    assert coverage.paths == ["plain"]
    assert any(path.startswith("odd") for path in coverage.unreached)
    assert why in str(coverage)


# ---- output layers ---------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_tied_and_untied_output_layers_merge_save_and_generate_alike(tie, targets, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tie)).eval()
    handle = loralab.attach(model, "lora", name="a", rank=3, targets=targets)
    assert {path.rpartition(".")[2] for path in handle.layers} == set(targets)
    moved(handle, "a")
    ids = torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        right = model(ids).logits
        with pytest.warns(TieNote, match="no longer") if tie else warnings.catch_warnings():
            plain = handle.merge()
        assert plain.config.tie_word_embeddings is False
        torch.testing.assert_close(plain(ids).logits, right, rtol=0, atol=1e-4)
        plain.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, right, rtol=0, atol=1e-4)
        written = [m.generate(ids, max_new_tokens=6, do_sample=False) for m in (model, plain, again)]
    assert all(torch.equal(written[0], tokens) for tokens in written[1:])
    handle.detach()
    assert model.config.tie_word_embeddings is tie
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie


# ---- experts ---------------------------------------------------------------------------------------------------------


def mixture():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 3:
                p.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_stacks_of_experts(method, tmp_path):
    model, ids = mixture(), torch.randint(3, 60, (3, 5))
    before = model(ids).logits
    handle = loralab.attach(model, method, name="a", rank=2, targets=["q_proj", "gate_up_proj", "down_proj"])
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    moved(handle, "a")
    right = model(ids).logits
    assert (right - before).abs().max() > 1e-2
    torch.testing.assert_close(handle.merge()(ids).logits, right, rtol=0, atol=1e-5)
    right.sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for k, t in handle.state().items() if t.requires_grad)
    handle.save(tmp_path)
    fresh = mixture()
    loralab.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(ids).logits, right, rtol=0, atol=1e-5)
    handle.add("b", "lora", rank=1, targets=["down_proj"])
    moved(handle, "b", 4)
    with handle.use(["a", "b"], ids=[1, 0, 1]):
        mixed = model(ids).logits
    for row, name in enumerate("bab"):
        with handle.use(name):
            torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0], rtol=0, atol=1e-5)
    handle.detach()
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert torch.equal(model(ids).logits, before)


def test_the_gains_of_a_stack_are_vectors_to_an_optimizer():
    """With an axis of experts in front they had the shape of a matrix, and weight decay."""
    handle = loralab.attach(mixture(), "dora", rank=2, targets=["q_proj", "gate_up_proj"])
    for grouping in ("roles", "peft"):
        groups = handle.parameter_groups(1e-3, 0.1, grouping=grouping)
        gains = [group for group in groups if group["role"] == "m"]
        assert len(gains) == 1
        assert {t.ndim for t in gains[0]["params"]} == {1, 2}
        matrices = [group["weight_decay"] for group in groups if group["role"] in "AB"]
        assert set(matrices) == {0.1}
    assert [group["weight_decay"] for group in handle.parameter_groups(1e-3, 0.1) if group["role"] == "m"] == [0.0]


def test_experts_are_those_of_peft():
    """PEFT adapts a parameter: A is (experts * r, in), B (out, r * experts) with the experts last."""
    model, plain, ids = mixture(), mixture(), torch.randint(3, 60, (3, 5))
    path = "model.layers.1.mlp.experts.down_proj"
    handle = loralab.attach(model, name="a", rank=2, alpha=5, targets=[path])
    moved(handle, "a")
    config = peft.LoraConfig(r=2, lora_alpha=5, target_parameters=[path], target_modules=[])
    theirs = peft.get_peft_model(plain, config).eval()
    A, B = (handle.state()[f"{path}.{role}"] for role in "AB")  # (n, r, in), (n, out, r)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_A" in key:
                p.copy_(A.reshape(p.shape))
            if "lora_B" in key:
                p.copy_(B.permute(1, 2, 0).reshape(p.shape))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_what_does_not_go_with_experts_is_refused():
    for given, why in (({"dropout": 0.1}, "sees no x"), ({"method": "adalora"}, "single matrices"),
                       ({"method": "lokr"}, "single matrices")):  # fmt: skip
        with pytest.raises(loralab.UserError, match=why):
            loralab.attach(mixture(), rank=2, targets=["down_proj"], **given)


EXPERTS = ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("names", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_pefts_folder_of_experts_loads_as_the_same_function(names, tmp_path):
    """PEFT wraps a module once for each of its parameters, and calls the inner wrapper `base_layer`."""
    ids = torch.randint(3, 60, (3, 5))
    parameters = [f"mlp.experts.{name}" for name in names]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_parameters=parameters, target_modules=["q_proj"])
    theirs = peft.get_peft_model(mixture(), config).eval()
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    theirs.save_pretrained(tmp_path / "peft")
    expected, model = theirs(ids).logits, mixture()
    handle = loralab.load(model, tmp_path / "peft")
    assert sorted(handle.spec().paths) == sorted(
        path for i in (0, 1) for path in (f"model.layers.{i}.self_attn.q_proj",
                                          *(f"model.layers.{i}.{name}" for name in parameters))
    )  # fmt: skip
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert (expected - mixture()(ids).logits).abs().max() > 1e-2
    loralab.load(model, tmp_path / "peft", name="again")  # the experts are opened already
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    handle.save(tmp_path / "own")
    fresh = mixture()
    loralab.load(fresh, tmp_path / "own")
    assert torch.equal(fresh(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("method", "given"), [("lora", {}), ("pissa", {}), ("lora-xs", {"rank": 3}), ("eva-like", {})])
@pytest.mark.parametrize("names", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_an_adapter_of_experts_is_exported_and_comes_back(method, given, names, tmp_path):
    model, ids = mixture(), torch.randint(3, 60, (3, 5))
    targets = ["q_proj", *names]
    if method == "eva-like":  # ranks that differ: all are written at the largest
        paths = loralab.attach(mixture(), rank=2, targets=targets).spec().paths
        method, given = "lora", {"ranks": loralab.RankMap({path: 1 + (i % 3) for i, path in enumerate(paths)})}
    handle = loralab.attach(model, method, name="a", **{"rank": 2, "alpha": 5.0, "targets": targets} | given)
    moved(handle, "a")
    expected = model(ids).logits
    handle.export(tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixture(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)
    fresh = mixture()
    loralab.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(ids).logits, expected, rtol=0, atol=1e-5)


def test_what_peft_has_not_for_experts_is_refused(tmp_path):
    handle = loralab.attach(mixture(), "dora", rank=2, targets=["q_proj", "down_proj"])
    with pytest.raises(loralab.UserError, match="gain .DoRA. on the experts model.layers.0.mlp.experts.down_proj"):
        handle.export(tmp_path / "e")
    assert not (tmp_path / "e").exists()
    path = "mlp.experts.down_proj"
    peft.get_peft_model(mixture(), peft.LoraConfig(r=2, target_parameters=[path])).save_pretrained(tmp_path / "p")
    config = json.loads((tmp_path / "p/adapter_config.json").read_text())
    for changed, told in (
        ({"rank_pattern": {path: 3}}, "expected"),  # 8 rows are no ranks of 3 for 4 experts
        (
            {"target_parameters": ["mlp.experts.other"]},
            "has 0 of the parameters in target_parameters, and the folder has 1",
        ),
        ({"target_parameters": EXPERTS}, "has 2 of the parameters in target_parameters, and the folder has 1"),
    ):
        (tmp_path / "p/adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(loralab.UserError, match=told):
            loralab.load(mixture(), tmp_path / "p")


# ---- weights that the model reads itself -----------------------------------------------------------------------------


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out, self.table = nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(5, 6)

    def forward(self, x):
        if isinstance(self.out.weight, torch.Tensor) and self.out.weight.dtype != x.dtype:
            raise TypeError
        return self.out(self.inner(x)) + self.table.weight.sum(0)

    def inner(self, x):
        return x @ self.proj.weight.T + self.proj.bias


def test_a_weight_that_the_model_reads_itself_is_the_adapted_one():
    assert read_by(Reads) == {"proj", "table"}  # out is only looked at
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(3, 6)
    before = model(x)
    handle = loralab.attach(model, "dora", name="a", rank=2, targets=["proj", "out", "table"])
    moved(handle, "a")
    y = model(x)
    torch.testing.assert_close(handle.merge()(x), y, rtol=0, atol=1e-5)
    y.sum().backward()
    assert all(t.grad is not None for t in handle.state().values())
    handle.add("b", rank=1, targets=["out"])
    with handle.use(None):
        torch.testing.assert_close(model(x), before)
    with handle.use(["a", "b"], ids=[0, 1, 0]), pytest.raises(loralab.UserError, match="reads the weight"):
        model(x)


# ---- loaded in few bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_loaded_by_bitsandbytes_is_kept_as_it_is(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**how if bits == 4 else {"load_in_8bit": True})

    def loaded():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).eval()
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # its kernels round to bfloat16
        return model

    model, ids = loaded(), torch.randint(3, 60, (2, 6))
    before = model(ids).logits
    handle = loralab.attach(model, "dora", name="a", rank=2)
    assert len(handle.layers) == 14
    codes = model.model.layers[0].self_attn.q_proj.base.layer
    assert isinstance(codes, bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt)
    tolerance = 1e-5 if bits == 4 else 0.02  # 8 bit rounds x as well
    moved(handle, "a")
    right = model(ids).logits
    right.sum().backward()
    assert all(t.grad is not None for t in handle.state().values())
    plain = handle.merge()
    assert not any(type(m).__module__.startswith("bitsandbytes") for m in plain.modules())
    torch.testing.assert_close(plain(ids).logits, right, rtol=0, atol=tolerance)
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(again(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    handle.save(tmp_path / "adapter")
    fresh = loaded()
    loralab.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(ids).logits, right, rtol=0, atol=1e-5)
    handle.detach()
    assert torch.equal(model(ids).logits, before)


def test_kinds_are_told_by_type_and_not_by_name():
    assert [kinds.kind_of(layer()).name for layer, _ in LAYERS.values()] == ["linear"] + ["embedding"] * 3 + [
        "convolution"
    ] * 5
    assert kinds.kind_of(nn.LayerNorm(3)) is None


# ---- single tokens ---------------------------------------------------------------------------------------------------


def resized(tie):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tie)).eval()
    model.resize_token_embeddings(64, mean_resizing=False)
    return model


@pytest.mark.parametrize("tie", [True, False])
def test_single_tokens_after_a_resize_learn_beside_a_method_as_in_peft(tie, tmp_path):
    new, ids = [61, 63, 62], torch.randint(3, 61, (3, 7))
    ids[:, 2], ids[1, 4] = 62, 63
    model = resized(tie)
    before = model(ids).logits
    handle = loralab.attach(model, "dora", name="a", rank=2, targets=["q_proj"], tokens=new)
    assert ("lm_head" in handle.layers) is tie
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    learned = {k: t.numel() for k, t in handle.state().items()}
    assert learned["model.embed_tokens.D"] == 3 * 32
    assert handle.counts()["adapter"] == sum(n for k, n in learned.items() if k != "lm_head.D")
    moved(handle, "a")
    right = model(ids).logits
    plain = handle.merge()
    torch.testing.assert_close(plain(ids).logits, right, rtol=0, atol=1e-5)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tie
    assert plain.config.tie_word_embeddings is tie
    changed = (plain.model.embed_tokens.weight != resized(tie).model.embed_tokens.weight).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(new)
    right.sum().backward()
    assert all(t.grad is not None for t in handle.state().values() if t.requires_grad)
    row = next(row for row in handle.coverage().rows() if row.why == "single tokens")
    assert (row.state, row.values) == ("adapted", 3 * 32)
    assert handle.coverage().size == sum(p.numel() for k, p in resized(tie).named_parameters() if k != "lm_head.weight")
    handle.save(tmp_path)
    fresh = resized(tie)
    loralab.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(ids).logits, right, rtol=0, atol=1e-5)
    handle.add("b", "lora", rank=1, targets=["q_proj"])
    with handle.use(["a", "b"], ids=[0, 1, 0]):
        torch.testing.assert_close(model(ids).logits[[0, 2]], right[[0, 2]], rtol=0, atol=1e-5)
    config = peft.LoraConfig(
        r=2, lora_alpha=16, target_modules=["q_proj"], trainable_token_indices=sorted(new), use_dora=True
    )
    theirs = peft.get_peft_model(resized(tie), config).eval()
    state, words = handle.state(), resized(tie).model.embed_tokens.weight[sorted(new)]
    names = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m"}
    with torch.no_grad():
        for key, t in theirs.named_parameters():
            parts = key.removeprefix("base_model.model.").split(".")
            if (role := next((names[part] for part in parts if part in names), None)) is not None:
                t.copy_(state[".".join([*parts[: parts.index("q_proj") + 1], role])])
            if "trainable_tokens_delta" in parts:
                t.copy_(words + state["model.embed_tokens.D"])
    torch.testing.assert_close(theirs(ids).logits, right, rtol=0, atol=1e-5)


def test_tokens_that_cannot_be_are_refused():
    for given, why in (
        ({"tokens": [3, 64]}, "different numbers from 0 to 64"), ({"tokens": [3, 3]}, "different numbers"),
        ({"tokens": [3], "targets": ["embed_tokens"]}, "is a target too"),
        ({"tokens": [3], "method": "adalora"}, "acts on"), ({"tokens": [3], "method": "bitfit"}, "adapts no layer"),
    ):  # fmt: skip
        with pytest.raises(loralab.UserError, match=why):
            loralab.attach(resized(True), **given)
    with pytest.raises(loralab.UserError, match="names no embedding"):
        loralab.attach(Around(nn.Linear(8, 8)), rank=2, tokens=[1])


START_NEEDS = {"eva": {"batches": True}, "lora-ga": {"batches": True}, "loftq": {"store": "nf4"}}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("start", STARTS)
def test_single_tokens_go_with_every_start(start, tie):
    """A start is for A and B: the vectors of tokens begin as the base has them."""
    ids = torch.randint(3, 61, (3, 7))
    needs = dict(START_NEEDS.get(start, {}))
    if needs.pop("batches", False):
        needs["batches"] = [{"input_ids": ids, "labels": ids}]
    model = resized(tie)
    before = model(ids).logits
    handle = loralab.attach(
        model, "lora", name="a", rank=4, start=start, targets=["q_proj"], tokens=[61, 63, 62], **needs
    )
    assert handle.state()["model.embed_tokens.D"].abs().max() == 0
    if not needs.get("store"):
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ids", [[0, 1, 1, 0, 1], [1, 1, 1, 0, 1], [0, 0, 1, 1]])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", ["lora", "miss", "vera", "dora"])
def test_rows_of_adapters_with_single_tokens_are_the_rows_alone(method, ids, grad):
    model, x = resized(True), torch.randint(55, 64, (len(ids), 7))
    handle = loralab.attach(model, method, name="a", rank=2, targets=["q_proj"], tokens=[61, 63])
    handle.add("b", method, rank=2, targets=["q_proj"], tokens=[61, 63], seed=3)
    for seed, name in enumerate("ab"):
        moved(handle, name, seed + 5)
    alone = []
    for row, i in zip(x, ids, strict=True):
        with handle.use("ab"[i]):
            alone.append(model(row[None]).logits[0])
    with torch.set_grad_enabled(grad), handle.use(["a", "b"], ids=ids):
        torch.testing.assert_close(model(x).logits, torch.stack(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "vera"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", LAYERS)
def test_a_layer_of_a_base_in_half_the_bits_answers_and_learns_in_them(key, dtype, method):
    torch.manual_seed(3)
    layer, x = (make() for make in LAYERS[key])
    model = Around(layer).to(dtype)
    handle = loralab.attach(model, method, name="a", targets=["layer"], rank=2)
    moved(handle, "a")
    y = model(x.to(dtype) if x.is_floating_point() else x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    grads = [t.grad for t in handle.state().values() if t.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert max(g.abs().max() for g in grads) > 0
    wide = handle.merge("a", dtype="float32").float()(x)
    torch.testing.assert_close(y.float(), wide, rtol=0, atol=0.05 * wide.abs().max().item())
