"""Every setting of every method can be set by its own name, has a meaning, and changes something or is refused."""

import hashlib
import json
import types
import typing
from functools import cache
from typing import Any, Literal

import pytest
import torch
from literal import tensor
from torch import nn

import loralab
from loralab import options
from loralab.cli import main
from loralab.policies import POLICIES
from loralab.recipe import NAMED, recipe
from loralab.run.policies import MAKERS

EVERY = [(method, name) for method in NAMED for name in options.options(method)]
STEPS = 5
TARGETS = ["0", "2"]  # 24 x 10 and 8 x 216: sizes that split and fold for SuperLoRA
# other settings that a setting needs before it can act; the first that the method takes
BESIDE: dict[str, list[dict[str, Any]]] = {
    "exact_gain": [{"gain": True}],
    "projection_seed": [{"ratio": 0.5}],
    "projection": [{"ratio": 0.5}],
    "stabilized": [{"rank": 2}],  # at rank 1 both scales are alpha
}
SMALL = {"adalora": {"rank": 6, "total_steps": STEPS}, "vera": {"rank": 5}}  # else rank 4; SuperLoRA's T_k need rank 1


def plain() -> nn.Module:
    model = nn.Sequential(nn.Linear(10, 216), nn.Tanh(), nn.Linear(216, 8))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * tensor(*p.shape, seed=i))
    return model.train()


def usual(method: str) -> dict[str, Any]:
    """The settings that a test begins with, which fit a small layer and a loop of one's own."""
    row = NAMED[method][0]
    if row.factors is None:
        return {}
    ranked = {"rank": 1 if row.factors.kind == "superlora" else 4} if hasattr(row.factors, "rank") else {}
    small = SMALL.get(method, ranked)
    return small | ({"policy": None} if row.policy else {})


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """A loss for starts that look at gradients."""
    return model(**batch).square().sum()


@cache
def behaviour(method: str, given: tuple[tuple[str, Any], ...]) -> str:
    """The hash of all that training shows: start, groups, draws, outputs, gradients, values, and the state of steps."""
    settings, model, seen = dict(given), plain(), hashlib.sha256()

    def see(name: Any, t: Any = None) -> None:
        seen.update(repr(name).encode())
        seen.update(b"" if t is None else t.detach().contiguous().double().numpy().tobytes())

    batches = [{"input": tensor(40, 10, seed=9).float()}]
    head = ["2"] if recipe(method).factors is None else False
    adapters = loralab.attach(model, method, targets=TARGETS, head=head, batches=batches, loss=loss_of, **settings)
    groups = adapters.parameter_groups(weight_decay=0.01)
    for group in groups:
        see((group["role"], group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]]))
    for key, t in adapters.state().items():
        see(key, t)
    for path, layer in adapters.layers.items():
        see(path, layer.base.dense())
    with torch.no_grad():  # off the start, where B = 0 hides the scale
        for i, (role, t) in enumerate(adapters.tensors().values()):
            if t.is_floating_point() and role not in ("m", "head"):
                t.add_(0.1 * tensor(*t.shape, seed=30 + i).to(t.dtype))
    optimizer = torch.optim.AdamW(groups or [nn.Parameter(torch.zeros(1))])
    for step in range(STEPS):
        with torch.random.fork_rng():
            torch.manual_seed(step)  # dropout
            y = model(tensor(7, 10, seed=100 + step).float())
        loss = (y - tensor(7, 8, seed=200 + step).float()).square().mean()
        if loss.requires_grad:
            loss.backward()
        see(adapters.active.drawn, y)
        optimizer.step()
        for key, t in adapters.state().items():
            see(key, t)
            see(key, t.grad)
        optimizer.zero_grad()
    for key, t in adapters.steps.state_dict().items():
        see(key, t)
    return seen.hexdigest()


def inner(option: options.Option) -> Any:
    """The type of a setting without None."""
    kinds = typing.get_args(option.type) if isinstance(option.type, types.UnionType) else (option.type,)
    (kind,) = [kind for kind in kinds if kind is not types.NoneType]
    return kind


def others(method: str, option: options.Option, now: Any) -> list[Any]:
    """Other values of a setting, from its type, or from the registry that its names come from."""
    kind, row = inner(option), NAMED[method][0]
    if option.name in options.CHOICES:
        values = [value for value in options.CHOICES[option.name] if value != "float32"]  # the model has it already
    elif typing.get_origin(kind) is Literal:
        values = list(typing.get_args(kind))
    elif option.name == "inputs":
        values = [("0",), ("0", "2"), ("nothing",)]
    elif typing.get_origin(kind) is tuple:
        values = [(role,) for role in (*row.roles, "bias", "all") if (role,) != row.learn]
    elif kind is bool:
        values = [not now]
    elif kind is int:
        values = [3, 2, 5, 0]
    else:
        assert kind is float
        values = [0.5 * now, 2 * now, 0.3]
    return [value for value in values if value != now]


