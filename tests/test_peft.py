"""PEFT as a second oracle: same parameters and data in, same outputs, gradients, losses and merged weights out."""

import json

import pytest
import torch
from archs import build, rows
from torch.nn import functional as F

import loralab

peft = pytest.importorskip("peft")
from deviations import DEVIATIONS  # noqa: E402
from measure import largest  # noqa: E402
from peft_oracle import CONFIGS, LABELS, PEFT, RANK, lively, quiet  # noqa: E402


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


@pytest.mark.parametrize("method", PEFT)
def test_the_same_parameters_give_the_same_outputs_gradients_and_merged_weights(method):
    assert PEFT[method]() < 1e-5


@pytest.mark.parametrize("what", DEVIATIONS)
def test_where_peft_and_a_paper_differ_both_are_as_said(what):
    DEVIATIONS[what].show()


# ---- PEFT's folders --------------------------------------------------------------------------------------------------

PATTERNS = {  # a pattern is for whole names at the end of a path, so "uery" and "attention" say nothing
    "rank_pattern": {"uery": 5, "attention": 6, "query": 2, r"layer\.1\.attention\.self\.value": 4},
    "alpha_pattern": {"self": 9, "value": 7},
}
FOLDERS = {  # name -> a method, and settings of PEFT beside
    **{name: (name, {}) for name in CONFIGS if name != "adalora"},
    "rank pattern": ("lora", {"rank_pattern": PATTERNS["rank_pattern"]}),
    "both patterns": ("rslora", PATTERNS),
    "patterns and gain": ("dora", PATTERNS),
    "patterns and pissa": ("pissa", PATTERNS),
    "gaussian": ("lora", {"init_lora_weights": "gaussian"}),
    "olora with gain": ("olora", {"use_dora": True}),
}


def saved(folder, method, kind="bert", **given):
    """PEFT's model, its learned tensors off their start, saved."""
    theirs = quiet(peft.get_peft_model, lively(kind), CONFIGS[method](**given)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.empty(p.shape).normal_(0, 0.3, generator=generator))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", FOLDERS)
def test_peft_folders_load_as_the_same_function_with_the_same_gradients_and_merge(name, tmp_path):
    method, given = FOLDERS[name]
    theirs = saved(tmp_path / "peft", method, **given)
    ours = lively("bert")
    adapters = loralab.load(ours, tmp_path / "peft")
    outputs = [model(**rows()).logits for model in (ours, theirs)]
    for logits in outputs:
        F.cross_entropy(logits, LABELS).backward()
    mine = sorted(float(t.grad.norm()) for t in adapters.state().values() if t.requires_grad)
    slow = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.requires_grad)
    assert mine == pytest.approx(slow, abs=1e-5)
    merged = adapters.merge()(**rows()).logits, theirs.merge_and_unload()(**rows()).logits
    assert largest([tuple(outputs), merged]) < 2e-5
    adapters.save(tmp_path / "own")  # and in the own layout, which needs no start made again
    again = lively("bert")
    loralab.load(again, tmp_path / "own")
    assert torch.equal(again(**rows()).logits, outputs[0])


def test_a_pattern_is_a_rank_map_with_the_layers_alpha(tmp_path):
    saved(tmp_path, "rslora", **PATTERNS)
    r = loralab.load(lively("bert"), tmp_path).spec(None).recipe
    found = {path.rpartition("layer.")[2]: (part.rank, part.alpha) for path, part in r.ranks.layers.items()}
    assert found == {
        **{f"{i}.attention.self.query": (2, None) for i in (0, 1)},
        **{f"{i}.attention.self.value": (4 if i else RANK, 7.0) for i in (0, 1)},
        **{f"{i}.intermediate.dense": (RANK, None) for i in (0, 1)},
    }


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lora_bias": True}, "lora_bias=True is not read here; merge the adapter with PEFT"),
        ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow=3"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not read here, only LORA, VERA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' changes the base"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "init_lora_weights='olora' changes the base"),
        ({"rank_pattern": {"query": 2}}, "expected (2, 24)"),
        ({"rank_pattern": {"(query": 2}}, "not a config of PEFT"),
        ({"rank_pattern": [2]}, "not a config of PEFT"),
        ({"r": "eight"}, "rank='eight': expected a whole number"),
        ({"r": None}, "rank=None"),
        ({"lora_alpha": None}, "not a config of PEFT"),
    ],
)
def test_a_folder_that_would_be_another_function_is_refused(changed, told, tmp_path):
    saved(tmp_path, "lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(loralab.UserError) as caught:
        loralab.load(lively("bert"), tmp_path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_projection_that_its_seed_does_not_draw_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    peft.get_peft_model(build("bert"), CONFIGS["vera"]()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.vera_A"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(loralab.UserError, match="projection"):
        loralab.load(build("bert"), tmp_path)
