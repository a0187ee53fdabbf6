"""Every fast piece is the plain path: outputs, gradients, what dropout draws, and what backward keeps."""

import math

import pytest
import torch
from archs import build, drop_as_blocks, labelled, rows, shake
from torch.nn import functional as F

import loralab
from loralab.active import Stream
from loralab.fast import encoder_parts, heap, masks, prepare, put_back
from loralab.fast.layers import layers_of
from loralab.recipe import NAMED
from loralab.update import each, merged, stack

ENCODERS = ["bert", "roberta", "electra", "mpnet", "distilbert"]
LOW_RANK = [name for name, (row, _) in NAMED.items() if row.factors is not None and row.low_rank and not row.policy]
SETTINGS = {"rank": 3, "alpha": 5.0}


def adapted(kind, method="lora", targets="all-linear", **more):
    allowed = vars(NAMED[method][0].factors)
    given = {key: value for key, value in SETTINGS.items() if key in allowed}
    model = build(kind)
    adapters = loralab.attach(model, method, targets=targets, head=True, batches=[labelled()], **given, **more)
    shake(adapters, "default")
    return model, adapters


def double(model, adapters):
    """In float64, constants too, so that a difference is a mistake and not rounding."""
    model.double()
    for layer in adapters.layers.values():
        for name, constants in layer.constants.items():
            layer.constants[name] = {k: t.double() if t.is_floating_point() else t for k, t in constants.items()}


def pass_through(model, adapters, batch, draws=None):
    """(logits, gradients by path.role) of one training pass."""
    if draws is not None:
        torch.manual_seed(draws)
    logits = model.train()(**batch).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (logits * weight).sum().backward()
    return logits, {key: t.grad for key, t in adapters.state().items() if t.requires_grad}


def same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for key, grad in theirs[1].items():
        assert (grad is None) == (ours[1][key] is None), key
        if grad is not None:
            assert grad.isfinite().all()
            torch.testing.assert_close(ours[1][key], grad, rtol=0, atol=tolerance * (1 + grad.abs().max().item()))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("targets", ["all-linear", "attention-qv", ".*layer.*[.]1[.].*"])
def test_a_block_is_the_layer_it_replaces(kind, targets):
    results = []
    for quick in (False, True):
        model, adapters = adapted(kind, targets=targets)
        double(model, adapters)
        if quick:
            used = {choice.piece: choice.used for choice in prepare(model)}
            assert used["block"]
            assert len(layers_of(model)) == 2
        results.append(pass_through(model, adapters, rows()))
    same(*results)


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_block_takes_every_low_rank_method(method):
    results = []
    for quick in (False, True):
        model, adapters = adapted("mpnet", method)
        double(model, adapters)
        if quick:
            prepare(model)
        adapters.steps.disconnect()  # a rank drawn anew for each model would compare two different functions
        results.append(pass_through(model, adapters, rows()))
    same(*results, 1e-5 if NAMED[method][0].store else 1e-9)  # what is stored in few bits is made anew in float32


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize("tokens", [7, encoder_parts.SHORT + 3])
def test_a_block_is_the_layer_with_the_same_dropout(kind, tokens, monkeypatch):
    drop_as_blocks(monkeypatch)
    results = []
    for quick in (False, True):
        model, adapters = adapted(kind)
        double(model, adapters)
        model.set_attn_implementation("eager")
        for module in model.modules():
            if type(module) is torch.nn.Dropout:
                module.p = 0.3
        if quick:
            prepare(model)
        results.append(pass_through(model, adapters, rows(tokens=tokens), draws=5))
    same(*results)
    model, adapters = adapted(kind)
    double(model, adapters)
    assert (pass_through(model, adapters, rows(tokens=tokens))[0] - results[0][0]).abs().max() > 0.01  # it did drop


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_rows_of_several_adapters_go_through_a_block(method):
    model, adapters = adapted("bert", method)
    adapters.add("b", "rslora", rank=5, head=True)
    shake(adapters, "b", seed=4)
    double(model, adapters)
    batch, ids = rows(), [1, 0, 0, 1, 0]
    names = ["default", "b"]

    def mixed():
        with adapters.use(names, ids=ids):
            logits = model(**batch).logits
        learned = [t for name in names for t in adapters.state(name).values()]
        return logits, dict(enumerate(torch.autograd.grad(logits.square().sum(), learned, allow_unused=True)))

    plain = mixed()
    prepare(model)
    same(mixed(), plain)
    with adapters.use(None):
        base = model(**batch).logits
    torch.testing.assert_close(base, build("bert").double()(**batch).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("method", "more"), [("superlora", {}), ("lora", {"dropout": 0.3})])
