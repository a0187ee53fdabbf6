"""A copy of an adapted model, by deepcopy or by torch.save and torch.load, is that model in everything.

The pickle is the user's own choice, of a file of their own: loralab itself writes and reads none.
"""

import copy
import io
import subprocess
import sys

import pytest
import torch
from archs import build, labelled, rows, shake
from transformers import Qwen2Config, Qwen2ForCausalLM

import loralab
from loralab.adapters import of
from loralab.recipe import NAMED

LABELS = torch.tensor([0, 1, 2, 1, 0])
MORE = {
    "adalora": {"total_steps": 9, "dropout": 0.2},
    "delta-lora": {},
}  # settings of a method; delta-lora has no dropout
METHODS = [name for name, (row, _) in NAMED.items() if not row.policy]


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "torch.save": pickled}


def adapted(method, kind="bert", **more):
    model, more = build(kind), MORE.get(method, {}) | more
    factors = NAMED[method][0].factors
    sizes = {key: 3 for key in ("rank",) if factors is not None and hasattr(factors, key)}
    adapters = loralab.attach(model, method, name="a", head=True, batches=[labelled()], **sizes, **more)
    shake(adapters, "a")
    return model


def logits(model):
    with torch.no_grad():
        return model(**rows()).logits


def trained(model, steps=3):
    """All that an adapter holds after some steps, with dropout and the draws of its method."""
    torch.manual_seed(5)
    adapters = of(model.train())
    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=0.05, weight_decay=0.01))
    for _ in range(steps):
        model(**rows(), labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {key: t.detach().clone() for key, t in adapters.state().items()}


def same(one, other):
    assert one.keys() == other.keys()
    assert [key for key, t in one.items() if not torch.equal(t, other[key])] == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_answers_and_trains_as_the_model_does_and_shares_nothing_with_it(method, way):
    """Two steps before the copy, so that memory, counters and generators of the method are on their way."""
    model = adapted(method, **({} if method in MORE or NAMED[method][0].factors is None else {"dropout": 0.2}))
    trained(model, 2)
    twin = WAYS[way](model)
    assert of(twin) is not of(model)
    assert of(twin).model is twin
    torch.testing.assert_close(logits(twin), logits(model), rtol=0, atol=0)
    own = {t.data_ptr() for t in model.parameters()}
    assert not own & {t.data_ptr() for t in twin.parameters()}
    before = logits(model)
    after = trained(twin)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)  # the model did not feel it
    same(trained(model), after)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "vera"])
def test_a_copy_can_do_all_that_the_model_can(method, way, tmp_path):
    """More adapters, one per row, the fast path, saving, merging and taking all of it off again."""
    model = adapted(method)
    adapters = of(model)
    adapters.add("b", "lora", rank=2, head=True, store=adapters.spec("a").recipe.store)
    shake(adapters, "b")
    adapters.fast(dtype="float32", quiet=True)
    twin = WAYS[way](model)
    ids = [0, 1, 1, 0, 1]
    for use in (("a", None), ("b", None), (None, None), (["a", "b"], ids)):
        with adapters.use(*use), of(twin).use(*use):
            torch.testing.assert_close(logits(twin), logits(model), rtol=0, atol=0)
    of(twin).save(tmp_path / "twin")
    adapters.save(tmp_path / "model")
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("twin", "model")]
    assert files[0] == files[1]
    assert of(twin).base_sha256 == adapters.base_sha256
    torch.testing.assert_close(logits(of(twin).merge()), logits(adapters.merge()), rtol=0, atol=0)
    of(twin).detach()
    adapters.detach()
    same(dict(twin.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("store", [None, "float32", "nf4"])
def test_a_weight_that_is_tied_comes_back_tied_in_a_copy_too(store, way):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=32, tie_word_embeddings=True, **sizes))
    loralab.attach(model, rank=2, targets=["lm_head", "q_proj"], **({} if store is None else {"store": store}))
    twin = WAYS[way](model)
    of(twin).detach()
    of(model).detach()
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) is (
        model.lm_head.weight is model.model.embed_tokens.weight
    )
    same(dict(twin.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_watched_as_the_model_is(way):
    """An optimizer over frozen tensors only would move nothing, and is refused."""
    twin = WAYS[way](adapted("lora"))
    frozen = twin.bert.embeddings.word_embeddings.weight
    optimizer = torch.optim.SGD([frozen], lr=0.1)
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(loralab.UserError, match="would move nothing"):
        optimizer.step()


CHILD = """
import sys, torch
sys.path.insert(0, "tests")
from archs import rows
from test_copies import LABELS, checkpointed_gradients, logits, trained
for name in sys.argv[1:]:
    model = torch.load(name, weights_only=False)
    out = {"logits": logits(model), **checkpointed_gradients(model), **trained(model)}
    torch.save(out, name + ".out")
"""


def checkpointed_gradients(model):
    """Gradients with activation checkpointing, whose backward pass runs after the `use` block."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with of(model).use("a"):
        loss = model(**rows(), labels=LABELS).loss
    with of(model).use(None):
        loss.backward()
    model.gradient_checkpointing_disable()
    found = {f"gradient {key}": t.grad.clone() for key, t in model.named_parameters() if t.grad is not None}
    model.zero_grad()
    model.eval()
    return found


@pytest.mark.slow
def test_another_process_goes_on_with_what_torch_saved(tmp_path):
    wanted = {}
    for method in ("lora", "dylora", "adalora"):
        model = adapted(method)
        torch.save(model, tmp_path / method)
        wanted[method] = {"logits": logits(model), **checkpointed_gradients(model), **trained(model)}
        assert sum(key.startswith("gradient") for key in wanted[method]) > 20
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD, *(str(tmp_path / m) for m in wanted)], check=True)
    for method, values in wanted.items():
        same(torch.load(tmp_path / f"{method}.out"), values)
