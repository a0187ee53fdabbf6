"""Modules that are not plain (shared, hooked, pruned, wrapped, tied): adapted exactly, or refused with a reason."""

import copy
import warnings

import pytest
import torch
import transformers
from archs import CONFIGS, build, rows, shake
from test_silent import LABELS, adapted, logits, settings
from torch import nn
from torch.nn.utils import parametrizations, prune

import loralab
from loralab.fast import prepare
from loralab.install import StatisticsNote

# ---- modules that are not plain --------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One linear layer under two names, and a block that is in the model twice."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(11, 11)
        self.other = self.one
        block = nn.Sequential(nn.Linear(11, 11), nn.Tanh())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x):
        x = self.other(torch.tanh(self.one(x)))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "qlora"])
@pytest.mark.parametrize("targets", ["all-linear", ["one", "0"], ["other", "0"]])
def test_a_layer_under_several_paths_is_adapted_once_under_all_of_them(method, targets, tmp_path):
    model = Shared()
    tree = {key: type(m) for key, m in model.named_modules(remove_duplicate=False)}
    x = torch.randn(5, 11)
    base = model(x)
    adapters = loralab.attach(model, method, targets=targets, **settings(method))
    shake(adapters, "default")
    assert list(adapters.layers) == ["one", "blocks.0.0"]
    assert model.one is model.other is adapters.layers["one"]
    assert model.blocks[0][0] is model.blocks[1][0]
    y = model(x)
    torch.testing.assert_close(adapters.merge()(x), y, rtol=0, atol=1e-5)
    adapters.save(tmp_path / "a")
    adapters.detach()
    assert {key: type(m) for key, m in model.named_modules(remove_duplicate=False)} == tree
    assert model.one is model.other
    if method != "qlora":
        assert torch.equal(model(x), base)
        loralab.load(model, tmp_path / "a")
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-6)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "with_kwargs": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1), with_kwargs=True),
    "always": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1), always_call=True),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_an_adapted_layer_run_on(hook, fast):
    model, seen = build("bert"), []
    layer = model.bert.encoder.layer[1].attention.self.query
    handle = HOOKS[hook](layer, seen)
    adapters = loralab.attach(model, "lora", rank=2, head=True)
    if fast:
        prepare(model)
    for expected in (1, 2):
        model.train()(**rows(), labels=LABELS).loss.backward()
        assert len(seen) == expected
    handle.remove()
    model(**rows(), labels=LABELS).loss.backward()
    assert len(seen) == 2
    HOOKS[hook](adapters.layers["bert.encoder.layer.1.attention.self.query"], seen)
    adapters.detach()
    model.requires_grad_(True)(**rows(), labels=LABELS).loss.backward()
    assert len(seen) == 3


def weight_norm(m):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(m)


def to_meta(m):
    m.to("meta")


COMPUTED = {
    "parametrized weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned bias": lambda m: prune.l1_unstructured(m, "bias", 0.5),
    "meta": to_meta,
}


@pytest.mark.parametrize("targets", ["all-linear", ["value"], "bert.*value"])
@pytest.mark.parametrize("change", COMPUTED)
def test_a_weight_that_is_no_plain_parameter_is_refused_by_name(change, targets):
    model = build("bert")
    COMPUTED[change](model.bert.encoder.layer[1].attention.self.value)
    before = {key: type(m) for key, m in model.named_modules()}
    with pytest.raises(loralab.UserError, match=r"layer\.1\.attention\.self\.value, but its"):
        loralab.attach(model, "lora", rank=2, targets=targets)
    assert {key: type(m) for key, m in model.named_modules()} == before
    loralab.attach(model, "lora", rank=2, targets=["query"])


@pytest.mark.parametrize("change", COMPUTED)
def test_a_head_that_is_no_plain_module_is_refused_by_name(change):
    model = build("bert")
    COMPUTED[change](model.classifier)
    with pytest.raises(loralab.UserError, match="head classifier: its"):
        loralab.attach(model, "lora", rank=2, head=True)


def test_offloaded_layers_are_refused_and_placed_ones_follow():
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("bert")
    right = logits(model)
    away, placed = (model.bert.encoder.layer[i].attention.self.query for i in (0, 1))
    hooks.add_hook_to_module(away, hooks.AlignDevicesHook("cpu", offload=True, weights_map=dict(away.state_dict())))
    hooks.add_hook_to_module(placed, hooks.AlignDevicesHook("cpu"))
    with pytest.raises(loralab.UserError, match=r"layer\.0\.attention\.self\.query, but its weight is not in memory"):
        loralab.attach(model, "lora", rank=2, targets=["query"])
    adapters = loralab.attach(model, "lora", rank=2, targets=["1.attention.self.query"])
    assert next(iter(adapters.layers.values()))._hf_hook is placed._hf_hook
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-6)


# ---- wrappers --------------------------------------------------------------------------------------------------------


def compiled_block(model):
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    return model