def test_what_a_block_cannot_do_takes_the_plain_path(method, more):
    results = []
    for quick in (False, True):
        model, adapters = adapted("bert", method, **more)
        double(model, adapters)
        if quick:
            prepare(model)
        torch.manual_seed(3)
        results.append(pass_through(model, adapters, rows(), draws=5))
    same(*results)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_drop_what_they_say_and_know_no_order(p, dtype):
    torch.manual_seed(0)
    like = torch.empty(61, 53, dtype=dtype)
    drawn = torch.stack([masks.mask(like, p) for _ in range(400)]).float()  # (masks, 61, 53)
    kept = (drawn != 0).float()
    n = kept.numel()
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n) + 3 / 256 / math.sqrt(400)
    assert abs(drawn.mean() - 1) < 5 * math.sqrt(p / (1 - p) / n) + (0.004 if dtype == torch.bfloat16 else 0)
    flat = kept.flatten(1) - (1 - p)  # high and low bytes of a word must know nothing of each other, nor neighbours
    half = -(-like.numel() // 8) * 4
    for shift in (1, 2, 4, half, 53):
        together = (flat[:, shift:] * flat[:, :-shift]).mean() / (p * (1 - p))
        assert abs(together) < 5 / math.sqrt(n) + 2e-4, shift
    assert abs((flat[1:] * flat[:-1]).mean()) / (p * (1 - p)) < 5 / math.sqrt(n) + 2e-4  # nor one mask of the next


@pytest.mark.parametrize("p", [0.05, 0.01, 1 / 256, 0.003, 0.001])
def test_masks_of_a_small_p_drop_as_little_as_they_say(p):
    """Below 1/256 a mask drops all that one byte says, or nothing."""
    torch.manual_seed(3)
    drawn = torch.stack([masks.mask(torch.empty(61, 53), p) for _ in range(400)])  # (masks, 61, 53)
    kept = (drawn != 0).float().mean((1, 2))  # (masks,)
    assert abs(kept.mean() - (1 - p)) < 5 * (math.sqrt(p / drawn.numel()) + 1 / 256 / math.sqrt(400))
    assert kept.min() > 1 - p - 1 / 256 - 5 * math.sqrt((p + 1 / 256) / drawn[0].numel())
    assert abs(drawn.mean((1, 2)) - 1).max() < 6 * math.sqrt((p + 1 / 256) / drawn[0].numel())


def test_masks_repeat_with_torchs_seed_and_pass_gradients():
    x = torch.randn(7, 11, requires_grad=True)
    torch.manual_seed(4)
    first = masks.dropout(x, 0.4)
    torch.manual_seed(4)
    again, other = masks.dropout(x, 0.4), masks.dropout(x, 0.4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first.sum().backward()
    torch.testing.assert_close(x.grad * x, first)
    assert masks.dropout(x, 0.4, training=False) is x


@pytest.mark.parametrize("p", [1.0, 0.999, 0.997])
def test_masks_that_keep_less_than_a_byte_can_say_have_the_mean_that_they_should(p):
    torch.manual_seed(2)
    drawn = masks.mask(torch.empty(1000, 1000), p)
    assert abs((drawn != 0).float().mean() - (1 - p)) <= 5 * math.sqrt(p * (1 - p)) / 1000
    kept = drawn[drawn != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / max(1 - p, 1e-9)))


def test_torchs_own_masks_come_from_one_generator_and_their_seeds_from_the_cpu(monkeypatch):
    made = []
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: made.append(device) or generator(device))
    masks._generator.cache_clear()
    like = torch.empty(40, 50, dtype=torch.bfloat16)
    drawn = [masks._drawn_by_torch(like, (400, 50), 0.3, seed) for seed in (1, 2, 1)]
    assert made == [like.device]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert abs((drawn[0] == 0).float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 20000)
    masks._generator.cache_clear()


def test_another_device_draws_dropout_by_itself(monkeypatch):
    drawn = []
    monkeypatch.setattr(F, "dropout", lambda x, p: drawn.append(p) or x)
    masks.dropout(torch.empty(2, 3, device="meta"), 0.3)
    masks.dropout(torch.empty(2, 3), 0.4)
    assert drawn == [0.3]


def gained(kind, gains, quick, dtype=torch.float64):
    """A model with DoRA whose first gains are given, ready to train."""
    model, adapters = adapted(kind, "dora")
    double(model, adapters)
    for layer in adapters.layers.values():
        u, m = layer.lower("default"), layer.roles("default")["m"]
        with torch.no_grad():
            m[: len(gains)] *= torch.tensor(gains, dtype=m.dtype) / u.gain[: len(gains)]
    model.to(dtype)
    if quick:
        prepare(model)
    return model, adapters


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_a_gain_of_zero_or_near_it_is_the_plain_path(kind):
    gains = [0.0, 1e-3, -1e-3, 1e-12, -1.0, 1.0]
    results = [pass_through(*gained(kind, gains, quick), rows()) for quick in (False, True)]
    same(*results)
    assert any(grad.abs().max() > 0 for key, grad in results[0][1].items() if key.endswith(".m"))
    model, _ = gained(kind, gains, True)
    with torch.no_grad():
        torch.testing.assert_close(model(**rows()).logits, results[0][0].detach(), rtol=0, atol=1e-9)


