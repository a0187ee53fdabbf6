"""Targets of every architecture, and what users get wrong."""

import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import zoo
from archs import CONFIGS, build, check_mixed, rows, shake
from torch import nn
from transformers import DynamicCache, FSMTConfig, FSMTForConditionalGeneration

import loralab
from loralab import adapted
from loralab.errors import UserError
from loralab.options import options
from loralab.presets import PRESETS
from loralab.recipe import NAMED, name_of, recipe
from loralab.targets import ReachNote, cover

PER_LAYER = {  # layers a preset means in one block: q, k, v and o are four, GPT-2 keeps q, k and v in one
    "attention-qv": dict.fromkeys(CONFIGS, 2) | {"gpt2": 1},
    "attention": dict.fromkeys(CONFIGS, 4) | {"gpt2": 2},
    "mlp": dict.fromkeys(CONFIGS, 2) | {"llama": 3},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("targets", PER_LAYER)
def test_presets_know_every_architecture(kind, targets):
    coverage = cover(build(kind), targets)
    assert len(coverage.paths) == 2 * PER_LAYER[targets][kind]
    assert all("classifier" not in path and "score" not in path for path in coverage.paths)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_architecture_trains_merges_and_detaches(kind):
    model, batch = build(kind), rows()
    before = model(**batch).logits.detach()
    adapters = loralab.attach(model, "lora", rank=3, alpha=5, head=True)
    linear = [m for path, m in build(kind).named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    outside = sum(isinstance(m, nn.Linear) for head in adapters.heads.values() for m in head.base.modules())
    assert len(adapters.layers) == len(linear) - outside
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=0.02))
    losses = []
    for _ in range(20):
        loss = model(**batch, labels=torch.tensor([0, 1, 2, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(adapters.merge()(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
    adapters.detach()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"deberta-v2"}))
def test_mixed_rows_on_every_architecture(kind):
    model = build(kind)
    adapters = loralab.attach(model, "lora", name="a", rank=3, head=True)
    adapters.add("b", "lora", rank=2, targets="attention-qv", head=True, labels=["x", "y"])
    shake(adapters, "a"), shake(adapters, "b", seed=5)
    check_mixed(model, adapters, "ab", torch.tensor([1, 0, 1, 1, 0]))  # b has two labels, a has three


def square(model, names, rows_and_tokens=4, **given):
    """The outputs of a batch of as many rows as tokens, of adapters in turn."""
    ids = torch.randint(3, 90, (rows_and_tokens,) * 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), loralab.adapters.of(model).use(names, [i % len(names) for i in range(len(ids))]):
        return model(input_ids=ids, **given).logits


def fsmt():
    sizes = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 64}
    vocabularies = {"langs": ["a", "b"], "src_vocab_size": 101, "tgt_vocab_size": 101}
    return FSMTForConditionalGeneration(FSMTConfig(**sizes, **heads, **vocabularies)).eval()


@pytest.mark.parametrize("make", [partial(zoo.build, "xlnet"), fsmt])
def test_rows_of_several_adapters_are_refused_where_tokens_come_first(make):
    """Layers of (t, rows, in) took the adapters of rows for those of tokens where both sizes are one."""
    model = make()
    adapters = loralab.attach(model, "lora", name="a", rank=2)
    adapters.add("b", rank=2)
    with pytest.raises(loralab.UserError, match="puts tokens before rows: .* call it once for each adapter"):
        square(model, ["a", "b"])
    refused = pytest.raises(loralab.UserError, match="input of 7 rows, .* call it once for each adapter")
    with refused, adapters.use(["a", "b"], [0, 1, 0]):
        model(input_ids=torch.full((3, 7), 5))


def test_the_order_of_rows_and_tokens_is_asked_once_and_leaves_no_trace():
    model = build("gpt2").train()
    adapters = loralab.attach(model, "lora", name="a", rank=2)
    adapters.add("b", rank=2)
    shake(adapters, "a"), shake(adapters, "b")
    calls, state = [], torch.get_rng_state()
    forward = model.forward
    model.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    cache = DynamicCache()
    first = square(model, ["a", "b"], past_key_values=cache)
    assert cache.get_seq_length() == 4  # of the batch, and no row more
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(square(model, ["a", "b"]), first)
    assert len(calls) == 3  # once more, in the first
    assert model.training


def test_coverage_tells_what_matched_and_what_was_left():
    coverage = loralab.attach(build("bert"), "lora", targets=["query", "1.output.dense"]).spec(None).coverage
    assert {pattern: len(paths) for pattern, paths in coverage.matched.items()} == {"query": 2, "1.output.dense": 1}
    assert len(coverage.left) == 2 * 6 + 1 - 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 25}, "rank 25: a 24 x 24 weight allows 1 to 24"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"store": "int3"}, "store='int3'"),
        ({"rnak": 3}, "no setting 'rnak'"),
        ({"targets": "atention-qv"}, "did you mean 'attention-qv'"),
        ({"targets": ["query", "quarry"]}, "'quarry'"),
        ({"targets": "(unclosed"}, "no regular expression"),
        ({"targets": []}, "empty"),
        ({"train": ("A", "m")}, "not m"),
        ({"name": "a.b"}, "adapter name 'a.b'"),
        ({"method": "head"}, "pass head=True"),
        ({"method": "full", "store": "bfloat16"}, "a stored weight is frozen"),
    ],
)
def test_mistakes_are_named_and_change_nothing(arguments, told):
    model = build("bert")
    with pytest.raises(loralab.UserError) as caught:
        loralab.attach(model, **arguments)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())
    assert {type(m).__name__ for m in model.modules()}.isdisjoint({"Adapted", "AdaptedHead"})
    loralab.attach(model, "lora")


