"""The fast path follows the model: what is changed after `prepare` has the effect that it has on the plain path.

Each change is made to a plain model and to one that has already trained on the fast path; outputs and the gradients of
everything that learns are compared in float64.
"""

import copy
from contextlib import nullcontext

import pytest
import test_fast_decoders as decoders
import torch
from archs import build, drop_as_blocks, rows, shake
from test_fast import ENCODERS, adapted, double, same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from transformers import Trainer, TrainingArguments

import loralab
from loralab.fast import enable, prepare
from loralab.fast.block import Block
from loralab.fast.layers import LAYERS, layers_of
from loralab.layer import Adapted


def parts(model, layer=1):
    """The modules of one encoder layer, by role."""
    layer = layers_of(model)[layer]
    return LAYERS[type(layer).__name__](layer)


def drawn(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- changes: each takes (model, adapters) and may return a context for the pass after it ---------------------------


def unadapted(model):
    """Name -> parameter of the base that no adapter is defined over."""
    weights = {id(layer.base.weight) for layer in model.modules() if isinstance(layer, Adapted)}
    return {key: p for key, p in model.named_parameters() if id(p) not in weights}


def all_that_is_not_adapted_learns(model, adapters):
    for p in unadapted(model).values():
        p.requires_grad_(True)


def norms_of_a_layer_learn(model, adapters):
    for norm in (parts(model).norm1, parts(model).norm2):
        norm.requires_grad_(True)


def a_bias_learns(model, adapters):
    parts(model).down.base.bias.requires_grad_(True)


def what_comes_before_the_layers_learns(model, adapters):
    for key, p in unadapted(model).items():
        if "embed" in key:
            p.requires_grad_(True)


def the_position_bias_learns(model, adapters):
    for key, p in model.named_parameters():
        if "relative_attention_bias" in key:
            p.requires_grad_(True)


def learns_and_is_frozen_again(model, adapters):
    p = parts(model).norm1.weight.requires_grad_(True)
    model(**rows()).logits.sum().backward()
    p.grad = None
    p.requires_grad_(False)


def another_adapter_on_other_layers(model, adapters):
    adapters.add("b", "dora", rank=2, alpha=3.0, targets=[path for path in adapters.spec().paths if ".0." in path])
    shake(adapters, "b", seed=9)
    double(model, adapters)
    return adapters.use("b")


def two_adapters_in_a_batch(model, adapters):
    adapters.add("b", "rslora", rank=5, head=True)
    shake(adapters, "b", seed=9)
    double(model, adapters)
    return adapters.use(["default", "b"], ids=[1, 0, 0, 1, 0])


def no_adapter(model, adapters):
    what_comes_before_the_layers_learns(model, adapters)
    return adapters.use(None)


def a_bias_is_edited_in_place(model, adapters):
    with torch.no_grad():
        parts(model).up.base.bias.add_(drawn(37))


def a_weight_is_replaced(model, adapters):
    base = parts(model).k.base
    base.weight = nn.Parameter(drawn(*base.weight.shape), requires_grad=False)


def an_unadapted_weight_is_replaced(model, adapters):
    linear = parts(model, layer=0).k
    assert type(linear) is nn.Linear
    linear.weight = nn.Parameter(drawn(*linear.weight.shape), requires_grad=False)


def weights_are_swapped_through_data(model, adapters):
    for key, p in model.named_parameters():
        if p.ndim == 2 and "layer" in key:
            p.data = p.data.clone() * 1.1


def a_module_has_a_hook(model, adapters):
    parts(model).o.register_forward_hook(lambda module, args, out: 1.5 * out)


def an_input_has_a_hook(model, adapters):
    parts(model).norm2.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def a_gradient_has_a_hook(model, adapters):
    parts(model).up.register_full_backward_hook(lambda module, given, taken: tuple(2 * t for t in given))


def a_forward_is_replaced(model, adapters):
    norm = parts(model).norm1
    norm.forward = lambda x: 0.5 * type(norm).forward(norm, x)


def a_module_is_replaced(model, adapters):
    layer = layers_of(model)[1]
    for path, module in list(layer.named_modules()):
        if module is parts(model).norm2:
            layer.set_submodule(path, nn.Sequential(nn.LayerNorm(24), nn.Tanh()).double().requires_grad_(False))
            return


def the_activation_is_replaced(model, adapters):
    layer = layers_of(model)[1]
    for path, module in list(layer.named_modules()):
        if module is parts(model).activation:
            layer.set_submodule(path, nn.Tanh())
            return


def a_weight_is_parametrized(model, adapters):
    class Twice(nn.Module):
        def forward(self, W):
            return 2 * W

    parametrize.register_parametrization(parts(model, layer=0).k, "weight", Twice())


def a_weight_is_pruned(model, adapters):
    prune.l1_unstructured(parts(model, layer=0).k, "weight", amount=0.5)
    parts(model, layer=0).k.weight_orig.requires_grad_(False)


def attention_is_eager(model, adapters):
    model.set_attn_implementation("eager")


def a_part_evaluates(model, adapters):
    for module in layers_of(model):
        module.attention.eval()


CHANGES = {  # change -> how many of two layers take the block after it, and what the choice says
    all_that_is_not_adapted_learns: (0, "learns"),
    norms_of_a_layer_learn: (1, "learns"),
    a_bias_learns: (1, "bias learns"),
    what_comes_before_the_layers_learns: (2, "one step of autograd"),
    learns_and_is_frozen_again: (2, "one step of autograd"),
    another_adapter_on_other_layers: (2, "one step of autograd"),
    two_adapters_in_a_batch: (2, "one step of autograd"),
    no_adapter: (2, "one step of autograd"),
    a_bias_is_edited_in_place: (2, "one step of autograd"),
    a_weight_is_replaced: (2, "one step of autograd"),
    an_unadapted_weight_is_replaced: (2, "one step of autograd"),
    weights_are_swapped_through_data: (2, "one step of autograd"),
    a_module_has_a_hook: (1, "has a hook"),
    an_input_has_a_hook: (1, "has a hook"),
    a_gradient_has_a_hook: (1, "has a hook"),
    a_forward_is_replaced: (1, "has a forward of its own"),
    a_module_is_replaced: (1, "is a Sequential"),
    the_activation_is_replaced: (1, "its activation is a Tanh"),
    a_weight_is_parametrized: (1, "is a ParametrizedLinear"),
    a_weight_is_pruned: (1, "has a hook"),
    attention_is_eager: (2, "one step of autograd"),
    a_part_evaluates: (2, "one step of autograd"),
}
CASES = [(kind, change) for kind in ENCODERS for change in CHANGES] + [("mpnet", the_position_bias_learns)]
SPLIT = (an_unadapted_weight_is_replaced, a_weight_is_parametrized, a_weight_is_pruned)  # layer 0 is not adapted


def gradients(model, batch, context=None, passes=1):
    """(logits, gradients of everything that learns) of one training pass."""
    for p in model.parameters():
        p.grad = None
    for _ in range(passes):
        with context or nullcontext():
            logits = model(**batch).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
        (logits * weight).sum().backward()
    return logits, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def trained(kind, quick, method="lora", targets="all-linear", **more):
    """A model in float64, in training mode; with `quick` it has taken one pass on the fast path already."""
    model, adapters = adapted(kind, method, targets, **more)
    double(model, adapters)
    model.train()
    choices = prepare(model) if quick else None
    gradients(model, rows(seed=4))
    return model, adapters, choices


@pytest.mark.few(40)
@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_a_change_made_later_has_the_effect_that_it_has_on_the_plain_path(kind, change):
    results = []
    for quick in (False, True):
        targets = ".*layer.*[.]1[.].*" if change in SPLIT else "all-linear"
        model, adapters, choices = trained(kind, quick, targets=targets)
        results.append(gradients(model, rows(), change(model, adapters)))
    same(*results)
    assert results[0][1], "nothing learns"
    fast, reason = CHANGES.get(change, (0, "the positions or the mask learn"))
    found = {choice.piece: choice for choice in choices}["block"]
    if layers_of(model)[0].__dict__.get("forward") is None:  # taken off, as a new layer was adapted
        assert change is another_adapter_on_other_layers
        return
    assert found.used == (fast > 0)
    assert reason in found.reason
    assert ("1 of 2 layers" in found.reason) == (fast == 1)


@pytest.mark.parametrize("kind", ENCODERS)
def test_each_change_changes_something(kind):
    for change in CHANGES:
        if change in (learns_and_is_frozen_again, attention_is_eager, a_part_evaluates, no_adapter):
            continue
        model, adapters, _ = trained(kind, False, targets=".*layer.*[.]1[.].*" if change in SPLIT else "all-linear")
        before = gradients(model, rows())
        after = gradients(model, rows(), change(model, adapters))
        assert (
            not torch.equal(before[0], after[0])
            or before[1].keys() != after[1].keys()
            or any(not torch.equal(grad, after[1][key]) for key, grad in before[1].items() if grad is not None)
        ), change.__name__


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_dropout_that_is_turned_up_later_drops(kind, monkeypatch):
    drop_as_blocks(monkeypatch)
    results = []
    for quick in (False, True):
        model, _, _ = trained(kind, quick)
        model.set_attn_implementation("eager")
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.p = 0.3
        parts(model, 0).down_dropout.eval()
        torch.manual_seed(5)
        results.append(gradients(model, rows()))
    same(*results)


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "mpnet"])  # transformers has none for MPNet
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_kept_and_changes_nothing(kind, reentrant):
    results, kept = [], []
    for quick, checkpointing in ((False, False), (True, False), (True, True)):
        model, _, _ = trained(kind, quick)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            results.append(gradients(model, rows(), passes=2))  # accumulated over two passes
        kept.append(sum(saved))
    same(results[1], results[0])
    same(results[2], results[0])
    if reentrant:  # what is recomputed is kept only then, which the hooks see too; but never all layers at once
        return
    assert kept[2] <= kept[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(reentrant):
    model, _, _ = trained("bert", True)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.3
    torch.manual_seed(6)
    expected = gradients(model, rows())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(6)
    same(gradients(model, rows()), expected)


def test_a_checkpointed_layer_keeps_its_input_alone():
    model, _, _ = trained("bert", True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        out = model(**rows()).logits.sum()
    assert (35, 37) not in shapes  # rows * tokens, inner
    out.backward()


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("store", [None, "bfloat16"])
def test_autocast_computes_in_its_dtype_what_the_plain_path_computes(kind, method, store):
    results = []
    for quick in (False, True):
        model, _ = adapted(kind, method)
        prepare(model.train(), store=store)
        if not quick:
            loralab.fast.put_back(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**rows()).logits
            hidden = model(**rows(), output_hidden_states=True).hidden_states
        F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 1, 0])).backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        results.append((logits, hidden, torch.cat([grad.flatten() for grad in found.values() if grad is not None])))
        assert all(grad is None or grad.dtype == torch.float32 for grad in found.values())
    (plain, plain_hidden, expected), (fast, hidden, found) = results
    assert len(hidden) == len(plain_hidden)
    assert [t.dtype for t in hidden] == [t.dtype for t in plain_hidden]
    assert (fast - plain).float().norm() < 0.05 * plain.float().norm()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_backward_inside_autocast_is_backward_outside():
    model, _ = adapted("bert", "dora")
    prepare(model.train())
    found = []
    for inside in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**rows()).logits.float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_masks_of_autocast_hide_padding_and_nothing_is_nan():
    model, _ = adapted("mpnet")
    prepare(model)
    batch = rows()
    batch["attention_mask"][2] = 0  # a row of padding alone
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**batch).logits
        batch["input_ids"][:, -2:] = 7  # in even rows they are padding
        after = model(**batch).logits
    assert before.isfinite().all()
    assert torch.equal(before[::2][[0, 2]], after[::2][[0, 2]])
    assert not torch.equal(before[1::2], after[1::2])


