"""The laws, over every named recipe on small models. A new row of a table is tested without a new test.

A row is tested over its own store, and LoRA and DoRA over every store; test_product.py has the product, on layers.
"""

import copy
import itertools

import pytest
import torch
from archs import build, check_mixed, labelled, rank_map, rows, shake
from torch import nn
from torch.func import functional_call

import loralab
from loralab.methods import starts
from loralab.recipe import NAMED, from_json, recipe, to_json
from loralab.stores import STORES
from loralab.update import each

HELD = {"delta-lora"}  # holds a part of its update constant; test_methods.py checks its gradients
ADAPTED = [name for name, (row, _) in NAMED.items() if row.factors is not None]
SETTINGS = {"rank": 3, "alpha": 5.0, "block": 5}  # scaling is not 1
# a quantized weight is made anew in float32, so the products, and not the rounding of the weight, set the tolerance
TOLERANCE = dict.fromkeys((None, *STORES), 1e-5) | {"bfloat16": 3e-2}
OWN = [(name, NAMED[name][0].store) for name in ADAPTED]
CASES = [*OWN, *itertools.product(("lora", "dora"), STORES)]
CHANGED = {"loftq"}  # begins off its rounded base on purpose: nearer to the weights before; see test_starts.py


def settings(name):
    allowed = vars(NAMED[name][0].factors) if NAMED[name][0].factors else {}
    return {key: value for key, value in SETTINGS.items() if key in allowed}


def adapted(name, store=None, kind="bert", **more):
    model = build(kind)
    extra = {} if store is None else {"store": store}
    mapped = {"ranks": rank_map(model)} if NAMED[name][0].policy else {}  # a plan makes it from data, before a run
    given = {"batches": [labelled()], **mapped, **settings(name), **extra, **more}  # batches: for data-driven starts
    return model, loralab.attach(model, name, name="a", head=True, **given)


def base_of(name, kind="bert"):
    """The plain model that a method adapts: what it stores in fewer bits is rounded."""
    if NAMED[name][0].store is None:
        return build(kind)
    model, adapters = adapted(name, kind=kind)
    adapters.detach()
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", sorted(set(NAMED) - CHANGED))
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_1_a_fresh_adapter_changes_no_bit(name, kind):
    plain, batch = base_of(name, kind), rows()
    model, _ = adapted(name, kind=kind)
    fresh, expected = logits(model, batch), logits(plain, batch)
    if starts.added(NAMED[name][0].start):  # s B A - B0 A0 is zero to rounding, not in every bit
        torch.testing.assert_close(fresh, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(fresh, expected)


@pytest.mark.parametrize(("name", "store"), CASES)
def test_2_apply_is_the_merged_weight(name, store):
    _model, adapters = adapted(name, store)
    shake(adapters, "a")
    x = torch.randn(5, 7, 24)
    for path in adapters.spec("a").paths[:6]:
        layer = adapters.layers[path]
        x = torch.randn(5, 7, layer.in_features)
        merged = copy.deepcopy(layer).plain("a")
        tolerance = TOLERANCE[store]
        torch.testing.assert_close(layer(x), merged(x), rtol=tolerance, atol=tolerance * merged(x).abs().max().item())
        assert (layer(x) - layer.base(x)).abs().max() > 0.05  # the update is there


@pytest.mark.parametrize(("name", "store"), CASES)
def test_3_a_row_of_a_mixed_batch_is_the_row_alone(name, store):
    model, adapters = adapted(name, store)
    adapters.add("b", "rslora", rank=5, head=True, **({} if store is None else {"store": store}))
    shake(adapters, "a"), shake(adapters, "b", seed=4)
    check_mixed(model, adapters, "ab", [1, 0, 0, 1, 0], TOLERANCE[store])


@pytest.mark.parametrize(("name", "store"), CASES)
def test_4_the_adapted_model_is_the_plain_one_called_with_merged_weights(name, store):
    plain, batch = build("bert"), rows()
    model, adapters = adapted(name, store)
    shake(adapters, "a")
    weights = {}
    for path in adapters.spec("a").paths:
        u, layer = adapters.layers[path].lower("a"), adapters.layers[path]
        weights[f"{path}.weight"] = (layer.base.dense().double() + each(torch.Tensor.double, u).matrix()).float()
        assert u.gain is None or u.gain.shape == (layer.out_features,)
        if u.gain is not None:
            weights[f"{path}.weight"] *= u.gain[:, None]
    with torch.no_grad():
        expected = functional_call(plain, weights, kwargs=batch).logits
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=TOLERANCE[store])
    torch.testing.assert_close(logits(adapters.merge("a"), batch), expected, rtol=0, atol=TOLERANCE[store])


@pytest.mark.parametrize("name", sorted(set(ADAPTED) - HELD))
def test_5_gradients_are_finite_differences_and_only_roles_that_learn_have_one(name):
    torch.manual_seed(3)
    _, adapters = adapted(name, **({"exact_gain": True} if NAMED[name][0].gain else {}))
    shake(adapters, "a")
    layer = adapters.layers[adapters.spec("a").paths[4]].double()
    layer.constants["a"] = {key: t.double() if t.is_floating_point() else t for key, t in layer.constants["a"].items()}
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    learned = [p for p in layer.adapters["a"].parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *learned))
    layer(x).sum().backward()
    r = adapters.spec("a").recipe
    for role, tensor in layer.adapters["a"].items():
        assert (tensor.grad is not None and tensor.grad.abs().max() > 0) == (role in r.learn)
    assert all(p.grad is None for p in layer.base.parameters())


