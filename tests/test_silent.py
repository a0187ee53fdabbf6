"""Nothing silent: what changes a model behind its adapters is followed exactly, or refused with a reason.

Each kind has a generator of instances where there can be one; the right value comes from a model that never saw the
change happen.
"""

import copy
import gc
import itertools
import threading

import pytest
import torch
from archs import CONFIGS, build, rows, shake
from archs import labelled as batch_of_start
from test_steps import LENGTH, STEPPED
from torch import nn

import loralab
from loralab.adapted import base_tensor
from loralab.adapters import of
from loralab.fast import prepare
from loralab.layer import Adapted
from loralab.recipe import NAMED

LABELS = torch.tensor([0, 1, 2, 1, 0])
ADAPTED = [name for name, (row, _) in NAMED.items() if row.factors is not None and not row.policy]


def settings(method, **more):
    allowed = {} if NAMED[method][0].factors is None else vars(NAMED[method][0].factors)
    return {key: value for key, value in {"rank": 3, "alpha": 5.0}.items() if key in allowed} | more


def adapted(method="lora", kind="bert", name="a", model=None, **more):
    model = build(kind) if model is None else model
    given = {"batches": [batch_of_start()], "head": True, **settings(method, **more)}
    adapters = loralab.attach(model, method, name=name, **given)
    shake(adapters, name)
    return model, adapters


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or rows())).logits


def answers(model):
    """All that a model answers (values,), hidden states too, as logits alone feel little of some edits."""
    with torch.no_grad():
        hidden = model.bert(**rows()).last_hidden_state
        return torch.cat([hidden.flatten(), model(**rows()).logits.flatten()])


# ---- stale values ----------------------------------------------------------------------------------------------------


def in_place(p, new):
    p.copy_(new)


def through_data(p, new):
    p.data.copy_(new)


def other_storage(p, new):
    p.data = new.clone()


def through_numpy(p, new):
    p.detach().numpy()[...] = new.numpy()


def foreach(p, new):
    torch._foreach_copy_([p.data], [new])


def reused_buffer(p, new):
    """torch.nn.utils.vector_to_parameters makes parameters views of a vector, which is then written to."""
    vector = p.detach().flatten().clone()
    nn.utils.vector_to_parameters(vector, [p])
    logits(p.of)  # the views are what was used last
    vector.copy_(new.flatten())