@pytest.mark.parametrize("kind", ENCODERS)
def test_evaluations_see_every_edit_of_the_base(kind):
    """Nothing that is kept from one evaluation to the next outlives an edit, whichever tensor of a layer it is in."""
    model, _, _ = trained(kind, True, "dora", targets="attention-qv")
    plain = copy.deepcopy(model)
    loralab.fast.put_back(plain)
    model.eval(), plain.eval()
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    with torch.no_grad():
        for key in [key for key in ours if ".1." in key]:
            edit = drawn(*ours[key].shape)
            for p in (ours[key], theirs[key]):
                if key.endswith("bias"):
                    p.add_(edit)
                else:
                    p.data.copy_(p + edit)
            torch.testing.assert_close(model(**rows()).logits, plain(**rows()).logits, rtol=0, atol=1e-9)


def test_torch_func_takes_the_plain_path():
    model, _, _ = trained("bert", True)
    learned = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, kwargs=rows()).logits.square().sum()

    found = torch.func.grad(loss)(learned)
    model.zero_grad()
    model(**rows()).logits.square().sum().backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[key], torch.zeros_like(p) if p.grad is None else p.grad, rtol=0, atol=1e-9)


def test_a_functional_call_uses_the_tensors_that_it_is_given():
    model, _, _ = trained("bert", True, targets=".*layer.*[.]1[.].*")
    plain, _, _ = trained("bert", False, targets=".*layer.*[.]1[.].*")
    values = {key: drawn(*p.shape, seed=i) for i, (key, p) in enumerate(model.named_parameters()) if ".layer." in key}
    outs = [torch.func.functional_call(m, values, kwargs=rows()).logits for m in (model, plain)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_under_autocast_trains_as_on_the_plain_path(checkpointing, tmp_path):
    batch, labels = rows(count=16), torch.tensor([0, 1, 2, 1] * 4)
    data = [{**{k: t[i] for k, t in batch.items()}, "labels": labels[i]} for i in range(16)]
    losses = []
    for quick in (False, True):
        model, adapters = adapted("bert", "dora")
        if quick:
            enable(model, "float32")
        arguments = TrainingArguments(
            tmp_path / str(quick),
            bf16=True,
            use_cpu=True,
            max_steps=12,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=3e-2))
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
        losses.append(torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line]))
    plain, fast = losses
    assert len(plain) == 12
    assert plain[-2:].mean() < 0.8 * plain[:2].mean()
    torch.testing.assert_close(fast, plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_attention_weights_that_are_asked_for_are_given_and_the_block_comes_back(kind, how):
    found = []
    for quick in (False, True):
        model, _, choices = trained(kind, quick)
        model.set_attn_implementation("eager")
        model.eval()
        if how == "config":
            model.config.output_attentions = True
        out = model(**rows(), **({"output_attentions": True} if how == "argument" else {}))
        found.append((out.logits, torch.stack(out.attentions)))
        model.config.output_attentions = False
        model(**rows())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert {choice.piece: choice for choice in choices}["block"].used


def test_hidden_states_of_another_model_are_ignored_as_the_layer_ignores_them():
    outs = []
    for quick in (False, True):
        model, _, _ = trained("bert", quick)
        outs.append(model.bert.encoder(drawn(2, 5, 24), None, drawn(2, 5, 24, seed=4)).last_hidden_state)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cast_of_the_model_is_followed(dtype):
    outs = []
    for quick in (False, True):
        model, _ = adapted("mpnet")
        if quick:
            prepare(model)
        model.to(dtype)
        outs.append(model.train()(**rows()).logits)
    torch.testing.assert_close(*outs, rtol=0, atol=0.2 if dtype == torch.bfloat16 else 1e-5)


def test_full_fine_tuning_after_an_adapter_learns_everywhere():
    model = build("bert")
    adapters = loralab.attach(model, "lora", name="a")
    prepare(model)
    with adapters.use(None):
        adapters.remove("a")
        adapters.add("b", "full")
    with adapters.use("b"):
        model.train()(**rows()).logits.sum().backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if ".layer." in key and ".key.bias" not in key)


