"""Nothing silent: what changes a model behind its adapters is followed exactly, or refused with a reason.

Each kind has a generator of instances where there can be one; the right value comes from a model that never saw the
change happen.
"""

import asyncio
import contextvars
import copy
import gc
import itertools
import threading
import weakref

import pytest
import torch
from archs import CONFIGS, build, rows, shake
from archs import labelled as batch_of_start
from conftest import TIMES
from test_steps import LENGTH, STEPPED
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

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


# ---- threads and tasks -----------------------------------------------------------------------------------------------


def several(method="lora", head=True, count=8):
    model, adapters = adapted(method, name="a0", head=head)
    for i in range(1, count):
        adapters.add(f"a{i}", "lora" if i % 2 else "dora", rank=2, head=head, seed=i)
        shake(adapters, f"a{i}", seed=i)
    right = {}
    for name in adapters.names:
        with adapters.use(name):
            right[name] = logits(model)
    with adapters.use(["a1", "a2"], ids=[0, 1, 1, 0, 1]):
        right["mixed"] = logits(model)
    assert len({tuple(t.flatten().tolist()) for t in right.values()}) == count + 1
    return model, adapters, right


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_sixteen_threads_use_sixteen_adapters_of_one_model(fast, tally):
    model, adapters, right = several(count=16)
    if fast:
        prepare(model)
    wrong, errors = [], []

    def ask(name):
        try:
            for turn in range(10 * TIMES):
                with adapters.use(name), adapters.caching() if turn % 2 else adapters.use(name):
                    if not torch.allclose(logits(model), right[name], atol=1e-5):
                        wrong.append(name)
                with adapters.use(["a1", "a2"], ids=[0, 1, 1, 0, 1]):
                    if not torch.allclose(logits(model), right["mixed"], atol=1e-5):
                        wrong.append("mixed")
                if not torch.allclose(logits(model), right["a0"], atol=1e-5):
                    wrong.append("default")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(name,)) for name in adapters.names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally("answers of threads", 3 * 16 * 10 * TIMES, len(wrong) + len(errors))
    assert (wrong, errors) == ([], [])


def test_tasks_use_their_own_adapters_across_waits():
    model, adapters, right = several()

    async def ask(name):
        out = []
        with adapters.use(name):
            for _ in range(5):
                await asyncio.sleep(0)
                out.append(torch.allclose(logits(model), right[name], atol=1e-5))
                assert adapters.active.names == (name,)
        return out

    async def all_of_them():
        return await asyncio.gather(*map(ask, adapters.names))

    assert all(map(all, asyncio.run(all_of_them())))
    assert adapters.active.names == ("a0",)


