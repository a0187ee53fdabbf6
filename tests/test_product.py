"""The ten laws over the whole product factors x gain x store x train, on layers of prime sizes; and what is refused.

In generic position: bias present, every parameter off its start, scaling not 1, dropout 0.3 where it applies.
"""

import itertools

import pytest
import torch
from literal import UPDATES, forward, ia3_of_inputs, product, superlora, tensor
from measure import largest, weighted
from torch import nn
from torch.func import functional_call

import loralab
from loralab.methods.adalora import AdaLoRA
from loralab.methods.delta import DeltaLoRA
from loralab.methods.dylora import DyLoRA
from loralab.methods.ia3 import IA3
from loralab.methods.lora import LoRA
from loralab.methods.miss import MiSS
from loralab.methods.oft import OFT
from loralab.methods.precond import PreconditionedLoRA
from loralab.methods.starts import added
from loralab.methods.superlora import SuperLoRA
from loralab.methods.vera import VeRA
from loralab.recipe import FACTORS, Recipe, check
from loralab.stores import STORES

SIZES = ((13, 11), (7, 13))  # (out, in) of the two layers
KINDS = {  # name -> factors, start
    "lora": (LoRA(3, 5.0), "kaiming"),
    "rslora": (LoRA(3, 5.0, stabilized=True), "kaiming"),
    "pissa": (LoRA(3, 5.0), "pissa"),
    "vera": (VeRA(5), "kaiming"),
    "miss": (MiSS(4), "kaiming"),
    "ia3": (IA3(), "kaiming"),
    "ia3 of inputs": (IA3(("0",)), "kaiming"),
    "oft": (OFT(), "kaiming"),
    "oft series": (OFT(terms=5), "kaiming"),
    "dylora": (DyLoRA(3, 5.0), "kaiming"),
    "frozen-dylora": (DyLoRA(3, 5.0, frozen=True), "kaiming"),
    "delta-lora": (DeltaLoRA(3, 5.0, follow=1.7, wait=2), "kaiming"),
    "adalora": (AdaLoRA(3, 5.0, total_steps=9), "kaiming"),
    "lora-fa-precond": (PreconditionedLoRA(3, 5.0), "kaiming"),
    "core": (SuperLoRA(3, 5.0, core=True), "kaiming"),
    "lokr": (SuperLoRA(2, 5.0, split=2), "kaiming"),
    "lorta": (SuperLoRA(2, 5.0, order=3, core=True), "kaiming"),
    "superlora": (SuperLoRA(2, 5.0, ratio=0.25), "kaiming"),
    "fastfood": (SuperLoRA(2, 5.0, ratio=0.25, projection="fastfood", projection_seed=4), "kaiming"),
    "groups": (SuperLoRA(2, 5.0, groups=13), "kaiming"),  # a group for each row, as the sizes are prime
}
LISTED = {type(factors) for factors, _ in KINDS.values()}
# a class without a row of its own has its defaults, but a scaling that is not 1
KINDS |= {kind: (made(3, 5.0), "kaiming") for kind, made in FACTORS.items() if made not in LISTED}
HAND = {
    "lokr": [(1, 1), (13, 11)],
    "lorta": [(13, 11)],
    "superlora": [(7, 6)],
    "fastfood": [(7, 6)],
    "groups": [(1, 11)],
}
LITERAL = UPDATES | {
    "ia3 of inputs": ia3_of_inputs,
    "oft series": UPDATES["oft"],
    "core": lambda p, f, drawn=None: f.alpha / f.rank * product(p["B"], product(p["C"], p["A"])),
    **{name: lambda p, f, drawn=None, hand=hand: superlora(p, f, hand, SIZES[0]) for name, hand in HAND.items()},
}
GRID = [
    case for case in itertools.product(KINDS, (None, *STORES), (False, True)) if KINDS[case[0]][0].gains or not case[2]
]
ROUNDED = {"bfloat16": 0.03}  # its products are rounded too; any other store is exact in the dtype of x
EXACT = [case for case in GRID if case[1] not in ROUNDED]  # whose gradients finite differences can see
over = pytest.mark.parametrize(("kind", "store", "gain"), GRID)


def test_every_kind_of_factors_is_in_the_product():
    assert {type(factors) for factors, _ in KINDS.values()} == set(FACTORS.values())