def with_statistics():
    """A model with running statistics in the base, and a head."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_running_statistics_are_the_bases_and_move_with_full_fine_tuning_alone(method, tmp_path):
    """They are in no file of an adapter, so a loaded adapter answered something else than the trained one."""
    torch.manual_seed(1)
    images, labels = 2 * torch.randn(8, 3, 32, 32) + 1, torch.randint(0, 3, (8,))
    model = with_statistics()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        given = {"rank": 2, "targets": ["convolution"]} if method == "lora" else {}
        adapters = loralab.attach(model, method, head=True, **given)
    notes = [note for note in told if note.category is StatisticsNote]
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-2))
    for _ in range(3):
        model.train()(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if method == "full":
        assert not notes
        assert any("running" in key and not torch.equal(t, before[key]) for key, t in model.state_dict().items())
        return
    assert len(notes) == 1
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
        adapters.save(tmp_path)
        other = with_statistics()
        loralab.load(other, tmp_path)
        assert torch.equal(other.eval()(pixel_values=images).logits, expected)
    again = copy.deepcopy(model).train()
    again(pixel_values=images)
    loralab.adapters.of(again).detach()
    model.train()
    adapters.detach()
    for plain in (model, again):
        assert all(torch.equal(t, before[key]) for key, t in plain.state_dict().items())
        assert all(module.training for module in plain.modules())
        assert not any(module._forward_pre_hooks for module in plain.modules())


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [
        (lambda m: torch.compile(m, backend="eager"), r"model\._orig_mod"),
        (nn.DataParallel, r"model\.module"),
        (compiled_block, r"bert\.encoder\.layer\.1\._orig_mod"),
    ],
)
@pytest.mark.parametrize("how", ["attach", "load"])
def test_a_wrapped_model_is_refused_and_its_inside_works(wrap, inner, how, tmp_path):
    _, adapters = adapted()
    adapters.save(tmp_path / "a")
    wrapped = wrap(build("bert"))
    put = {"attach": lambda m: loralab.attach(m, "lora", rank=2), "load": lambda m: loralab.load(m, tmp_path / "a")}
    with pytest.raises(loralab.UserError, match=f"wrapped in .*first \\({inner}\\)"):
        put[how](wrapped)
    assert wrap(put[how](build("bert")).model) is not None


def test_a_layer_without_a_shape_is_refused_and_works_after_a_forward():
    model = nn.Sequential(nn.LazyLinear(7), nn.Linear(7, 3))
    with pytest.raises(loralab.UserError, match=r"0\.weight has no shape before the first forward"):
        loralab.attach(model, "lora", rank=2, targets=["0"])
    model(torch.randn(2, 5))
    assert loralab.attach(model, "lora", rank=2, targets=["0"]).counts()["adapter"] == 2 * (5 + 7)


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("trained", [("a",), ("b",), ("a", "b")])
def test_adapters_that_do_not_train_are_out_of_the_sight_of_ddp(one_process, trained):
    model, adapters = adapted()
    adapters.add("b", "dora", rank=2, head=True)
    adapters.add("c", "vera", rank=5, head=True)
    if trained == ("b",):
        adapters.activate("b")
    elif len(trained) == 2:
        adapters.synchronize(*trained)
    wrapped = nn.parallel.DistributedDataParallel(model.train())
    for _ in range(3):
        with adapters.use(trained[0]) if len(trained) == 1 else adapters.use(list(trained), ids=[0, 1, 0, 1, 1]):
            wrapped(**rows(), labels=LABELS).loss.backward()
    assert all(t.grad is not None for name in trained for t in adapters.state(name).values() if t.requires_grad)
    with adapters.use("c"), pytest.raises(loralab.UserError, match="'c' was not active when"):
        wrapped(**rows(), labels=LABELS)
    with adapters.use("c"), torch.no_grad():
        wrapped(**rows())
    del wrapped
    with pytest.raises(loralab.UserError, match="no adapter 'z'"):
        adapters.synchronize("z")
    adapters.detach()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


# ---- tied weights ----------------------------------------------------------------------------------------------------


def causal(kind, tie):
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(CONFIGS[kind])
    config.tie_word_embeddings = tie
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "given",
    [{}, {"method": "qlora"}, {"targets": ["lm_head"]}, {"targets": ["lm_head"], "method": "qlora"},
     {"targets": "attention", "head": ["lm_head"]}],
)  # fmt: skip
def test_a_tied_model_is_adapted_merged_saved_and_detached(kind, tie, given, tmp_path):
    model = causal(kind, tie)
    before = logits(model)
    given = {"method": "lora", **given, "rank": 2}
    adapters = loralab.attach(model, **given)
    assert ("lm_head" in adapters.layers) == (given.get("targets") == ["lm_head"])
    shake(adapters, "default")
    right = logits(model)
    plain = adapters.merge()
    torch.testing.assert_close(logits(plain), right, rtol=0, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "plain").eval()), right, rtol=0, atol=1e-4)
    adapters.detach()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie
    assert model.config.tie_word_embeddings == tie
    if given.get("method") != "qlora" or (tie and given.get("targets") == ["lm_head"]):
        assert torch.equal(logits(model), before)