@pytest.mark.parametrize("store", [None, "bfloat16"])
def test_copies_are_whole_and_so_is_what_detach_leaves(store, tmp_path):
    model, adapters = adapted("bert", targets="attention-qv")
    prepare(model, store=store)
    expected = model(**rows()).logits
    other = copy.deepcopy(model)
    for layer in layers_of(other):
        assert isinstance(layer.forward, Block)
        assert layer.forward.layer is layer
    with torch.no_grad():
        parts(other).v.base.weight.mul_(2)
    assert not torch.equal(other(**rows()).logits, expected)
    torch.testing.assert_close(model(**rows()).logits, expected, rtol=0, atol=0)
    adapters.detach()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    for (key, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


def test_a_model_held_in_bfloat16_merges_into_one_that_runs():
    model, adapters = adapted("bert")
    choices = enable(model, "bfloat16")
    assert choices.store == "bfloat16"
    assert not choices.autocast
    expected = model(**rows()).logits
    merged = adapters.merge()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}  # as the model was before
    torch.testing.assert_close(merged(**rows()).logits.float(), expected.float(), rtol=0, atol=0.15)


def test_off_takes_the_fast_path_off():
    model, _, _ = trained("bert", True)
    assert not any(choice.used for choice in prepare(model, speed="off"))
    assert not any("forward" in vars(module) for module in model.modules())