def plain():
    model = nn.Sequential(nn.Linear(*SIZES[0][::-1]), nn.Tanh(), nn.Linear(*SIZES[1][::-1]))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.4 * tensor(*p.shape, seed=i))
    return model


def point(kind, store, gain, train=None, dropout=0.0, exact=False):
    factors, start = KINDS[kind]
    return check(Recipe(factors, start, gain, exact, store, train, dropout=dropout))


def attached(kind, store, gain, move=True, **given):
    model = plain()
    adapters = loralab.attach(model, point(kind, store, gain, **given), name="a", targets=["0", "2"])
    if move:
        shake(adapters, "a")
    return model, adapters


def shake(adapters, name):
    with torch.no_grad():
        for i, (role, t) in enumerate(adapters.tensors(name).values()):
            if t.is_floating_point():
                t.add_((0.2 if role == "m" else 0.5) * tensor(*t.shape, seed=50 + i).float())


def close(mine, theirs, store):
    assert mine.isfinite().all()
    most = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=most * ROUNDED.get(store, 1e-5))


def x_of(*shape):
    return tensor(*shape, seed=99).float()


def stored(store):
    """The plain model with the weights that a store keeps."""
    model = plain()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(layer.weight if store is None else STORES[store](layer.weight, None).dense())
    return model


@over
def test_1_a_fresh_adapter_changes_no_bit(kind, store, gain):
    x = x_of(5, 7, 11)
    model, adapters = attached(kind, store, gain, move=False)
    with adapters.use(None):
        base = model(x)
    if added(KINDS[kind][1]):  # s B A - B0 A0 is zero to rounding
        close(model(x), base, store)
    else:
        assert torch.equal(model(x), base)


@over
def test_2_and_4_apply_is_the_merged_weight_and_the_model_called_with_it(kind, store, gain):
    x = x_of(5, 7, 11)
    model, adapters = attached(kind, store, gain)
    weights = {}
    for path, layer in adapters.layers.items():
        u, W = layer.lower("a"), layer.base.dense().double()
        weights[f"{path}.weight"] = ((W + u.matrix()) * (1.0 if u.gain is None else u.gain[:, None])).float()
        z = x_of(5, layer.in_features)
        close(layer(z), nn.functional.linear(z, weights[f"{path}.weight"], layer.bias), store)
        assert (layer(z) - layer.base(z)).abs().max() > 0.1
    close(model(x), functional_call(plain(), weights, (x,)), store)
    close(model(x), adapters.merge("a")(x), store)


@over
@pytest.mark.parametrize("lead", [(5,), (5, 7)])
def test_3_a_row_of_a_mixed_batch_is_the_row_alone(kind, store, gain, lead):
    x, ids = x_of(*lead, 11), [1, 0, 0, 1, 0]
    model, adapters = attached(kind, store, gain)
    adapters.add("b", Recipe(LoRA(2, 3.0), store=store), targets=["2"])
    shake(adapters, "b")
    with adapters.use(["a", "b"], ids=ids):
        mixed = model(x)
    for row, i in enumerate(ids):
        with adapters.use("ab"[i]):
            close(mixed[row], model(x[row : row + 1])[0], store)


def subsets(kind, gain):
    """Each role alone and all of them, and a bias of the base beside them; those that are refused are listed below."""
    factors, _ = KINDS[kind]
    roles = [*factors.learn, *(["m"] if gain else [])]
    return [None, *((role,) for role in roles), tuple(roles), (*roles, "bias")]


def allowed(kind, store, gain):
    return [train for train in subsets(kind, gain) if not refused(kind, store, train, 1.0, 0.0, gain)]


@pytest.mark.parametrize(("kind", "store", "gain"), EXACT)
def test_5_gradients_are_finite_differences_and_only_roles_that_learn_have_one(kind, store, gain):
    for train in allowed(kind, store, gain):
        model, adapters = attached(kind, store, gain, train=train, exact=gain)
        layer, held = adapters.layers["0"], adapters.layers["0"].double()
        held.constants["a"] = {k: t.double() if t.is_floating_point() else t for k, t in held.constants["a"].items()}
        x = tensor(2, 3, 11, seed=4).requires_grad_()
        learned = [t for t in layer.roles("a").values() if t.requires_grad]
        assert len(learned) == len([role for role in layer.roles("a") if role in adapters.spec("a").recipe.learn])
        if train is None and kind != "delta-lora":  # a part of its update is held constant
            assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *learned), fast_mode=True)  # noqa: B023
        weighted(layer(x), [x])
        (layer(x) * tensor(2, 3, 13, seed=5)).sum().backward()
        assert all(t.grad is not None and t.grad.any() for t in learned)
        assert all(t.grad is None for t in layer.parameters() if not t.requires_grad)
        bias = adapters.spec("a").recipe.learn_base == "bias"
        assert (layer.bias.grad is not None) == bias
        assert layer.base.bias is model[0].bias


