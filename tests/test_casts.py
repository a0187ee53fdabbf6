"""A model that is cast or moved after attach: its adapters, and the constants of their method, follow."""

import copy
import gc
import weakref

import pytest
import torch
from archs import CONFIGS, build, rows, shake
from test_silent import LABELS, adapted, logits

import loralab
from loralab.adapters import of
from loralab.methods import starts
from loralab.recipe import NAMED

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


CAST_METHODS = {
    name: {"rank": 3} if "rank" in vars(row.factors) else {}
    for name, (row, _) in NAMED.items()
    if row.factors is not None and row.store is None and not starts.looks_at(row.start)
} | {"adalora": {"rank": 3, "total_steps": 9}, "lora-drop": {"policy": None}, "alora": {"policy": None}}

CASES = [
    *CAST_METHODS.items(),
    *((name, given | {"gain": True}) for name, given in CAST_METHODS.items() if NAMED[name][0].factors.gains),
    ("oft", {"terms": 5}),
]


@pytest.mark.parametrize("cast", ["bfloat16", "double"])
@pytest.mark.parametrize(("method", "given"), CASES, ids=[f"{m}-{'-'.join(given)}" for m, given in CASES])
def test_every_method_answers_alone_beside_others_and_steps_after_a_cast(method, given, cast):
    change, dtype, _ = CASTS[cast]
    bound = 1e-4 if cast == "double" else 0.3  # what was before the cast is of float32
    model = build("bert")
    adapters = loralab.attach(model, method, name="a", **given)
    adapters.add("dense", "oft")
    adapters.add("low", "lora", rank=2)
    for name in adapters.names:
        shake(adapters, name)
    names = {"a": None, "dense": None, "low": None}
    for name in names:
        with adapters.use(name):
            names[name] = logits(model)
    change(model)
    with adapters.use(["a", "dense", "low"], [0, 1, 2, 0, 1]):
        mixed = logits(model)
    for name, rows_of in {"a": [0, 3], "dense": [1, 4], "low": [2]}.items():
        size = max(1.0, names[name].abs().max().item())
        with adapters.use(name):
            torch.testing.assert_close(logits(model).float(), names[name].float(), rtol=0, atol=bound * size)
        expected = names[name][rows_of].float()
        torch.testing.assert_close(mixed[rows_of].float(), expected, rtol=0, atol=bound * size)
    assert mixed.dtype == dtype
    adapters.activate("a")
    optimizer = torch.optim.SGD(adapters.parameter_groups(lr=1e-6))
    model.train()(**rows(), labels=LABELS).loss.backward()
    optimizer.step()
    assert all(t.isfinite().all() for t in adapters.state("a").values())


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