def test_choices_say_when_the_fast_path_was_taken_off():
    model, _, choices = trained("bert", True)
    assert {choice.piece: choice for choice in choices}["block"].used
    loralab.fast.put_back(model)
    found = {choice.piece: choice for choice in choices}["block"]
    assert not found.used
    assert "taken off" in found.reason


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", torch.float32, torch.bfloat16])
def test_enable_rounds_what_is_frozen_where_bfloat16_is_wanted_and_says_what_autocast_is_for(dtype, monkeypatch):
    monkeypatch.setattr("loralab.fast.machine.fast_bfloat16", lambda gpu=None: True)
    narrow = dtype not in ("float32", torch.float32)
    model, _ = adapted("bert")
    choices = enable(model, dtype)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16 if narrow else torch.float32}
    assert (choices.store, choices.autocast) == ("bfloat16" if narrow else None, False)
    assert ("rounded to bfloat16" in str(choices)) == narrow
    model = build("bert")
    loralab.attach(model, "full", head=True)
    choices = enable(model, dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (choices.store, choices.autocast) == (None, narrow)


def test_enable_refuses_an_unknown_dtype_with_the_known_ones():
    with pytest.raises(loralab.UserError, match="expected one of auto, bfloat16, float32"):
        enable(build("bert"), "float16x")


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("store", [None, "nf4"])
def test_leaving_after_a_base_was_rounded_keeps_the_update_and_the_dtype(kind, store):
    """A small update is lost in a sum of bfloat16: the merged model has the dtype that the user's model had."""
    model = {"bert": build, "llama": decoders.build}[kind](kind)
    adapters = loralab.attach(model, "lora", name="a", rank=3, alpha=5.0, targets="all-linear", store=store)
    shake(adapters, "a")
    with torch.no_grad():
        for _, t in adapters.tensors("a").values():
            t.mul_(0.02)
    path = next(iter(adapters.layers))
    adapters.fast("bfloat16", quiet=True)
    assert {t.dtype for t in adapters.layers[path].base.parameters() if t.is_floating_point()} <= {torch.bfloat16}
    base, update = adapters.layers[path].base.dense().float(), adapters.layers[path].lower("a").matrix()
    merged = adapters.merge()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(merged.get_submodule(path).weight, base + update, rtol=0, atol=1e-6)
    assert adapters.merge(dtype="bfloat16").get_submodule(path).weight.dtype == torch.bfloat16
    adapters.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_submodule(path).weight.dtype == torch.float32