@over
def test_6_counts_are_the_closed_form(kind, store, gain):
    for train in allowed(kind, store, gain):
        _, adapters = attached(kind, store, gain, move=False, train=train)
        r = adapters.spec("a").recipe
        expected = sum(r.at(path).count(*size) for path, size in zip(("0", "2"), SIZES, strict=True)) + (
            13 + 7 if r.learn_base else 0
        )
        assert adapters.counts("a")["adapter"] == expected
        assert expected == sum(p.numel() for g in adapters.parameter_groups(lr=1.0) for p in g["params"])


@over
def test_7_save_and_load_keep_every_bit(kind, store, gain, tmp_path):
    x = x_of(5, 11)
    given = {"train": allowed(kind, store, gain)[1], "dropout": 0.3 * KINDS[kind][0].drops}
    model, adapters = attached(kind, store, gain, **given)
    adapters.save(tmp_path)
    fresh = plain()
    loaded = loralab.load(fresh, tmp_path)
    assert loaded.spec("a").recipe == adapters.spec("a").recipe
    assert all(torch.equal(loaded.state("a")[key], t) for key, t in adapters.state("a").items())
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@over
def test_8_detach_gives_the_tree_and_the_bits_back(kind, store, gain):
    x, before = x_of(5, 11), plain()
    kept = stored(store)
    model, adapters = attached(kind, store, gain)
    adapters.detach()
    assert {key: type(m) for key, m in model.named_modules()} == {key: type(m) for key, m in before.named_modules()}
    assert all(torch.equal(p, kept.get_parameter(key)) for key, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), kept(x))


@over
def test_9_export_to_plain_lora_is_the_same_function_or_refused(kind, store, gain, tmp_path):
    x = x_of(5, 11)
    model, adapters = attached(kind, store, gain)
    factors = KINDS[kind][0]
    if not (factors.low_rank or (isinstance(factors, OFT) and not gain)):  # PEFT has OFT too
        with pytest.raises(loralab.UserError, match="merge it instead"):
            adapters.export(tmp_path)
        return
    adapters.export(tmp_path)
    ours = stored(store)
    loralab.load(ours, tmp_path, check_base=False)  # its weights are those that the store kept
    close(ours(x), model(x), store)