def test_layers_read_past_the_module_are_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(24, 3, 37), nn.Linear(24, 5))
    for targets in (["linear1"], ["out_proj"], r"0\..*"):
        with pytest.raises(loralab.UserError, match="past the module"):
            loralab.attach(model, "lora", targets=targets)
    with pytest.warns(ReachNote, match="past"):
        adapters = loralab.attach(model, "lora", rank=2)
    assert list(adapters.layers) == ["1"]


def test_names_and_what_is_active():
    model, batch = build("bert"), rows()
    base = model(**batch).logits
    adapters = loralab.attach(model, "lora", name="a", rank=2)
    shake(adapters, "a")
    assert not torch.equal(model(**batch).logits, base)
    with adapters.use(None):
        assert torch.equal(model(**batch).logits, base)
    with pytest.raises(loralab.UserError, match="has adapters already"):
        loralab.attach(model, "lora")
    with pytest.raises(loralab.UserError, match="there already"):
        adapters.add("a")
    with pytest.raises(loralab.UserError, match="no adapter 'b'"), adapters.use("b"):
        pass
    with pytest.raises(loralab.UserError, match="is active"):
        adapters.remove("a")
    with pytest.raises(loralab.UserError, match="from 0 to 0"), adapters.use(["a"], ids=[0, 1]):
        pass
    with pytest.raises(loralab.UserError, match="input of 5 rows"), adapters.use(["a"], ids=[0, 0]):
        model(**batch)
    with adapters.use(None):
        adapters.remove("a")
        assert torch.equal(model(**batch).logits, base)
    assert adapters.names == []
    with pytest.raises(loralab.UserError, match="was active and is removed"):
        model(**batch)
    adapters.activate(None)
    assert torch.equal(model(**batch).logits, base)


def test_full_fine_tuning_has_no_base_to_go_back_to():
    adapters = loralab.attach(build("bert"), "full", head=True)
    with pytest.raises(loralab.UserError, match="no base beneath"), adapters.use(None):
        pass
    with pytest.raises(loralab.UserError, match="trains the base itself"):
        adapters.add("b")
    with pytest.raises(loralab.UserError, match="load the model anew"):
        adapters.detach()


