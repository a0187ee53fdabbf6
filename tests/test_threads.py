"""Threads, tasks and copies for several devices: each uses the adapters that it asked for, or is refused."""

import asyncio
import contextvars
import threading

import pytest
import torch
from archs import rows, shake
from conftest import TIMES
from test_silent import LABELS, adapted, logits
from torch import nn
from torch.utils.checkpoint import checkpoint

import loralab
from loralab.fast import prepare


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
