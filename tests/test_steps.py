"""The hooks of methods that work at every step: what they see, what they refuse, and what they leave behind."""

import copy
import gc
import io
import weakref

import pytest
import torch
from archs import build, rows, shake
from literal import tensor
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import loralab
from loralab.hooks import LISTENING
from loralab.recipe import FACTORS, NAMED, check, recipe
from loralab.run import Settings, train

STEPPED = [name for name, (row, _) in NAMED.items() if row.factors is not None and row.factors.stepped]
LENGTH = {"adalora": {"total_steps": 20}}
LABELS = torch.tensor([0, 1, 2, 1, 0])


def adapted(method, **given):
    model = build("bert").train()
    adapters = loralab.attach(model, method, rank=4, targets="attention", head=True, **LENGTH.get(method, {}), **given)
    return model, adapters


def adamw(adapters, **given):
    return torch.optim.AdamW(adapters.parameter_groups(lr=1e-2), **given)


def backward(model, seed=1):
    model(**rows(seed=seed), labels=LABELS).loss.backward()


def step(model, optimizer, seed=1):
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad()


def ranks(model, adapters, optimizer, count=12):
    drawn = []
    for _ in range(count):
        backward(model)
        drawn.append(adapters.active.drawn["default"])
        optimizer.step()
        optimizer.zero_grad()
    return drawn


def listening():
    return len(LISTENING)


def test_every_stepped_method_is_here():
    assert {type(NAMED[name][0].factors) for name in STEPPED} == {kind for kind in FACTORS.values() if kind.stepped}


# ---- a missing hook ----------------------------------------------------------------------------------------------


def by_hand(adapters):
    with torch.no_grad():
        for t in adapters.state().values():
            if t.grad is not None:
                t -= 0.01 * t.grad


def by_data(adapters):
    for t in adapters.state().values():
        if t.grad is not None:
            t.data.add_(t.grad, alpha=-0.01)


class Foreign:
    """An optimizer of another library."""

    def __init__(self, adapters):
        self.held = [t for t in adapters.state().values() if t.requires_grad]

    def step(self):
        given = [t for t in self.held if t.grad is not None]
        torch._foreach_add_([t.data for t in given], [t.grad for t in given], alpha=-0.01)


@pytest.mark.parametrize("method", STEPPED)
@pytest.mark.parametrize("update", [by_hand, by_data, lambda adapters: Foreign(adapters).step()])
def test_an_update_that_no_torch_optimizer_makes_is_refused_at_the_next_forward(method, update):
    model, adapters = adapted(method)
    backward(model)
    update(adapters)
    with pytest.raises(loralab.UserError, match="step it with a torch.optim optimizer"):
        model(**rows())
    model.eval()(**rows())  # a prediction is none of its business


@pytest.mark.parametrize("method", STEPPED)
def test_a_loop_that_leaves_torchs_optimizer_later_is_refused_too(method):
    model, adapters = adapted(method)
    optimizer = adamw(adapters)
    for _ in range(3):
        step(model, optimizer)
    backward(model)
    by_hand(adapters)
    with pytest.raises(loralab.UserError, match="did not see"):
        model(**rows())


@pytest.mark.parametrize("method", STEPPED)
def test_training_in_eval_mode_or_past_the_model_is_refused_at_the_step(method):
    for forward in (lambda model: model.eval()(**rows(), labels=LABELS).loss,
                    lambda model: model.train().bert(**rows()).last_hidden_state.pow(2).sum()):  # fmt: skip
        model, adapters = adapted(method)
        shake(adapters, "default")
        forward(model).backward()
        before = {key: t.detach().clone() for key, t in adapters.state().items()}
        with pytest.raises(loralab.UserError, match="call model.train\\(\\)"):
            adamw(adapters).step()
        assert all(torch.equal(t, before[key]) for key, t in adapters.state().items())


CALLS = [lambda optimizer, closure: optimizer.step(closure), lambda optimizer, closure: optimizer.step(closure=closure)]


