"""PEFT as a second oracle: same parameters and data in, same losses out."""

import pytest
import torch
from archs import build, rows

import loralab

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["bert", "mpnet", "gpt2"])
@pytest.mark.parametrize(
    ("method", "option"), [("lora", {}), ("rslora", {"use_rslora": True}), ("dora", {"use_dora": True})]
)
def test_fifty_steps_give_the_losses_of_peft(kind, method, option):
    targets = {"bert": ["query", "value"], "mpnet": ["q", "v"], "gpt2": ["c_attn"]}[kind]
    ours, plain = build(kind), build(kind)
    adapters = loralab.attach(ours, method, rank=3, alpha=5, targets="attention-qv", head=True)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=list(adapters.heads), **option)
    theirs = peft.get_peft_model(plain, config)
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, layer in adapters.layers.items():
            modules[path].lora_A["default"].weight.copy_(layer.roles("default")["A"])
            modules[path].lora_B["default"].weight.copy_(layer.roles("default")["B"])
    losses = [[], []]
    for model, seen in zip((ours, theirs), losses, strict=True):
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=5e-3)
        for step in range(50):
            labels = torch.randint(0, 3, (5,), generator=torch.Generator().manual_seed(step))
            loss = model(**rows(seed=step), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(set(losses[0])) == 50
    total = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert adapters.counts()["trainable"] == total


CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "dense"]),
    "rslora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query"], use_rslora=True),
    "dora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "dense"], use_dora=True),
    "vera": peft.VeraConfig(r=7, target_modules=["query", "dense"], projection_prng_key=3),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_peft_folders_load_as_the_same_function_with_the_same_gradients_and_merge(method, tmp_path):
    config = CONFIGS[method]
    config.modules_to_save = ["classifier"]
    theirs = peft.get_peft_model(build("bert"), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad and "classifier" not in name:
                p.add_(torch.empty(p.shape).normal_(0, 0.3, generator=generator))
    theirs.save_pretrained(tmp_path / "peft")
    ours, batch, labels = build("bert"), rows(), torch.tensor([0, 1, 2, 1, 0])
    adapters = loralab.load(ours, tmp_path / "peft")
    outputs = [model(**batch, labels=labels) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    mine = sorted(float(t.grad.norm()) for t in adapters.state().values() if t.requires_grad)
    slow = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.requires_grad)
    assert mine == pytest.approx(slow, abs=1e-5)
    merged = adapters.merge()(**batch).logits
    torch.testing.assert_close(merged, theirs.merge_and_unload()(**batch).logits, rtol=0, atol=2e-5)


def test_a_projection_that_its_seed_does_not_draw_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    peft.get_peft_model(build("bert"), CONFIGS["vera"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.vera_A"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(loralab.UserError, match="projection"):
        loralab.load(build("bert"), tmp_path)