def accepted(method: str, settings: dict[str, Any]) -> bool:
    try:
        recipe(method, **settings)
    except loralab.UserError:
        return False
    return True


@pytest.mark.parametrize(("method", "name"), EVERY)
def test_every_setting_changes_something_or_is_refused(method: str, name: str) -> None:
    """A value that is accepted must act; of the numbers one must, as another may happen to be the default."""
    option, settings = options.options(method)[name], usual(method)
    settings = next((settings | more for more in BESIDE.get(name, []) if accepted(method, settings | more)), settings)
    now = getattr(recipe(method, **settings), name, None)
    if hasattr(recipe(method).factors, name):
        now = getattr(recipe(method, **settings).factors, name)
    values = others(method, option, now)
    if name == "source" and not values:
        return  # it names the version of a generator, of which there is one
    assert values
    free = [value for value in values if accepted(method, settings | {name: value})]
    if name == "policy":  # a run makes the map before the method begins
        assert set(free) <= MAKERS.keys()
        return
    one_of_many = inner(option) in (int, float)
    before = behaviour(method, tuple(sorted(settings.items())))
    for value in free:
        try:
            acts = behaviour(method, tuple(sorted((settings | {name: value}).items()))) != before
        except loralab.UserError:  # a size that these layers cannot have
            continue
        if acts and one_of_many:
            return
        assert acts or one_of_many, f"{name}={value!r} of {method} changes nothing"
    assert not one_of_many or not free, f"{name} of {method} changes nothing: tried {free}"


def test_every_policy_has_a_maker() -> None:
    assert MAKERS.keys() == POLICIES.keys()


# ---- by name, as text, in help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMED)
def test_every_setting_goes_through_text_and_back(method: str) -> None:
    """`--set` and TOML give what Python gives."""
    for option in options.options(method).values():
        for value in [option.default, *others(method, option, option.default)]:
            parsed = options.parse(method, options.texts({option.name: value}))
            assert parsed == {option.name: value}
            assert type(parsed[option.name]) is type(value)


@pytest.mark.parametrize("method", NAMED)
def test_every_setting_has_a_meaning_and_a_name_of_its_own(method: str) -> None:
    row, listed = NAMED[method][0], options.options(method)
    for option in listed.values():
        assert len(option.meaning.split()) >= 3, f"{option.name} of {method} says nothing of what it is"
        assert option.expects
        assert option.name not in options.NOT_SET
    fields = {*vars(row), *vars(row.factors or object)} if row.factors else {"train", "lr"}
    assert listed.keys() == {name for name in fields if not name.startswith("_")} - options.NOT_SET.keys()


@pytest.mark.parametrize(
    ("method", "text", "problem"),
    [
        (
            "delta-lora",
            "wiat=3",
            "no setting 'wiat' (did you mean 'wait'?): there are rank, alpha, stabilized, follow",
        ),
        ("delta-lora", "wait=soon", "--set wait=soon: expected a whole number"),
        ("delta-lora", "follow=inf", "--set follow=inf: expected a number"),
        ("dylora", "frozen=maybe", "--set frozen=maybe: expected true or false"),
        ("vera", "source=torch", "--set source=torch: expected 'philox-1' or 'peft'"),
        ("lora", "wait=3", "method 'lora' has no setting 'wait'"),
        ("head", "dropout=0.1", "method 'head' has no setting 'dropout'"),
        ("lora", "ranks=map.json", "--set ranks: give a rank map with --ranks FILE"),
        ("lora", "rank", "--set rank: expected name=value"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(method: str, text: str, problem: str) -> None:
    with pytest.raises(loralab.UserError) as error:
        options.parse(method, [text])
    assert problem in str(error.value)


@pytest.mark.parametrize("method", NAMED)
def test_methods_prints_every_setting_of_one(method: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["methods", method]) == 0
    lines = capsys.readouterr().out.splitlines()
    for option in options.options(method).values():
        (line,) = [line for line in lines if line.split()[:1] == [option.name]]
        assert " ".join(option.meaning.split()) in " ".join(line.split())
    assert main(["methods", method, "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings.keys() == options.options(method).keys()
    assert all(row["meaning"] for row in settings.values())


def test_methods_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "delta-lra"]) == 2
    assert "did you mean 'delta-lora'?" in capsys.readouterr().err