def fused(p, new):
    """torch._fused_adamw_ leaves the version of a tensor as it was."""
    grad, zero = (p.detach() - new).sign(), torch.zeros_like(p)
    torch._fused_adamw_(
        [p.detach()], [grad], [zero], [zero.clone()], [], [torch.tensor(1.0)], lr=0.3, beta1=0.9, beta2=0.99,
        weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


def swapped(p, new):
    """As an average of weights is evaluated: it is swapped in, and later out."""
    before = p.detach().clone()
    p.data.copy_(before + 9 * (new - before))
    logits(p.of)
    p.data.copy_(new)


EDITS = [in_place, through_data, other_storage, through_numpy, foreach, reused_buffer, fused, swapped]


def anew(model, adapters, method):
    """A model of the same tensors that nobody has changed or used."""
    fresh = build("bert")
    with torch.no_grad():
        for key, p in fresh.named_parameters():
            p.copy_(base_tensor(model, key))
    loralab.attach(fresh, method, name="a", head=True, targets="attention", **settings(method))
    state = of(fresh).state("a")
    with torch.no_grad():
        for key, t in adapters.state("a").items():
            state[key].copy_(t)
    return fresh


@pytest.mark.few(2)
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_no_edit_of_any_tensor_leaves_a_stale_value(method, fast, tally):
    """8 kinds of edit, of every role of a layer, its weight and bias, a norm and the head: none is stale."""
    model, adapters = adapted(method, targets="attention")
    if fast:
        prepare(model)
    path = "bert.encoder.layer.1.attention.self.value"
    tensors = adapters.layers[path].roles("a") | {
        "W": adapters.layers[path].base.weight,
        "bias": adapters.layers[path].base.bias,
        "norm": model.bert.encoder.layer[0].output.LayerNorm.weight,
        "head": adapters.heads["classifier"].copies["a"].weight,
    }
    stale, unseen = [], []
    generator = torch.Generator().manual_seed(0)
    for (role, p), edit in itertools.product(tensors.items(), EDITS):
        before, start, p.of = answers(model), p.detach().clone(), model
        with torch.no_grad():
            edit(p, start + torch.randn(p.shape, generator=generator))
        now, right = answers(model), answers(anew(model, adapters, method))
        if (now - right).abs().max() > 1e-5:
            stale.append((role, edit.__name__))
        if (right - before).abs().max() < 1e-4:
            unseen.append((role, edit.__name__))
        through_data(p, start)
        if (answers(model) - before).abs().max() > 1e-5:
            stale.append((role, edit.__name__, "and back"))
    tally("edits", len(tensors) * len(EDITS), len(stale))
    assert len(tensors) * len(EDITS) >= 48
    assert stale == []
    assert unseen == []


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_inside_caching_an_update_is_lowered_once_and_freed_at_the_end(method, fast, monkeypatch):
    model, adapters = adapted(method)
    adapters.add("b", "lora", rank=2, head=True)
    if fast:
        prepare(model)
    lowered, lower = [], Adapted.lower
    monkeypatch.setattr(Adapted, "lower", lambda *given: lowered.append(1) or lower(*given))
    right = logits(model)
    assert len(lowered) == (once := len(adapters.layers))
    with adapters.caching():
        for _ in range(3):
            assert torch.equal(logits(model), right)
        assert len(lowered) == 2 * once
        with adapters.use(["a", "b"], ids=[0, 1, 0, 1, 1]):
            mixed = logits(model), logits(model)
        assert torch.equal(*mixed)
        layer = next(iter(adapters.layers.values()))
        kept = [len(cache.scopes) for cache in (layer.lowered, layer.joined)]
        assert sum(kept) >= 1
    gc.collect()
    assert all(not len(c.scopes) for m in adapters.layers.values() for c in (m.lowered, m.joined, m.stacked))
    before = len(lowered)
    assert torch.equal(logits(model), right)
    assert len(lowered) == before + once
    with adapters.caching(training=True):  # only what depends on the frozen base alone is kept
        logits(model), logits(model)
    assert len(lowered) == before + 3 * once


def test_an_adapter_removed_inside_caching_is_not_kept():
    model, adapters = adapted()
    adapters.add("b", "lora", rank=2)
    shake(adapters, "b")
    with adapters.caching():
        with adapters.use("b"):
            first = logits(model)
        adapters.remove("b")
        adapters.add("b", "lora", rank=2, seed=5)
        shake(adapters, "b", seed=7)
        with adapters.use("b"):
            assert (logits(model) - first).abs().max() > 1e-3
            second = logits(model)
    with adapters.use("b"):
        assert torch.equal(logits(model), second)


# ---- removed and detached --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["b", ["a", "b"], ["b", "c"]])
@pytest.mark.parametrize("outer", ["default", "use", "mixed", "thread"])
def test_an_adapter_that_comes_back_is_not_removed(outer, inner):
    model, adapters = adapted()
    for name in "bc":
        adapters.add(name, "lora", rank=2, head=True)
        shake(adapters, name)
    ids = [0, 1, 1, 0, 1] if isinstance(inner, list) else None
    batch, right = rows(), logits(model)

    def removed():
        with adapters.use(inner, ids), pytest.raises(loralab.UserError, match="active"):
            adapters.remove("a")

    if outer == "default":
        removed()
    elif outer == "thread":
        entered, done = threading.Event(), threading.Event()

        def other():
            with adapters.use("a"):
                entered.set()
                done.wait(10)

        thread = threading.Thread(target=other)
        adapters.activate("c")
        thread.start()
        entered.wait(10)
        removed()
        done.set()
        thread.join()
        adapters.activate("a")
    else:
        adapters.activate("c")
        with adapters.use("a") if outer == "use" else adapters.use(["a", "c"], [0, 1, 0, 1, 0]):
            removed()
        adapters.activate("a")
    assert adapters.names == ["a", "b", "c"]
    assert torch.equal(logits(model, batch), right)
    adapters.activate("b")
    adapters.remove("a")
    assert adapters.names == ["b", "c"]


def test_the_default_removed_inside_the_base_answers_no_more():
    model, adapters = adapted()
    adapters.add("b", "lora", rank=2, head=True)
    with adapters.use(None):
        adapters.remove("a")
        assert torch.equal(logits(model), logits(build("bert")))
    for answer in (lambda: logits(model), lambda: model.bert(**rows())):
        with pytest.raises(loralab.UserError, match=r"removed: call adapters\.activate"):
            answer()
    adapters.activate("b")
    assert logits(model).isfinite().all()


HANDLE_CALLS = {
    "use": lambda h, folder: h.use("a").__enter__(),
    "use base": lambda h, folder: h.use(None).__enter__(),
    "activate": lambda h, folder: h.activate(None),
    "add": lambda h, folder: h.add("b", "lora", rank=2),
    "remove": lambda h, folder: h.remove("a"),
    "save": lambda h, folder: h.save(folder),
    "export": lambda h, folder: h.export(folder),
    "push": lambda h, folder: h.push("me/adapter", dry_run=True),
    "merge": lambda h, folder: h.merge(),
    "merge by name": lambda h, folder: h.merge("a"),
    "state": lambda h, folder: h.state("a"),
    "tensors": lambda h, folder: h.tensors(),
    "counts": lambda h, folder: h.counts("a"),
    "spec": lambda h, folder: h.spec("a"),
    "coverage": lambda h, folder: h.coverage(),
    "parameter_groups": lambda h, folder: h.parameter_groups(),
    "save_pretrained": lambda h, folder: h.save_pretrained(folder),
    "push_to_hub": lambda h, folder: h.push_to_hub("me/adapter"),
    "fast": lambda h, folder: h.fast(),
    "reference": lambda h, folder: h.reference(),
    "combine": lambda h, folder: h.combine("sum", {"a": 0.5}),
    "synchronize": lambda h, folder: h.synchronize("a"),
    "detach": lambda h, folder: h.detach(),
}


@pytest.mark.parametrize("call", HANDLE_CALLS)
def test_a_detached_handle_refuses_everything(call, tmp_path):
    model, adapters = adapted()
    adapters.detach()
    with pytest.raises(loralab.UserError, match="detached"):
        HANDLE_CALLS[call](adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not {"save_pretrained", "push_to_hub"} & vars(model).keys()
    again = loralab.attach(model, "lora", rank=2)
    assert again.names == ["default"]


def test_every_public_method_of_a_handle_is_tried_after_detach():
    public = {n for n in dir(loralab.Adapters) if not n.startswith("_") and callable(getattr(loralab.Adapters, n))}
    internal = {
        "only",
        "check_attached",
        "check_undivided",
        "show_labels",
        "parameter_names",
        "before_forward",
        "before_load",
        "after_load",
        "constants",
        "connect",
        "unwrap",
        "caching",
    }
    assert public - internal == {name.split()[0] for name in HANDLE_CALLS}


# ---- labels ----------------------------------------------------------------------------------------------------------


def labelled(count, seed=0):
    config = copy.deepcopy(CONFIGS["bert"])
    config.id2label = {i: f"of {count}: {i}" for i in range(count)}
    config.label2id = {name: i for i, name in config.id2label.items()}
    torch.manual_seed(seed)
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(config).eval()


def right_loss(out, labels, count):
    if count == 1:
        return nn.functional.mse_loss(out[:, 0], labels.float())
    return nn.functional.cross_entropy(out, labels % count)


@pytest.mark.parametrize("base", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_labels_and_loss_are_those_of_the_adapter(count, base, tmp_path):
    first = labelled(count)
    loralab.attach(first, "lora", rank=2, head=True).save(tmp_path / "adapter")
    model = labelled(base)
    model(**rows(), labels=LABELS.float() if base == 1 else LABELS % base)  # fills in the problem type
    before = copy.deepcopy(model.config)
    adapters = loralab.load(model, tmp_path / "adapter", name="a")
    names = {i: f"of {count}: {i}" for i in range(count)}
    plain = adapters.merge()
    plain.save_pretrained(tmp_path / "plain")
    again = type(plain).from_pretrained(tmp_path / "plain").eval()
    labels = LABELS.float() if count == 1 else LABELS % count
    for m in (model, plain, again):
        assert (m.config.id2label, m.config.num_labels, m.num_labels) == (names, count, count)
        assert m.config.label2id == {name: i for i, name in names.items()}
        out = m(**rows(), labels=labels)
        assert out.logits.shape == (5, count)
        torch.testing.assert_close(out.loss, right_loss(out.logits, LABELS, count))
    with adapters.use(None):
        assert model.config.id2label == before.id2label
        of_base = LABELS.float() if base == 1 else LABELS % base
        out = model(**rows(), labels=of_base)
        torch.testing.assert_close(out.loss, right_loss(out.logits, LABELS, base))
    assert model.config.id2label == names
    adapters.detach()
    assert (model.config.id2label, model.num_labels) == (before.id2label, base)


def test_labels_that_a_user_renames_stay():
    model = labelled(3)
    adapters = loralab.attach(model, "lora", rank=2, head=True)
    names = {0: "x", 1: "y", 2: "z"}
    model.config.id2label = dict(names)
    model(**rows(), labels=LABELS)
    assert model.config.id2label == names
    assert adapters.merge().config.id2label == names


def test_labels_without_a_head_of_their_own_are_refused():
    with pytest.raises(loralab.UserError, match="needs a head of its own"):
        loralab.attach(build("bert"), "lora", rank=2, labels=["x", "y"])


def test_the_same_adapter_without_a_head_has_the_labels_of_any_model(tmp_path):
    loralab.attach(labelled(2), "lora", rank=2).save(tmp_path / "adapter")
    model = labelled(3)
    loralab.load(model, tmp_path / "adapter", check_base=False)
    assert model.config.num_labels == 3
    assert model(**rows(), labels=LABELS).loss.isfinite()


# ---- values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", [*ADAPTED, "bitfit", "head"])
def test_values_that_are_not_finite_are_not_passed_on(method, value, tmp_path):
    _, adapters = adapted(method, batches=[batch_of_start()])
    roles = {role: t for role, t in adapters.tensors().values() if t.is_floating_point()}
    for role, t in roles.items():
        kept = t.detach().clone()
        with torch.no_grad():
            t.view(-1)[-1] = value
        for call in ("save", "export", "merge"):
            with pytest.raises(loralab.UserError, match="not finite"):
                HANDLE_CALLS[call](adapters, tmp_path / role / call)
            assert not (tmp_path / role / call).exists()
        with torch.no_grad():
            t.copy_(kept)
    adapters.save(tmp_path / "whole")


# ---- optimizers and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad"])
@pytest.mark.parametrize("part", ["all", "encoder"])
def test_an_optimizer_from_before_attach_is_refused(kind, part):
    model = build("bert")
    held = model if part == "all" else model.bert.encoder
    early = getattr(torch.optim, kind)(held.parameters(), lr=1e-2)
    adapters = loralab.attach(model, "lora", rank=2, head=True)
    model.train()(**rows(), labels=LABELS).loss.backward()
    for _ in range(2):
        with pytest.raises(loralab.UserError, match="made before attach"):
            early.step()
    getattr(torch.optim, kind)(adapters.parameter_groups(lr=1e-2)).step()
    getattr(torch.optim, kind)(model.parameters(), lr=1e-2).step()  # frozen tensors beside those that learn
    other = nn.Linear(3, 2)
    getattr(torch.optim, kind)(other.parameters(), lr=1e-2).step()
    adapters.detach()
    early.step()


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_base_that_was_set_to_learn_is_refused_by_name(kind, fast):
    model, adapters = adapted(kind=kind)
    if fast:
        prepare(model)
    model.requires_grad_(True)
    logits(model)
    with pytest.raises(loralab.UserError, match=r"weight requires a gradient.*requires_grad_\(True\)"):
        model.train()(**rows(), labels=LABELS)
    adapters.detach()


def test_what_learns_beside_the_adapter_is_told_when_it_is_saved(tmp_path):
    model, adapters = adapted()
    for layer in model.bert.encoder.layer:
        layer.output.LayerNorm.requires_grad_(True)
    with pytest.warns(UserWarning, match="4 tensors.*no part of adapter 'a'"):
        adapters.save(tmp_path / "a")


# ---- positions -------------------------------------------------------------------------------------------------------


FAMILIES = [
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta-v2", "distilbert", "electra",
    "ernie", "esm", "gpt2", "ibert", "longformer", "megatron-bert", "mobilebert", "mpnet", "mra", "nystromformer",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_row_of_every_family_is_what_the_model_takes(family):
    from transformers import AutoConfig, AutoModel

    from loralab.data.batches import longest

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 37}
    more = {
        "big_bird": {"attention_type": "original_full"},
        "convbert": {"head_ratio": 1},
        "esm": {"mask_token_id": 4, "position_embedding_type": "absolute"},
        "longformer": {"attention_window": 4},
        "mobilebert": {"embedding_size": 24, "intra_bottleneck_size": 24},
        "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
        "xmod": {"languages": ["en"], "default_language": "en"},
    }
    config = AutoConfig.for_model(
        family, vocab_size=101, max_position_embeddings=22, pad_token_id=1, **sizes, **more.get(family, {})
    )
    model = AutoModel.from_config(config).eval()
    most = longest(model)
    assert most is not None

    def takes(count):
        with torch.no_grad():
            model(input_ids=torch.full((2, count), 7), attention_mask=torch.ones(2, count, dtype=torch.int64))

    takes(most)
    if family not in ("deberta-v2", "longformer"):  # relative positions; rows padded to whole windows
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            takes(most + 1)


# ---- what others save ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_save_pretrained_writes_adapters_and_never_half_a_base(kind, tmp_path):
    model, adapters = adapted(kind=kind)
    adapters.add("b", "lora", rank=2, head=True)
    shake(adapters, "b", seed=4)
    right = logits(model)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(Exception, match=r"loralab\.load"):
        type(model).from_pretrained(tmp_path / "saved")
    size = sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*") if file.is_file())
    assert size < 4 * sum(t.nbytes for name in "ab" for t in adapters.state(name).values()) + 200_000
    fresh = build(kind)
    again = loralab.load(fresh, tmp_path / "saved")
    torch.testing.assert_close(logits(fresh), right, rtol=0, atol=1e-6)
    loralab.load(fresh, tmp_path / "saved" / "b")
    assert again.names == ["a", "b"]
    with pytest.raises(loralab.UserError, match="not pushed"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)
    adapters.merge().save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "plain").eval()), right, rtol=0, atol=1e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "bitfit", *STEPPED])
def test_trainer_goes_on_from_what_it_saved(method, tmp_path):
    from test_trainer import examples
    from transformers import Trainer, TrainingArguments

    def trained(folder, resume=None, steps=4):
        model = build("bert")
        more = {"delta-lora": {"wait": 1}, **LENGTH}.get(method, {})  # seed 1: no draw is that of two steps before
        adapters = loralab.attach(model, method, head=True, seed=1, **settings(method, **more))
        given = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, seed=3,
            use_cpu=True, report_to="none", save_strategy="steps", save_steps=2, disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, given, train_dataset=examples()).train(resume_from_checkpoint=resume)
        return adapters.state()

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", steps=2)
    resumed = trained(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2"))
    for key, t in whole.items():
        torch.testing.assert_close(resumed[key], t, rtol=0, atol=1e-6)
    loaded = loralab.load(build("bert"), tmp_path / "parts" / "checkpoint-4")
    for key, t in loaded.state().items():
        assert torch.equal(t, resumed[key])