def test_a_thread_begins_with_the_default_and_a_copied_context_with_what_is_in_use():
    model, adapters, right = several()
    seen = {}

    def ask(key):
        seen[key] = logits(model)

    with adapters.use("a3"):
        context = contextvars.copy_context()
        threads = [
            threading.Thread(target=ask, args=("thread",)),
            threading.Thread(target=context.run, args=(ask, "in")),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(seen["thread"], right["a0"], rtol=0, atol=1e-6)
    torch.testing.assert_close(seen["in"], right["a3"], rtol=0, atol=1e-6)


def test_threads_train_their_own_adapters():
    model, adapters, _ = several()
    grads = {}
    for together in (False, True):

        def step(name):
            with adapters.use(name):
                loss = model(**rows(), labels=LABELS).loss
            loss.backward()

        for t in (t for name in adapters.names for t in adapters.state(name).values()):
            t.grad = None
        threads = [threading.Thread(target=step, args=(name,)) for name in adapters.names]
        for thread in threads:
            thread.start()
            if not together:
                thread.join()
        for thread in threads:
            thread.join()
        grads[together] = [t.grad for name in adapters.names for t in adapters.state(name).values() if t.requires_grad]
    for one, other in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["inside", "after", "inside another", "thread"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora", "dylora"])
def test_checkpointing_recomputes_with_the_adapters_of_the_forward_pass(method, reentrant, where):
    """Gradients are those without checkpointing, wherever and whenever the backward pass runs."""
    grads = []
    for checkpointed in (False, True):
        model, adapters = adapted(method, "bert")
        adapters.add("b", "lora", rank=2, head=True)
        shake(adapters, "b", seed=5)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        with adapters.use("b"):
            one = model(**rows(), labels=LABELS).loss
        with adapters.use("a"):
            two = model(**rows(), labels=LABELS).loss
            if where == "inside":
                (one + two).backward()
        if where == "after":
            (one + two).backward()
        elif where == "inside another":
            with adapters.use(None):
                (one + two).backward()
        elif where == "thread":
            thread = threading.Thread(target=(one + two).backward)
            thread.start()
            thread.join()
        grads.append({n: {k: t.grad for k, t in adapters.state(n).items() if t.requires_grad} for n in "ab"})
    for name, key in ((n, k) for n in "ab" for k in grads[0][n]):
        plain, again = grads[0][name][key], grads[1][name][key]
        assert (plain is None) == (again is None), key
        if plain is not None:
            torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_users_own_checkpoint_follows_too(reentrant):
    model = nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 7))
    adapters = loralab.attach(model, "lora", name="a", rank=2, targets=["0", "2"])
    adapters.add("b", "lora", rank=3, targets=["0", "2"])
    shake(adapters, "a"), shake(adapters, "b", seed=4)
    x, grads = torch.randn(5, 11, requires_grad=True), []
    for region in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        with adapters.use("b"):
            y = region(x).square().sum()
        y.backward()
        grads.append([t.grad.clone() for t in adapters.state("b").values()])
        assert all(t.grad is None for t in adapters.state("a").values())
        for t in adapters.state("b").values():
            t.grad = None
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_replica_of_data_parallel_does_not_ignore_use():
    _, adapters = adapted(targets="attention-q")
    layer = next(iter(adapters.layers.values()))
    replica = layer._replicate_for_data_parallel()
    x, said = torch.randn(5, layer.in_features), []

    def run():
        try:
            replica(x)
            said.append("ok")
        except loralab.UserError as error:
            said.append(str(error))

    def in_thread():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    in_thread()
    with adapters.use("a"):
        in_thread()
    assert said[0] == "ok"
    assert "DataParallel runs the model in threads" in said[1]