def test_a_layer_that_a_method_without_rank_cannot_take_is_left_alone():
    """OFT turns the inputs of a layer, and one number cannot be turned."""
    model = nn.ModuleDict({"one": nn.Linear(1, 5), "more": nn.Linear(6, 5)})
    adapters = loralab.attach(model, "oft", block=3)
    assert adapters.spec().paths == ["more"]
    assert "an input of 1 value cannot be rotated" in str(adapters.coverage().why)
    with pytest.raises(loralab.UserError, match="an input of 1 value cannot be rotated .one; 1 of 1 layers"):
        loralab.attach(nn.ModuleDict({"one": nn.Linear(1, 5)}), "oft")


def test_ia3_names_layers_that_are_there():
    model = build("bert")
    with pytest.raises(loralab.UserError, match="inputs='output.dens' is the end of no path that is adapted"):
        loralab.attach(model, "ia3", inputs=["output.dens", "key"])
    adapters = loralab.attach(model, "ia3", targets=["key", "output.dense"], inputs="output.dense")
    sizes = {path.rpartition("layer.")[2]: len(t) for path, (_, t) in adapters.tensors().items() if "layer.0" in path}
    assert sizes == {"0.attention.self.key.l": 24, "0.attention.output.dense.l": 24, "0.output.dense.l": 37}


def test_presets_need_an_attention():
    with pytest.raises(loralab.UserError, match="the structure of Sequential does not tell which layers are q"):
        cover(nn.Sequential(nn.Linear(3, 5)), next(iter(PRESETS)))


def test_a_newer_transformers_than_the_tested_one_is_told_once(monkeypatch):
    monkeypatch.setattr(adapted.transformers, "__version__", "99.1.0")
    adapted._check_transformers.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 99.1.0 is newer than"):
        loralab.attach(build("bert"), rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loralab.attach(build("bert"), rank=2)
    adapted._check_transformers.cache_clear()


# ---- the table of adapters -------------------------------------------------------------------------------------------


def test_the_handle_prints_a_table_of_its_adapters():
    model = build("bert")
    adapters = loralab.attach(model, "dora", name="one", rank=3, targets=["query", "value"], head=True)
    adapters.add("another", "vera", rank=5)
    adapters.add("still", "lora-fa", rank=2)
    for tensor in adapters.state("another").values():
        tensor.requires_grad_(False)
    head, *lines = str(adapters).splitlines()
    assert head.split() == ["adapter", "method", "rank", "targets", "values", "learns", "in", "use"]
    assert [row.split()[0] for row in lines] == ["one", "another", "still"]
    assert all(word in lines[0] for word in ("dora", " 3 ", "query, value, + head", "yes"))
    assert f"{adapters.counts('one')['trainable']:,}" in lines[0]
    assert "vera" in lines[1]
    assert lines[1].split()[-2:] == ["no", "no"]
    assert f"{adapters.counts('still')['trainable']:,} of them" in lines[2]
    adapters.detach()
    assert "detached" in repr(adapters)


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_knows_its_name_at_any_rank_and_rate(name):
    free = {"lr": 0.5, **({"rank": 3} if hasattr(NAMED[name][0].factors, "rank") else {})}
    assert name_of(recipe(name, **free)) == name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"targets": 3}, r"targets=3: expected a list of names"), ({"targets": [3]}, r"targets=\[3\]"),
        ({"exclude": 3}, "exclude=3"), ({"exclude": ["key", 3]}, "exclude"), ({"head": 3}, "head=3"),
        ({"head": [3]}, r"head=\[3\]"), ({"head": "clasifier"}, "head=clasifier: the model has no such"),
        ({"head": True, "labels": "abc"}, "labels='abc': expected a list"), ({"tokens": 5}, "tokens=5: expected"),
        ({"head": True, "labels": [1, 2, 3]}, r"labels=\[1, 2, 3\]"), ({"r": 8}, r"'r' \('rank' here\)"),
        ({"target_modules": ["query"]}, r"\('targets' here\)"), ({"method": {}}, "method {} is unknown"),
    ],
)  # fmt: skip
def test_an_argument_of_another_kind_is_told_by_its_name(given, told):
    model = build("bert")
    with pytest.raises(loralab.UserError, match=told):
        loralab.attach(model, **{"method": "lora", "targets": ["query"], **given})
    assert not hasattr(model, "_loralab")
    adapters = loralab.attach(model, "lora", targets=["query"], head="classifier", labels=("x", "y"))
    assert list(adapters.heads) == ["classifier"]


