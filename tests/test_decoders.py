"""Methods on causal language models: they learn, and PEFT reads what they export with the same logits and text."""

import copy
import json

import pytest
import torch
from test_objectives import adapter, bases, files, history, rows_of, settings  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab
from loralab import model_names, models
from loralab.run import Settings, train
from loralab.run.setup import prepare

METHODS = {  # method -> what a short run needs
    "lora": {}, "dora": {}, "rslora": {}, "vera": {"rank": 16, "lr": 0.05}, "lora+": {"lr": 0.002}, "dylora": {},
    "delta-lora": {"set": ("wait=3",)}, "adalora": {"rank": 4, "lr": 0.03}, "pissa": {"lr": 0.002},
    "qlora": {}, "full": {"rank": None, "lr": 0.003},
}  # fmt: skip


def check_that_peft_reads(folder, model, prompts, tokenizer, tmp_path) -> None:
    """PEFT over the weights that the adapter was trained over, in as many bits, has the same logits and greedy text."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = model.double()  # in float32 the roundings of 30 layers with a gain add up to 4e-4
    plain = copy.deepcopy(model)
    handle = loralab.load(model, folder)
    for path, layer in handle.layers.items():
        plain.get_submodule(path).weight.data.copy_(layer.weight)
    handle.export(tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "peft")).eval().double()
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to("cpu")
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        ours = handle.model(**batch).logits
        with handle.use(None):
            assert (handle.model(**batch).logits - ours).abs().max() > 0.01  # the adapter says something
        torch.testing.assert_close(theirs(**batch).logits, ours, rtol=0, atol=1e-4)  # what is exported is float32
        assert torch.equal(theirs.generate(**batch, **more), handle.model.generate(**batch, **more))


@pytest.mark.few(4)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_a_causal_model_and_peft_reads_it(method, bases, files, tmp_path):  # noqa: F811
    given = {"rank": 3, "lr": 0.01, "epochs": 8} | METHODS[method]
    s = settings("completion", bases, files, tmp_path / "run", method=method, **given)
    train(s)
    losses = [row["train_loss"] for row in history(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.05
    if method != "full":  # it has no adapter
        prompts = [row["prompt"] for row in rows_of("completion", 5, 9)]
        model = AutoModelForCausalLM.from_pretrained(s.model).eval()
        check_that_peft_reads(
            tmp_path / "run/adapter", model, prompts, AutoTokenizer.from_pretrained(s.model), tmp_path
        )


def test_rows_of_a_batch_have_their_own_adapters_in_float64(bases, files):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(bases["llama"]).double().eval()
    handle = loralab.attach(model, "lora", name="a", rank=3, alpha=5)
    handle.add("b", "dora", rank=2, alpha=3)
    handle.add("c", "vera", rank=7)
    for i, name in enumerate(handle.names):
        for key, t in handle.state(name).items():
            with torch.no_grad():
                t.add_(torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=t.dtype) * 0.1)
            assert key
    ids = torch.randint(4, 31, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, :4] = 0
    owners = [2, 0, 1, 0, 2]
    with torch.no_grad(), handle.use(["a", "b", "c"], owners):
        mixed = model(input_ids=ids, attention_mask=mask).logits
    for row, owner in enumerate(owners):
        with torch.no_grad(), handle.use("abc"[owner]):
            alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row][mask[row] == 1], alone[mask[row] == 1], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_smollm2(method, tmp_path):
    if model_names.find("smollm2") is None:
        pytest.skip("the model smollm2 is not on this machine: make models")
    rows = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}, I say"} for a in range(6) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = METHODS[method] | {"lr": None, "rank": None}
    s = Settings(
        task=str(tmp_path / "sums.jsonl"), model="smollm2", method=method, out=tmp_path / "run", epochs=3, batch_size=6,
        max_length=24, **given,
    )  # fmt: skip
    run = prepare(s)
    adapted = set(run.adapters.layers)
    train(s)
    losses = [row["train_loss"] for row in history(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    if method == "full":
        return
    assert len(adapted) == 7 * run.model.config.num_hidden_layers
    model, tokenizer, _ = models.pretrained("smollm2", "CAUSAL_LM")
    check_that_peft_reads(tmp_path / "run/adapter", model, ["3 plus 4 is", "2 plus"], tokenizer, tmp_path)