@pytest.mark.slow
def test_a_compiled_model_follows_use_in_one_thread_and_refuses_others():
    model, adapters = adapted()
    adapters.add("b", "dora", rank=2, head=True)
    shake(adapters, "b", seed=5)
    right, called = {}, torch.compile(model, backend="eager")

    def use(name):
        return adapters.use(["a", "b"], ids=[0, 1, 0, 1, 1]) if name == "mixed" else adapters.use(name)

    for name in ("a", "b", None, "mixed"):
        with use(name):
            right[name] = logits(model)
    for name in ("a", "b", "a", None, "mixed", "b"):
        with use(name):
            torch.testing.assert_close(logits(called), right[name], rtol=0, atol=1e-6)
    adapters.activate("b")
    torch.testing.assert_close(logits(called), right["b"], rtol=0, atol=1e-6)
    said = []

    def other():
        for act in (lambda: adapters.use("a").__enter__(), lambda: logits(called)):
            try:
                act()
                said.append("ok")
            except loralab.UserError as error:
                said.append(str(error))

    with adapters.use("a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        torch.testing.assert_close(logits(model), right["a"], rtol=0, atol=1e-6)
    assert all("in several threads" in text for text in said), said


# ---- casts -----------------------------------------------------------------------------------------------------------

CASTS = {
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16, 0.05),
    "half": (lambda m: m.half(), torch.float16, 0.01),
    "double": (lambda m: m.double(), torch.float64, 1e-9),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16, 0.05),
    "data": (lambda m: [setattr(p, "data", p.data.double()) for p in m.parameters() if p.is_floating_point()],
             torch.float64, 1e-9),
}  # fmt: skip


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "lokr", "pissa", "qlora", "bitfit"])
def test_merge_after_a_cast_is_the_adapted_model_in_that_dtype(method, cast, when):
    change, dtype, tolerance = CASTS[cast]
    model = build("bert")
    if when == "before":
        change(model)
    elif cast == "data" and method == "qlora":
        pytest.skip("a cast past the modules is not seen by codes")
    model, adapters = adapted(method, model=model)
    if when == "after":
        change(model)
    right = logits(model).double()
    plain = adapters.merge()
    assert {p.dtype for p in plain.parameters()} == {dtype}
    merged = logits(plain)
    assert merged.dtype == dtype
    scale = right.abs().max().item()
    store = 1e-4 if method == "qlora" else 0.0  # a stored weight is decoded in float32
    torch.testing.assert_close(merged.double(), right, rtol=0, atol=max(tolerance, store) * max(1.0, scale))
    adapters.detach()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_learns_over_a_narrow_base_is_float32_and_stays_finite(kind, dtype):
    model = build(kind).to(dtype)
    adapters = loralab.attach(model, "lora", rank=2, head=True)
    assert {t.dtype for t in adapters.state().values()} == {torch.float32}
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-2))
    losses = []
    for _ in range(12):
        loss = model(**rows(), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(t.isfinite().all() for t in adapters.state().values())
    assert losses[-1] < losses[0]
    plain = adapters.merge()
    assert {p.dtype for p in plain.parameters()} == {dtype}
    torch.testing.assert_close(logits(plain).float(), logits(model).float(), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", [["bert.pooler"], ["bert.embeddings.word_embeddings"], ["bert.encoder.layer.1"]])
def test_a_head_inside_a_narrow_model_hands_on_its_dtype(head, dtype):
    if head == ["bert.encoder.layer.1"]:
        head = ["bert.encoder.layer.1.output.dense"]
    model = build("bert").to(dtype)
    right = logits(model)
    adapters = loralab.attach(model, "lora", rank=2, targets="attention-qv", head=head)
    torch.testing.assert_close(logits(model), right, rtol=0, atol=0.02)
    model.train()(**rows(), labels=LABELS).loss.backward()
    assert all(t.grad is not None for key, (role, t) in adapters.tensors().items() if role == "head")


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


# ---- constants of a method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vera", "superlora"])
def test_constants_follow_a_model_that_moves(method):
    model, adapters = adapted(method)
    right = logits(model)
    held = [t for layer in adapters.layers.values() for t in layer.constants["a"].values()]
    storages = {t.untyped_storage().data_ptr() for t in held}
    assert held
    gone = weakref.ref(next(iter(adapters.layers.values()))._sources["a"][1])
    back = copy.deepcopy(model)
    model.to("meta")
    assert {t.device.type for layer in adapters.layers.values() for t in layer.constants["a"].values()} == {"meta"}
    assert len({id(layer._sources["a"][1]) for layer in adapters.layers.values()}) == 1  # once on a device
    del held
    gc.collect()
    assert gone() is None or gone() is next(iter(of(back).layers.values()))._sources["a"][1]
    for layer in adapters.layers.values():
        assert layer(torch.empty(5, layer.in_features, device="meta")).is_meta
    assert torch.equal(logits(back), right)
    back.to("cpu")
    again = [t for layer in of(back).layers.values() for t in layer.constants["a"].values()]
    assert len({t.untyped_storage().data_ptr() for t in again}) == len(storages)


@pytest.mark.parametrize("method", ["vera", "superlora"])
@pytest.mark.parametrize(("cast", "tolerance"), [("half", 0.02), ("bfloat16", 0.1), ("double", 1e-4)])
def test_constants_serve_a_model_in_any_dtype(method, cast, tolerance):
    model, adapters = adapted(method, d_start=0.1) if method == "vera" else adapted(method)
    right = logits(model).double()
    getattr(model, cast)()
    torch.testing.assert_close(logits(model).double(), right, rtol=0, atol=tolerance * right.abs().max().item())
    model.train()(**rows(), labels=LABELS).loss.backward()
    assert all(t.grad is not None for t in adapters.state().values() if t.requires_grad)


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