@pytest.mark.parametrize("method", NAMED)
def test_a_setting_of_another_type_is_told_by_its_name(method):
    for name, option in options(method).items():
        other = [object(), b"7", {}] + ([True, "7", [3]] if "number" in option.expects else [])
        other += [2.5] if option.expects.startswith("a whole number") else []
        for value in other:
            with pytest.raises(loralab.UserError, match=rf"{name}="):
                recipe(method, **{name: value})


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path):
    settings = {"rank": np.int64(3), "alpha": torch.tensor(7.0), "lr": np.float32(0.125), "dropout": np.float64(0.25)}
    adapters = loralab.attach(build("bert"), "lora", seed=np.int64(5), **settings)
    r = loralab.load(build("bert"), adapters.save(tmp_path)).spec().recipe
    assert r == recipe("lora", rank=3, alpha=7.0, lr=0.125, dropout=0.25)
    assert [type(x) for x in (r.factors.rank, r.factors.alpha, r.lr)] == [int, float, float]
    assert recipe("lora", train="B") == recipe("lora", train=("B",))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda a: a.add("b", "lora", seed="x"), "seed='x': expected a whole number"),
        (lambda a: a.add(None, "lora"), "adapter name None"), (lambda a: a.add("b", "lora", seed=2**70), "seed="),
        (lambda a: a.fast(dtype=torch.int8, quiet=True), "dtype=torch.int8: expected one of"),
        (lambda a: a.fast(dtype=3, quiet=True), "dtype=3"), (lambda a: a.use(3).__enter__(), "no adapter 3 here"),
        (lambda a: a.remove(None), "is active"), (lambda a: a.save("x", ["default"]), r"no adapter \['default'\]"),
        (lambda a: a.parameter_groups(lr="x"), "lr='x'"), (lambda a: a.parameter_groups(lr=-1.0), "lr=-1.0: expected"),
        (lambda a: a.parameter_groups(weight_decay=-1), "weight_decay=-1: expected 0 or more"),
    ],
)  # fmt: skip
def test_an_argument_of_the_handle_of_another_kind_is_told(call, told):
    adapters = loralab.attach(build("bert"), "lora", targets=["query"])
    with pytest.raises(loralab.UserError, match=told):
        call(adapters)
    assert adapters.names == ["default"]


@pytest.mark.parametrize("model", ["bert-base-uncased", None, torch.nn.Linear, {}])
def test_what_is_no_model_is_told(model, tmp_path):
    with pytest.raises(loralab.UserError, match=r"is no model: expected a torch\.nn\.Module"):
        loralab.attach(model, "lora")