@over
def test_10_the_lowering_is_the_literal_formula_under_the_same_dropout(kind, store, gain):
    r = point(kind, store, gain, dropout=0.3 * KINDS[kind][0].drops)
    _, adapters = attached(kind, store, gain, dropout=r.dropout)
    layer = adapters.layers["0"].double().train()
    constants = {k: t.double() if t.is_floating_point() else t for k, t in layer.constants["a"].items()}
    layer.constants["a"] = constants
    drawn = 2 if isinstance(r.factors, DyLoRA) else None
    adapters.active.drawn["a"] = drawn
    sides, x = [], tensor(5, 7, 11, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        mask = nn.functional.dropout(torch.ones_like(x), r.dropout)
        torch.manual_seed(6)
        for ours in (True, False):
            xs, held = x.clone().requires_grad_(), layer.roles("a")
            own = {role: t.detach().clone().requires_grad_(t.requires_grad) for role, t in held.items()}
            if ours:
                y, own = layer(xs), held
            else:
                U = LITERAL[kind]({**own, **constants, "W": layer.base.dense().double()}, r.factors, drawn)
                y = forward(xs, layer.base.dense().double(), layer.bias, U, own.get("m"), seen=xs * mask)
            sides.append([y.detach(), *weighted(y, [xs, *(t for t in own.values() if t.requires_grad)])])
    if store in ROUNDED:
        for mine, literal in zip(*sides, strict=True):
            close(mine, literal, store)
    else:  # the lengths of rows of a quantized weight are float32
        assert largest(zip(*sides, strict=True)) < (1e-4 if gain and store not in (None, "float32") else 1e-9)
    assert r.dropout == 0 or (mask == 0).any()


# ---- what is refused -------------------------------------------------------------------------------------------------

STUCK = {  # kind -> roles that never move alone, since what they are multiplied by is zero and frozen
    **{kind: {"A"} for kind in ("lora", "rslora", "dylora", "frozen-dylora", "delta-lora")},
    "vera": {"d"},
    "adalora": {"A", "B"},
    "core": {"A", "C"},
}


def stuck(kind):
    """The roles of a low-rank method that are not zero at the start: they are multiplied by one that is."""
    factors, start = KINDS[kind]
    p = factors.init(*SIZES[0], torch.Generator().manual_seed(0))
    if not factors.low_rank or start != "kaiming":
        return set()
    return {role for role in factors.learn if p[role].any()}


def test_the_roles_that_never_move_alone_are_those_of_the_table():
    assert {kind: found for kind in KINDS if (found := stuck(kind)) and type(KINDS[kind][0]) in LISTED} == STUCK


def refused(kind, store, train, ratio, dropout, gain):
    """The pairs of fields that `check` must name, by rules written out again."""
    factors, _ = KINDS[kind]
    name, learned = factors.kind, train or factors.learn
    pairs = [] if factors.gains or not gain else [("gain=True", name)]
    if dropout and kind == "delta-lora":
        pairs.append((f"dropout={dropout}", name))
    if ratio != 1 and "B" not in learned:
        pairs.append((f"lr_ratio={ratio}", name))
    if train and set(train) <= stuck(kind):
        pairs.append((f"train={train}", name))
    if train and "bias" in train and store:
        pairs.append(("train='bias'", f"store={store!r}"))
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_what_makes_no_sense_is_refused_with_both_fields_and_nothing_else_is(kind):
    factors, start = KINDS[kind]
    seen = {True: 0, False: 0}
    for store, gain, ratio, dropout in itertools.product((None, *STORES), (False, True), (1.0, 16.0), (0.0, 0.3)):
        for train in subsets(kind, gain):
            expected = refused(kind, store, train, ratio, dropout, gain)
            r = Recipe(factors, start, gain, store=store, train=train, lr_ratio=ratio, dropout=dropout)
            seen[bool(expected)] += 1
            if not expected:
                check(r)
                continue
            with pytest.raises(loralab.UserError) as caught:
                check(r)
            told = str(caught.value)
            assert all(field in told for pair in expected for field in pair), told
            assert len(told.split("; ")) >= len(expected)
            assert "\n" not in told
    assert min(seen.values()) > 0


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"factors": None, "gain": True}, ("factors=None", "gain=True")),
        ({"factors": None, "dropout": 0.3}, ("factors=None", "dropout=0.3")),
        ({"factors": None, "train": ("A",)}, ("factors=None", "train=('A',)")),
        ({"factors": None, "lr_ratio": 16.0}, ("factors=None", "lr_ratio=16.0")),
        ({"factors": None, "policy": "drop"}, ("factors=None", "policy='drop'")),
        ({"factors": None, "train": ("all",), "store": "nf4"}, ("train='all'", "store='nf4'")),
        ({"exact_gain": True}, ("exact_gain=True", "gain=False")),
        ({"train": ("m",)}, ("train=('m',)", "lora")),
        ({"factors": VeRA(), "train": ("A",)}, ("train=('A',)", "vera")),
        ({"policy": "error-spectrum"}, ("policy='error-spectrum'", "store=None")),
        ({"policy": "alora", "gain": True}, ("policy='alora'", "gain=True")),
        ({"policy": "alora", "factors": DyLoRA()}, ("policy='alora'", "factors=DyLoRA")),
        ({"policy": "alora", "factors": VeRA()}, ("policy='alora'", "factors=VeRA")),
        ({"policy": "alora", "start": "pissa"}, ("policy='alora'", "start='pissa'")),
        ({"policy": "alora", "factors": None}, ("policy='alora'", "factors=None")),
        ({"start": "loftq"}, ("start='loftq'", "store=None")),
        ({"factors": AdaLoRA(), "start": "gaussian"}, ("start='gaussian'", "adalora")),
        ({"factors": DyLoRA(), "start": "pissa"}, ("start='pissa'", "dylora")),
        ({"train": ()}, ("train=()", "lora")),
    ],
)
def test_other_nonsense_is_refused_with_both_fields(given, fields):
    with pytest.raises(loralab.UserError) as caught:
        check(Recipe(**given))
    assert all(field in str(caught.value) for field in fields), caught.value