@pytest.mark.parametrize("name", NAMED)
def test_6_counts_are_the_closed_form(name):
    plain = build("bert")
    model, adapters = adapted(name)
    counts = adapters.counts("a")
    r, head = adapters.spec("a").recipe, sum(p.numel() for p in plain.classifier.parameters())
    base = sum(p.numel() for p in plain.bert.parameters())
    biases = sum(p.numel() for key, p in plain.bert.named_parameters() if key.endswith(".bias"))
    expected = {"all": base, "bias": biases, None: 0}[r.learn_base]
    if r.factors is not None:
        sizes = {f"bert.{path}": m.weight.shape for path, m in plain.bert.named_modules() if isinstance(m, nn.Linear)}
        again = [path for paths in (r.ranks.shares.values() if r.ranks else ()) for path in paths[1:]]
        expected += sum(r.count(*size) for path, size in sizes.items() if path not in again)
    assert counts == {"adapter": expected, "head": head, "trainable": expected + head, "base": base}
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    grouped = [p for group in adapters.parameter_groups(lr=1.0) for p in group["params"]]
    assert sum(p.numel() for p in grouped) == counts["trainable"]


@pytest.mark.parametrize(("name", "store"), [*CASES, ("head", None), ("full", None)])
def test_7_save_and_load_keep_every_bit(name, store, tmp_path):
    model, adapters = adapted(name, store)
    shake(adapters, "a")
    nn.init.normal_(adapters.heads["classifier"].copies["a"].weight)
    adapters.save(tmp_path / "adapter")
    fresh = build("bert")
    loaded = loralab.load(fresh, tmp_path / "adapter")
    assert loaded.spec("a").recipe == adapters.spec("a").recipe
    assert loaded.state("a").keys() == adapters.state("a").keys()
    assert all(torch.equal(loaded.state("a")[key], tensor) for key, tensor in adapters.state("a").items())
    assert torch.equal(logits(fresh, rows()), logits(model, rows()))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("name", "store"),
    [*[(n, NAMED[n][0].store) for n in ADAPTED], ("head", None), *[(ADAPTED[0], store) for store in STORES]],
)
def test_8_detach_gives_the_tree_and_the_bits_back(name, store, kind):
    before = build(kind)
    learned = {key: p.requires_grad for key, p in before.named_parameters()}
    model, adapters = adapted(name, store, kind)
    shake(adapters, "a")
    adapters.add("b", "lora", rank=2, targets="attention-v", **({} if store is None else {"store": store}))
    kept = {f"{path}.weight": layer.base.dense().detach() for path, layer in adapters.layers.items()}
    kept = {key: W.T if kind == "gpt2" else W for key, W in kept.items()}  # its layers are all Conv1D
    adapters.detach()
    assert {key: type(m) for key, m in model.named_modules()} == {key: type(m) for key, m in before.named_modules()}
    assert {key: p.requires_grad for key, p in model.named_parameters()} == learned
    if store is None:
        assert all(torch.equal(p, before.get_parameter(key)) for key, p in model.named_parameters())
        assert torch.equal(logits(model, rows()), logits(before, rows()))
    else:  # what was rounded stays rounded, in the dtype it came in
        for key, p in before.named_parameters():
            assert torch.equal(model.get_parameter(key), kept.get(key, p).to(p.dtype))
    assert not hasattr(model, "_loralab")


@pytest.mark.parametrize("name", [name for name in ADAPTED if NAMED[name][0].low_rank])
def test_9_export_to_plain_lora_is_the_same_function(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapters = adapted(name)
    shake(adapters, "a")
    expected = logits(model, rows())
    adapters.export(tmp_path / "peft", name="a")
    theirs = peft.PeftModel.from_pretrained(base_of(name), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, rows()), expected, rtol=0, atol=1e-5)
    ours = base_of(name)
    loralab.load(ours, tmp_path / "peft", check_base=False)  # of a store, its weights are those that were kept
    torch.testing.assert_close(logits(ours, rows()), expected, rtol=0, atol=1e-5)


DENSE = [name for name in ADAPTED if not NAMED[name][0].low_rank]


@pytest.mark.parametrize("name", [name for name in DENSE if NAMED[name][0].factors.kind != "oft"])  # which PEFT has
def test_9_what_is_no_low_rank_product_is_not_exported_but_merged(name, tmp_path):
    _, adapters = adapted(name)
    with pytest.raises(loralab.UserError, match="merge it instead"):
        adapters.export(tmp_path / "peft", name="a")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("name", NAMED)
def test_recipes_survive_json(name):
    r = recipe(name, **settings(name), lr=0.5)
    assert from_json(to_json(r)) == r


def test_the_base_stays_and_the_adapter_moves_in_training():
    model, adapters = adapted("lora", dropout=0.3)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-2))
    for _ in range(3):
        model.train()(**rows(), labels=torch.tensor([0, 1, 2, 1, 0])).loss.backward()
        optimizer.step()
    owned = {id(t) for t in adapters.state("a").values()}
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) == (id(p) not in owned), key