@pytest.mark.parametrize("how", ["wrapped", "inside", "added", "vera"])
def test_a_model_with_adapters_of_peft_is_refused(how, tmp_path):
    """The layers within PEFT's layers were taken for the model's: A and B got adapters of their own, frozen."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model, config = build("bert"), peft.LoraConfig(r=2, target_modules=["query"])
    if how == "added":
        model.add_adapter(config)
    else:
        theirs = peft.get_peft_model(model, peft.VeraConfig(r=2, target_modules=["key"]) if how == "vera" else config)
        model = theirs.base_model.model if how == "inside" else theirs
    loralab.attach(build("bert"), "lora", targets=["query"]).save(tmp_path)
    for put in (lambda: loralab.attach(model, "lora"), lambda: loralab.load(model, tmp_path)):
        with pytest.raises(loralab.UserError, match=r"of PEFT: take its adapter off with unload\(\)"):
            put()
    if how in ("wrapped", "vera"):
        loralab.attach(model.unload(), "lora")


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("where", ["add_layers", "add_heads"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(where, second, monkeypatch):
    """Whatever raises there: a decomposition of a weight that is not finite, Ctrl-C, no memory."""
    model = build("bert")
    handle = loralab.attach(model, "dora", name="first", head=True) if second else None
    tree, before = [(path, type(m)) for path, m in model.named_modules()], dict(model.named_parameters())
    learns, out = {key: p.requires_grad for key, p in before.items()}, model(**rows()).logits
    count, target = 0, "_started" if where == "add_layers" else "own_copy"
    own = getattr(loralab.install, target)

    def fails(*args, **more):
        nonlocal count
        count += 1
        if count == (4 if where == "add_layers" else 1):
            raise KeyboardInterrupt
        return own(*args, **more)

    monkeypatch.setattr(loralab.install, target, fails)
    put = (lambda *how, **more: handle.add("second", *how, **more)) if second else partial(loralab.attach, model)
    with pytest.raises(KeyboardInterrupt):
        put("lora", rank=2, head=True)
    monkeypatch.undo()
    assert [(path, type(m)) for path, m in model.named_modules()] == tree
    after = dict(model.named_parameters())
    assert all(after[key] is p for key, p in before.items())
    assert after.keys() == before.keys()
    assert {key: p.requires_grad for key, p in after.items()} == learns
    torch.testing.assert_close(model(**rows()).logits, out, rtol=0, atol=0)
    added = handle or loralab.attach(model, "lora", name="first", rank=2, head=True)
    added.add("second", "lora", rank=2, head=True)
    assert added.names == ["first", "second"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_added_and_loaded_as_fast_beside_many(method, tmp_path):
    """Calls of Python are the same each time. Each adapter walked through all before it: a thousand took 9 minutes."""

    def calls(act):
        count = 0

        def called(frame, event, arg):
            nonlocal count
            count += event == "call"

        sys.setprofile(called)
        try:
            act()
        finally:
            sys.setprofile(None)
        return count

    model = build("bert")
    given = {"targets": "attention-qv", "head": True, "rank": 3, "alpha": 7}
    adapters = loralab.attach(model, method, name="a0", **given)
    folder = adapters.save(tmp_path / "a0", "a0")
    loaded = [calls(lambda i=i: loralab.load(model, folder, name=f"l{i}")) for i in range(6)]
    added = [calls(lambda i=i: adapters.add(f"a{i}", method, seed=i, **given)) for i in range(1, 62)]
    assert added[60] < 1.2 * added[5]
    assert calls(lambda: loralab.load(model, folder, name="last")) < 1.2 * loaded[5]
    adapters.activate("a0")
    for name in [name for name in adapters.names if name.startswith("l")]:
        adapters.remove(name)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert sorted(ignored) == sorted(key for i in range(1, 62) for key in adapters.parameter_names(f"a{i}"))
    adapters.remove("a7")
    assert not [key for key in model._ddp_params_and_buffers_to_ignore if ".a7." in key]


def test_a_part_of_a_head_that_others_have_copies_of_is_refused_by_name():
    model = build("roberta")
    adapters = loralab.attach(model, "lora", head=True)
    with pytest.raises(UserError, match="inside classifier, of which other adapters have copies"):
        adapters.add("b", "lora", head=["classifier.dense"])
    with pytest.raises(UserError, match=r"classifier.dense is in the head"):
        adapters.add("b", "lora", targets=["classifier.dense"])
    adapters.add("b", "lora", head=["classifier"])
    assert adapters.names == ["default", "b"]
