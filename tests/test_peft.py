"""PEFT as a second oracle: same parameters and data in, same losses out."""

import pytest
import torch
from archs import build, rows

import loralab

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["bert", "mpnet", "gpt2"])
@pytest.mark.parametrize(("method", "option"), [("lora", {}), ("rslora", {"use_rslora": True})])
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