def test_gradients_of_small_gains_keep_their_digits_in_bfloat16():
    gains = [1e-3, -2e-3, 3e-3, 0.0]
    _, exact = pass_through(*gained("bert", gains, False), rows())
    found = {}
    for quick in (False, True):
        _, found[quick] = pass_through(*gained("bert", gains, quick, torch.bfloat16), rows())
    for key in [key for key in exact if key.endswith(".m")]:
        expected, plain, fast = (grads[key][: len(gains)].double() for grads in (exact, found[False], found[True]))
        assert (fast - expected).norm() < 2 * (plain - expected).norm() + 0.02 * expected.norm(), key


@pytest.mark.parametrize(
    ("methods", "used"), [(["lora"], False), (["vera"], False), (["dora"], True), (["lora", "lora"], True)]
)
def test_another_device_than_the_cpu_takes_the_block_where_it_pays(methods, used):
    model = build("bert")
    adapters = loralab.attach(model, methods[0], name="a0", rank=3)
    for i, method in enumerate(methods[1:], 1):
        adapters.add(f"a{i}", method, rank=3)
    model.to("meta").train()
    choices = {choice.piece: choice for choice in prepare(model)}
    assert choices["block"].used == used
    assert ("on meta" in choices["block"].reason) != used
    assert not choices["heap"].used
    x = torch.empty(5, 7, 24, device="meta")
    with adapters.use(adapters.names, ids=[0, 1, 0, 1, 0]) if len(methods) > 1 else adapters.use("a0"):
        out = layers_of(model)[1](x)
    assert out.shape == x.shape
    assert ("LayerFunction" in out.grad_fn.name()) == used