@pytest.mark.parametrize("method", STEPPED)
@pytest.mark.parametrize("call", CALLS)
def test_a_step_with_a_closure_is_the_step_after_it(method, call):
    """As Lightning steps: forward and backward run inside of `optimizer.step`."""
    states = []
    for with_closure in (False, True):
        model, adapters = adapted(method)
        optimizer = adamw(adapters)
        for seed in range(8):

            def closure(seed=seed, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = model(**rows(seed=seed), labels=LABELS).loss
                loss.backward()
                return loss

            if with_closure:
                assert call(optimizer, closure).item() > 0
            else:
                closure()
                optimizer.step()
        assert adapters.steps.count("default") == 8
        states.append({**adapters.state(), **adapters.steps.state_dict()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][key]) for key, t in states[0].items())


@pytest.mark.parametrize("method", STEPPED)
def test_a_closure_that_is_called_twice_a_step_is_refused(method):
    model, adapters = adapted(method)
    optimizer = torch.optim.LBFGS([t for t in adapters.state().values() if t.requires_grad], lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = model(**rows(), labels=LABELS).loss
        loss.backward()
        return loss

    with pytest.raises(loralab.UserError, match="called once a step"):
        optimizer.step(closure)


def test_two_optimizers_that_share_an_adapter_are_refused_but_the_head_may_have_its_own():
    model, adapters = adapted("delta-lora", wait=2)
    groups = {group["role"]: [] for group in adapters.parameter_groups()}
    for group in adapters.parameter_groups():
        groups[group["role"]] += group["params"]
    head, A = (torch.optim.SGD(groups[role], lr=0.1) for role in ("head", "A"))
    backward(model)
    with pytest.raises(loralab.UserError, match="into one optimizer"):
        A.step()
    both = torch.optim.SGD([*groups["A"], *groups["B"]], lr=0.1)
    head.step(), both.step()
    backward(model)
    both.step(), head.step()
    assert {int(t) for key, t in adapters.state().items() if key.endswith(".step")} == {2}


# ---- which steps count -------------------------------------------------------------------------------------------


def test_gradient_accumulation_draws_once_and_counts_one_step():
    model, adapters = adapted("dylora")
    other, delta = adapted("delta-lora")
    optimizers = adamw(adapters), adamw(delta)
    seen = []
    for number in range(6):
        for part in range(3):
            backward(model, seed=part), backward(other, seed=part)
            seen.append((number, adapters.active.drawn["default"]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert len(set(seen)) == 6
    assert {int(t) for key, t in delta.state().items() if key.endswith(".step")} == {6}


def test_two_adapters_in_one_optimizer_count_only_their_own_steps():
    model = build("bert").train()
    adapters = loralab.attach(model, "delta-lora", name="a", rank=3, wait=9, head=True)
    adapters.add("b", "dylora", rank=3, head=True)
    optimizer = torch.optim.AdamW([*adapters.parameter_groups(name="a"), *adapters.parameter_groups(name="b")], lr=0.01)
    step(model, optimizer)
    with adapters.use("b"):
        for _ in range(2):
            step(model, optimizer)
    with adapters.use(["a", "b"], ids=[0, 1, 1, 0, 1]):
        backward(model)
        assert adapters.active.drawn.keys() == {"a", "b"}
        optimizer.step()
    assert {int(t) for key, t in adapters.state("a").items() if key.endswith(".step")} == {2}
    assert adapters.active.drawn == {}


def test_an_optimizer_around_another_is_one_step():
    class Around(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step(closure)

    model, adapters = adapted("delta-lora")
    optimizer = Around(adamw(adapters))
    for _ in range(3):
        step(model, optimizer)
    assert {int(t) for key, t in adapters.state().items() if key.endswith(".step")} == {3}
    states = []
    for wrap in (Around, lambda inner: inner):
        model, adapters = adapted("lora-fa-precond")
        step(model, wrap(torch.optim.SGD(adapters.parameter_groups(lr=1e-4))))
        states.append(adapters.state())
    assert all(torch.equal(t, states[1][key]) for key, t in states[0].items())  # gradients are scaled once


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_does_not_count(fused):
    model, adapters = adapted("delta-lora")
    optimizer = adamw(adapters, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(4):
        scaler.scale(model(**rows(), labels=LABELS).loss).backward()
        if number == 2:
            next(t for t in adapters.state().values() if t.grad is not None).grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert {int(t) for key, t in adapters.state().items() if key.endswith(".step")} == {3}
    scaler.scale(model(**rows(), labels=LABELS).loss).backward()
    if fused:  # it would unscale in its own kernel, after the hook
        with pytest.raises(loralab.UserError, match="unscale_"):
            scaler.step(optimizer)


def test_a_step_that_failed_can_be_taken_again_by_another_optimizer():
    model, adapters = adapted("delta-lora")

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise MemoryError

    backward(model)
    with pytest.raises(MemoryError):
        Broken(adapters.parameter_groups(), lr=0.1).step()
    step(model, adamw(adapters))
    assert {int(t) for key, t in adapters.state().items() if key.endswith(".step")} == {1}


# ---- a draw is for training alone --------------------------------------------------------------------------------


def test_evaluation_merge_and_export_between_forward_and_step_use_the_full_rank(tmp_path):
    model, adapters = adapted("dylora")
    shake(adapters, "default")
    full = model.eval()(**rows()).logits.detach()
    model.train()
    while True:
        step(model, torch.optim.SGD(adapters.parameter_groups(lr=0.0), lr=0.0))
        backward(model)
        if adapters.active.drawn["default"] < 4:
            break
    drawn = adapters.active.drawn["default"]
    adapters.export(tmp_path / "peft")
    assert loralab.load(build("bert"), tmp_path / "peft").spec(None).recipe.factors.rank == 4
    torch.testing.assert_close(adapters.merge().eval()(**rows()).logits, full, rtol=0, atol=1e-5)
    assert torch.equal(model.eval()(**rows()).logits, full)
    with torch.no_grad():
        assert torch.equal(model.train()(**rows()).logits, full)
    model(**rows())
    assert adapters.active.drawn["default"] == drawn  # the step under way keeps its draw


def test_a_chosen_rank_is_for_evaluation():
    model, adapters = adapted("dylora")
    with adapters.use("default", rank=2), pytest.raises(loralab.UserError, match="model.eval"):
        model(**rows())


# ---- short runs --------------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 3, 4, 5, 9, 10, 11, 40, 255, 502)


def small(method, **given):
    """A model of one layer with an adapter of rank 4."""
    model = nn.Sequential(nn.Linear(11, 13)).train()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * tensor(*p.shape, seed=i))
    return model, loralab.attach(model, method, rank=4, targets=["0"], **given)


def trained(model, adapters, steps, at=()):
    """The update B A after each number of steps in `at`, or after the last."""
    optimizer, found = torch.optim.SGD(adapters.parameter_groups(lr=0.05)), {}
    layer = adapters.layers["0"]
    for number in range(1, steps + 1):
        x, y = tensor(6, 11, seed=number % 7).float(), tensor(6, 13, seed=9 + number % 5).float()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in (at or (steps,)):
            found[number] = layer.lower("default").matrix().detach().clone()
    return found if at else found[steps]


@pytest.fixture(scope="module")
def without():
    """The updates of the method that each would be if its steps did nothing."""
    plain = {"lora-fa-precond": "lora-fa"}
    return {kind: trained(*small(kind), max(LENGTHS), LENGTHS) for kind in ("lora", *plain.values())}, plain


@pytest.mark.parametrize("method", STEPPED)
@pytest.mark.parametrize("steps", LENGTHS)
def test_a_method_acts_within_its_run_or_refuses_it(method, steps, without):
    """Delta-LoRA waited 500 steps, and was plain LoRA in every run that was shorter."""
    try:
        r = recipe(method, rank=4).for_steps(steps)
    except loralab.UserError:
        assert steps < {"dylora": 4, "frozen-dylora": 4, "adalora": 3}[method]
        return
    model, adapters = small(r)
    update = trained(model, adapters, steps)
    found, plain = without
    assert (update - found[plain.get(method, "lora")][steps]).abs().max() > 1e-4
    if method == "adalora":
        assert int((adapters.layers["0"].roles("default")["E"] != 0).sum()) == r.factors.target


@pytest.mark.parametrize("method", STEPPED)
def test_every_length_of_a_run_is_taken_or_refused(method):
    for steps in range(1, 1001):
        try:
            r = recipe(method).for_steps(steps)
        except loralab.UserError:
            assert steps < (3 if method == "adalora" else len(recipe(method).factors.ranks))
            continue
        check(r)
        assert r.for_steps(steps) == r
        assert all(str(note) for note in r.notes(steps))
        if method == "delta-lora":
            assert r.factors.wait == min(500, steps // 10) < steps


@pytest.mark.parametrize(
    ("method", "given", "steps", "problem"),
    [
        ("delta-lora", {"wait": 20}, 20, "wait=20 with a run of 20 steps: W would never follow"),
        ("delta-lora", {"wait": 500}, 255, "expected 0 to 254"),
        ("dylora", {"rank": 8}, 7, "a run of 7 steps cannot train ranks 1 to 8"),
        ("dylora", {"rank": 1}, 99, "one rank to draw is plain lora"),
        ("adalora", {"total_steps": 1000}, 100, "the first gate would close after step 101"),
        ("adalora", {}, 2, "adalora with total_steps=2 would settle the ranks after step 1"),
        ("adalora", {"tinit": 60}, 100, "the budget falls from step 60 to 50, which is no step"),
    ],
)
def test_what_a_run_can_never_reach_is_refused(method, given, steps, problem):
    with pytest.raises(loralab.UserError) as error:
        recipe(method, **given).for_steps(steps)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("method", "given", "steps", "note"),
    [
        ("delta-lora", {"wait": 60}, 100, "delta-lora: wait=60 makes the first 60 of 100 steps plain lora"),
        ("delta-lora", {}, 100, None),
        ("dylora", {"rank": 8}, 20, "dylora: 20 steps train each of 8 ranks about 2.5 times"),
        ("dylora", {"rank": 8}, 80, None),
        ("adalora", {}, 6, "adalora: the ranks fall from 12 to 8 in 3 of 6 steps"),
        ("adalora", {"every": 100}, 900, "adalora: the ranks fall from 12 to 8 in 5 of 900 steps"),
        ("adalora", {"total_steps": 100}, 30, "adalora: the ranks settle after step 50, and the run has 30"),
        ("adalora", {"rank": 1}, 100, "adalora: target_rank=1 is the rank, so no gate closes"),
        ("adalora", {}, 100, None),
        ("lora", {}, 1, None),
        ("full", {}, 1, None),
    ],
)
def test_what_a_short_run_hardly_reaches_is_noted(method, given, steps, note):
    assert recipe(method, **given).for_steps(steps).notes(steps) == ([] if note is None else [note])


def test_a_run_says_so_before_it_trains(tiny, own, tmp_path):
    given = {"task": str(own["class"]), "model": str(tiny), "text": ("sentence",), "label": "label", "epochs": 1,
             "batch_size": 20, "max_length": 32, "selection": "last", "method": "delta-lora"}  # fmt: skip
    with pytest.raises(loralab.UserError, match="wait=10 with a run of 10 steps"):
        train(Settings(**given, set=("wait=10",), out=tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    result = train(Settings(**given, set=("wait=9",), out=tmp_path / "b"))
    assert "delta-lora: wait=9 makes the first 9 of 10 steps plain lora" in result["notes"]
    train(Settings(**given, out=tmp_path / "c"))
    assert loralab.files.read(tmp_path / "c/adapter").recipe.factors.wait == 1


# ---- counting steps ----------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts how often a tensor is read on the host, which waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", STEPPED)
def test_a_step_reads_no_tensor_on_the_host(method):
    """Delta-LoRA and AdaLoRA read a counter of the device in every step, one of them in every layer."""
    model, adapters = adapted(method)
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=0.1))
    for _ in range(3):
        backward(model)
        with Reads() as reads:
            optimizer.step()
        assert reads.count == 0
        optimizer.zero_grad()


def test_the_count_follows_a_counter_that_somebody_else_writes(tmp_path):
    """A loaded adapter, and one that is set back to an earlier state, go on from the step that they hold."""
    model, adapters = small("delta-lora", wait=5)
    trained(model, adapters, 3)
    adapters.save(tmp_path / "a")
    early = {key: t.detach().clone() for key, t in adapters.state().items()}
    trained(model, adapters, 4)
    late = {key: t.detach().clone() for key, t in adapters.state().items()}
    with torch.no_grad():
        for key, t in adapters.state().items():
            t.copy_(early[key])
    assert adapters.steps.count("default") == 3
    trained(model, adapters, 4)
    again = loralab.load(small("lora")[1].merge(), tmp_path / "a")
    assert again.steps.count("a" if "a" in again.names else again.names[0]) == 3
    trained(again.model.train(), again, 4)
    for held in (adapters, again):
        assert all(torch.equal(t, late[key]) for key, t in held.state().items())


# ---- life and death ----------------------------------------------------------------------------------------------


def test_hooks_come_and_go():
    gc.collect()  # models of other tests
    none = listening()
    model, adapters = adapted("lora")
    assert (listening(), len(model._forward_pre_hooks)) == (none, 1)  # one hook of the handle
    adapters.add("a", "dylora", rank=2)
    adapters.add("b", "delta-lora", rank=2)
    assert (listening(), len(model._forward_pre_hooks)) == (none + 1, 2)
    adapters.remove("a")
    assert listening() == none + 1
    adapters.remove("b")
    assert (listening(), len(model._forward_pre_hooks)) == (none, 1)
    adapters.add("c", "dylora", rank=2)
    assert len(adapters.merge("c")._forward_pre_hooks) == 0
    assert (listening(), len(model._forward_pre_hooks)) == (none + 1, 2)
    adapters.detach()
    assert (listening(), len(model._forward_pre_hooks)) == (none, 0)


def test_a_model_that_is_gone_takes_its_hooks_along():
    gc.collect()
    none = listening()
    model, adapters = adapted("dylora")
    optimizer = adamw(adapters)
    ranks(model, adapters, optimizer, 2)
    backward(model)
    handle = weakref.ref(adapters)
    del model, adapters
    gc.collect()
    assert handle() is None
    assert listening() == none
    optimizer.step()


def test_a_model_freed_while_an_optimizer_steps_does_not_disturb_it():
    """Its hooks were taken off while torch walked over them: "OrderedDict mutated during iteration"."""
    model, adapters = adapted("dylora")
    optimizer = adamw(adapters)
    backward(model)
    gone = [adapted("delta-lora")]
    freeing = register_optimizer_step_pre_hook(lambda *_: gone.clear() or (gc.collect() and None))
    _global_optimizer_pre_hooks.move_to_end(freeing.id, last=False)
    try:
        optimizer.step()
    finally:
        freeing.remove()
    assert gone == []


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickled(model)])
def test_a_copy_of_a_model_steps_on_its_own(again):
    model, adapters = adapted("dylora")
    optimizer = adamw(adapters)
    ranks(model, adapters, optimizer, 3)
    backward(model)
    under_way = adapters.active.drawn["default"]
    twin = again(model)
    held = twin._loralab
    assert held is not adapters
    assert held.model is twin
    twin.zero_grad()
    drawn = ranks(twin, held, adamw(held))
    assert drawn[0] == under_way
    assert len(set(drawn)) > 1
    assert adapters.active.drawn["default"] == under_way
    optimizer.step()
    optimizer.zero_grad()
    assert ranks(model, adapters, optimizer) == [*drawn[1:], ranks(twin, held, adamw(held), 1)[0]]
    backward(twin)
    by_hand(held)
    with pytest.raises(loralab.UserError, match="did not see"):
        twin(**rows())
    model(**rows())


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_compiled_model_draws_at_every_step():
    model, adapters = adapted("dylora")
    compiled = torch.compile(model, backend="eager")
    drawn = ranks(compiled, adapters, adamw(adapters))
    twin, expected = adapted("dylora")
    assert drawn == ranks(twin, expected, adamw(expected))
    assert len(set(drawn)) > 1
    for key, t in adapters.state().items():
        torch.testing.assert_close(t, expected.state()[key], rtol=0, atol=1e-4)


# ---- going on later ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STEPPED)
@pytest.mark.parametrize("middle", [False, True])
def test_the_state_of_steps_makes_a_loop_go_on_to_the_same_bits(method, middle):
    """`middle`: saved between a forward and its step, which then begins anew, with the same draw."""
    model, adapters = adapted(method)
    optimizer = adamw(adapters)
    for number in range(6):
        step(model, optimizer, seed=number)
    if middle:
        backward(model)
    saved = {key: t.clone() for key, t in adapters.state().items()}
    steps = {key: t.clone() for key, t in adapters.steps.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    later, others = adapted(method)
    with torch.no_grad():
        for key, t in others.state().items():
            t.copy_(saved[key])
    again = adamw(others)
    again.load_state_dict(moments)
    others.steps.load_state_dict(steps)
    for number in range(8):
        step(model, optimizer, seed=number)
        step(later, again, seed=number)
    assert all(torch.equal(t, others.state()[key]) for key, t in adapters.state().items())
    mine, theirs = adapters.steps.state_dict(), others.steps.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_state_of_other_adapters_is_refused():
    _, dylora = adapted("dylora")
    _, adalora = adapted("adalora")
    with pytest.raises(loralab.UserError, match="of other adapters"):
        dylora.steps.load_state_dict(adalora.steps.state_dict())
    wider = loralab.attach(build("bert"), "adalora", rank=5, targets="attention", total_steps=20)
    with pytest.raises(loralab.UserError, match="another size"):
        adalora.steps.load_state_dict(wider.steps.state_dict())
    _, plain = adapted("lora")
    assert plain.steps.state_dict() == {}
    plain.steps.load_state_dict({})


@pytest.mark.few(2)
@pytest.mark.parametrize("method", STEPPED)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tiny, own, tmp_path, cut_off, method):
    def run(name, **given):
        train(Settings(task=str(own["class"]), model=str(tiny), text=("sentence",), label="label", method=method,
                       rank=4, epochs=2, batch_size=20, max_length=32, checkpoint_every=4, selection="last",
                       out=tmp_path / name, **given))  # fmt: skip
        return loralab.files.read(tmp_path / name / "adapter").tensors

    whole = run("whole")
    with cut_off(15), pytest.raises(KeyboardInterrupt):
        run("cut")
    resumed = run("cut", resume=True)
    assert all(torch.equal(t, resumed[key]) for key, t in whole.items())


def test_memory_follows_what_learns_and_nothing_is_kept_for_methods_without():
    _, adapters = adapted("dylora")
    assert adapters.steps.state_dict().keys() == {"default/random", "default/steps"}
    model, adapters = adapted("adalora")
    path = next(iter(adapters.layers))
    state = adapters.steps.state_dict()
    assert state[f"default/{path}/A.mean"].shape == adapters.layers[path].roles("default")["A"].shape
    step(model, adamw(adapters))
    assert isinstance(model, nn.Module)
    assert state[f"default/{path}/A.mean"].abs().max() > 0  # the live tensor