@pytest.mark.parametrize("name", [None, "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_environment_tells_malloc_wins(name, monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "keep", asked.append)
    for other in heap.SETTINGS:
        monkeypatch.delenv(other, raising=False)
    if (problem := heap.problem()) is not None:
        pytest.skip(problem)
    if name is not None:
        monkeypatch.setenv(name, "131072")
    choice = next(choice for choice in prepare(build("bert")) if choice.piece == "heap")
    assert choice.used == (name is None)
    assert asked == ([True] if name is None else [])
    assert name is None or f"{name} is set" in choice.reason


def own_streams(adapters, count=1):
    return adapters.active.changed(streams=tuple(Stream(torch.Generator(), 5, 7) for _ in range(count)))


def test_runs_that_share_a_pass_never_share_dropout_silently():
    model, adapters = adapted("bert")
    prepare(model.train())
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.p = 0.3
    with own_streams(adapters):
        model(**rows())
        layer = layers_of(model)[1]
        hook = layer.output.dense.register_forward_hook(lambda *_: None)
        with pytest.raises(loralab.UserError, match=r"cannot share a pass .* has a hook"):
            model(**rows())
        hook.remove()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with pytest.raises(loralab.UserError, match="draw their own dropout"):
            model(**rows())
    model(**rows())


def kept_shapes(model, batch):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model.train()(**batch).logits.sum()
    return out, [tuple(t.shape) for t in kept]


def test_nothing_is_kept_below_the_first_adapted_layer():
    shapes = {}
    for targets in ("all-linear", ".*layer[.]1[.].*"):
        model, adapters = adapted("bert", targets=targets)
        prepare(model)
        out, shapes[targets] = kept_shapes(model, rows())
        out.backward()
        assert all(
            p.grad is None for key, p in model.named_parameters() if id(p) not in map(id, adapters.state().values())
        )
    inner = (5 * 7, 37)  # (rows * tokens, inner): what GELU reads, once or twice a layer
    assert 0 < shapes[".*layer[.]1[.].*"].count(inner) < shapes["all-linear"].count(inner)


def test_lora_fa_keeps_no_input():
    model, _ = adapted("bert", "lora-fa")
    prepare(model)
    plain, _ = adapted("bert", "lora")
    prepare(plain)
    fewer, more = kept_shapes(model, rows())[1], kept_shapes(plain, rows())[1]
    assert fewer.count((35, 37)) == more.count((35, 37)) - 2  # of each layer's down-projection
    assert fewer.count((35, 24)) < more.count((35, 24))


def test_a_model_held_in_bfloat16_keeps_what_learns_in_float32_and_learns_the_same():
    losses = {}
    for store in (None, "bfloat16"):
        model, adapters = adapted("mpnet")
        prepare(model, store=store)
        for key, p in model.named_parameters():
            learns = any(p is t for t in adapters.state().values())
            assert p.dtype == (torch.float32 if learns or store is None else torch.bfloat16), key
        optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=3e-3))
        labels, losses[store] = torch.tensor([0, 2, 1, 1, 0]), []
        for _ in range(30):
            loss = F.cross_entropy(model(**rows()).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[store].append(loss.item())
    plain, held = (torch.tensor(losses[store]) for store in (None, "bfloat16"))
    assert plain[-1] < plain[0] / 2
    assert (plain - held).abs().max() < 0.1 * plain[0]


@pytest.mark.parametrize(
    ("kind", "why"), [("gpt2", "no layers of a known kind"), ("deberta-v2", "a DebertaV2Layer computes itself")]
)
def test_a_model_without_known_layers_trains_all_the_same_and_says_why(kind, why):
    model, adapters = adapted(kind)
    plain = pass_through(*adapted(kind), rows())
    choices = {choice.piece: choice for choice in prepare(model)}
    assert not choices["block"].used
    assert why in choices["block"].reason
    same(pass_through(model, adapters, rows()), plain, 1e-6)


def test_full_fine_tuning_keeps_the_layers_and_says_why():
    model = build("bert")
    loralab.attach(model, "full", head=True)
    choices = {choice.piece: choice for choice in prepare(model)}
    assert not choices["block"].used
    assert "learns" in choices["block"].reason


def test_off_is_off_and_undo_puts_the_plain_path_back():
    model, _ = adapted("bert")
    assert not any(choice.used for choice in prepare(model, speed="off"))
    assert not any("forward" in vars(module) for module in model.modules())
    prepare(model)
    assert any("forward" in vars(module) for module in model.modules())
    put_back(model)
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(loralab.UserError, match="expected one of auto, off, compile"):
        prepare(model, speed="on")
    with pytest.raises(loralab.UserError, match="expected bfloat16 or float32"):
        prepare(model, store="nf4")


def test_a_merged_copy_of_a_fast_model_is_plain():
    model, adapters = adapted("bert")
    expected = model(**rows()).logits
    prepare(model)
    merged = adapters.merge("default")
    torch.testing.assert_close(merged(**rows()).logits, expected, rtol=0, atol=1e-5)
    assert not any("forward" in vars(module) for module in merged.modules())


@pytest.mark.slow
def test_the_compiled_path_is_the_plain_one(monkeypatch):
    monkeypatch.setattr("loralab.fast.COMPILER", "aot_eager")  # no generated code, which takes a minute
    results = []
    for how in ("off", "compile"):
        model, adapters = adapted("bert", "dora")
        double(model, adapters)
        chosen = [choice.piece for choice in prepare(model, how) if choice.used]
        assert chosen == (["compile"] if how == "compile" else [])
        results.append(pass_through(model, adapters, rows()))
    assert model._compiled_call_impl is not None
    same(*results)


def test_a_block_leaves_attention_that_was_asked_for():
    model, _ = adapted("bert")
    model.set_attn_implementation("flex_attention")
    found = {choice.piece: choice for choice in prepare(model)}["block"]
    assert not found.used
    assert found.reason == "attention is flex_attention"


ALIKE = [
    name
    for name in LOW_RANK
    if NAMED[name][0].store is None and NAMED[name][0].start not in ("eva", "lora-ga", "loftq")
]


@pytest.mark.parametrize("method", ALIKE)
def test_adapters_of_one_recipe_are_lowered_in_one_go(method):
    """And beside others of other ranks and methods; the update of each is that of it alone."""
    model, adapters = adapted("bert", method)
    names = ["default", "other", "b", "third", "c"]
    given = {key: x for key, x in SETTINGS.items() if key in vars(NAMED[method][0].factors)}
    for name in ("b", "c"):
        adapters.add(name, method, head=True, targets=adapters.spec("default").paths, **given)
    adapters.add("other", "rslora", rank=4, head=True)
    adapters.add("third", "dora", rank=2, head=True)
    for i, name in enumerate(names):
        shake(adapters, name, seed=i)
    double(model, adapters)
    for layer in adapters.layers.values():
        together = layer.lower_together(names, {})
        own_constants = method == "miss"  # each adapter has tensors of its own
        assert len({layer._likeness(name, {}) for name in names}) == (5 if own_constants else 3)
        for i, name in enumerate(names):
            alone = stack([layer.lower(name)])
            W = merged(layer.weight.double(), each(lambda t, i=i: t[i], together))
            torch.testing.assert_close(
                W, merged(layer.weight.double(), each(lambda t: t[0], alone)), rtol=0, atol=1e-12
            )
