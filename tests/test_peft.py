"""PEFT as a second oracle: same parameters and data in, same outputs, gradients, losses and merged weights out."""

import contextlib
import dataclasses
import json
import shlex
import subprocess
import sys
import time

import pytest
import torch
from archs import build, rows, shake
from conftest import REPO
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import loralab
from loralab import peft_format, peft_write
from loralab.files import adapter_name

peft = pytest.importorskip("peft")
from deviations import DEVIATIONS  # noqa: E402
from measure import largest  # noqa: E402
from peft_oracle import CONFIGS, LABELS, PEFT, RANK, TARGETS, lively, quiet  # noqa: E402


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
    "ia3 of outputs": ("ia3", {"feedforward_modules": [], "target_modules": ["query"]}),
    "oft exact": ("oft", {"use_cayley_neumann": False}),
    "oft of three terms": ("oft", {"num_cayley_neumann_terms": 3}),
    "oft of six terms": ("oft", {"num_cayley_neumann_terms": 6}),
    "oft of one block": ("oft", {"block_share": True}),
    "oft of four blocks": ("oft", {"r": 4, "oft_block_size": 0}),
}


def move_and_save(theirs, folder):
    """Moves what PEFT's model learns off its start, and saves it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.empty(p.shape).normal_(0, 0.3, generator=generator))
    theirs.save_pretrained(folder)


def saved(folder, method, kind="bert", **given):
    """PEFT's model, its learned tensors off their start, saved."""
    torch.manual_seed(5)  # PEFT draws A
    theirs = quiet(peft.get_peft_model, lively(kind, method), CONFIGS[method](**given)).eval()
    move_and_save(theirs, folder)
    return theirs


@pytest.mark.parametrize("name", FOLDERS)
def test_peft_folders_load_as_the_same_function_with_the_same_gradients_and_merge(name, tmp_path):
    method, given = FOLDERS[name]
    theirs = saved(tmp_path / "peft", method, **given)
    ours = lively("bert", method)
    adapters = loralab.load(ours, tmp_path / "peft")
    outputs = [model(**rows()).logits for model in (ours, theirs)]
    for logits in outputs:
        F.cross_entropy(logits, LABELS).backward()
    mine = sorted(float(t.grad.norm()) for t in adapters.state().values() if t.requires_grad)
    slow = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.requires_grad)
    assert mine == pytest.approx(slow, rel=1e-5, abs=1e-5)  # norms of float32 gradients, up to 5
    merged = adapters.merge()(**rows()).logits, theirs.merge_and_unload()(**rows()).logits
    assert largest([tuple(outputs), merged]) < 2e-5
    adapters.save(tmp_path / "own")  # and in the own layout, which needs no start made again
    again = lively("bert", method)
    loralab.load(again, tmp_path / "own")
    assert torch.equal(again(**rows()).logits, outputs[0])


OWN = [  # method, settings: what PEFT has too, and what is no low-rank product
    ("ia3", {"inputs": TARGETS[1:]}),
    ("ia3", {"targets": ["query"]}),
    ("oft", {"block": 5}),
    ("oft", {"block": 6, "terms": 5}),
    ("oft", {"block": 4, "one_block": True}),
]


@pytest.mark.parametrize(("method", "given"), OWN)
def test_what_peft_has_too_is_written_as_its_own_and_comes_back(method, given, tmp_path):
    ours = lively("bert", method)
    adapters = loralab.attach(ours, method, **{"targets": TARGETS, "head": True} | given)
    shake(adapters, "default")
    expected = ours(**rows()).logits
    assert (expected - lively("bert", method)(**rows()).logits).abs().max() > 0.05
    adapters.export(tmp_path)
    theirs = quiet(peft.PeftModel.from_pretrained, lively("bert", method), tmp_path).eval()
    assert theirs.active_peft_config.peft_type == method.upper()
    torch.testing.assert_close(theirs(**rows()).logits, expected, rtol=0, atol=2e-5)
    again = lively("bert", method)
    loaded = loralab.load(again, tmp_path)
    assert torch.equal(again(**rows()).logits, expected)
    state = adapters.state()
    assert state.keys() == loaded.state().keys()
    assert all(torch.equal(t, state[key]) for key, t in loaded.state().items())
    assert peft_write.vllm_notes(tmp_path)[-1].startswith("vLLM reads LoRA only")


def test_a_bias_that_only_peft_scales_is_refused_both_ways(tmp_path):
    saved(tmp_path / "peft", "ia3")
    with pytest.raises(loralab.UserError, match=r"PEFT scales the bias of .*layer\.0.*query.* merge the adapter"):
        loralab.load(lively("bert"), tmp_path / "peft")
    adapters = loralab.attach(lively("bert"), "ia3", targets=TARGETS)
    with pytest.raises(loralab.UserError, match="does not scale the bias of .*query, and PEFT's would"):
        adapters.export(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("method", "given", "changed", "told"),
    [
        ("oft", {}, {"coft": True}, "coft=True is not read here"),
        ("oft", {}, {"module_dropout": 0.1}, "module_dropout=0.1 is not read here"),
        ("oft", {}, {"peft_version": "0.17.1"}, "its series was another one"),
        ("oft", {}, {"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms=2: expected 3 or more"),
        ("oft", {}, {"oft_block_size": 8}, "expected (3, 28)"),
        ("ia3", {}, {"ia3_x": 1}, "ia3_x=1 is not read here"),
    ],
)
def test_a_folder_of_another_rotation_is_refused(method, given, changed, told, tmp_path):
    saved(tmp_path, method, **given)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(loralab.UserError) as caught:
        loralab.load(lively("bert", method), tmp_path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


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
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow=3"),
        ({"peft_type": "LOKR"}, "peft_type 'LOKR' is not read here, only LORA, LOHA, MISS, VERA, IA3, OFT"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' changes the base"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "init_lora_weights='olora' changes the base"),
        ({"rank_pattern": {"query": 2}}, "expected (2, 24)"),
        ({"rank_pattern": {"(query": 2}}, "not a config of PEFT"),
        ({"rank_pattern": [2]}, "not a config of PEFT: rank_pattern=a list of 1: expected an object or null"),
        (
            {"rank_pattern": {"query": "two"}},
            "not a config of PEFT: rank_pattern['query']='two': expected a whole number",
        ),
        ({"r": "eight"}, "not a config of PEFT: r='eight': expected a whole number"),
        ({"r": None}, "not a config of PEFT: r=None"),
        ({"r": True}, "not a config of PEFT: r=True"),
        ({"r": 10**8}, "rank 100000000: no side of a tensor in the file is longer than 37"),
        ({"r": 0}, "rank=0"),
        ({"lora_alpha": None}, "not a config of PEFT: lora_alpha=None"),
        ({"lora_alpha": 1e400}, "not a config of PEFT: lora_alpha=inf"),
        ({"lora_dropout": "half"}, "not a config of PEFT: lora_dropout='half'"),
        ({"use_dora": "yes"}, "not a config of PEFT: use_dora='yes'"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": "classifier"}, "not a config of PEFT: modules_to_save='classifier'"),
        ({"peft_type": ["LORA"]}, "peft_type a list of 1 is not read here"),
        ({"base_model_name_or_path": 7}, "not a config of PEFT: base_model_name_or_path=7"),
        ({"rank_pattern": {"x" * 1001: 2}}, "a pattern has 1001 characters"),
    ],
)
def test_a_folder_that_would_be_another_function_is_refused(changed, told, tmp_path):
    told = "missing tensors: bert.encoder.layer.0" if told == "lora_magnitude_vector" else told
    saved(tmp_path, "lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(loralab.UserError) as caught:
        loralab.load(lively("bert"), tmp_path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_projection_that_its_seed_does_not_draw_is_refused(tmp_path):
    peft.get_peft_model(build("bert"), CONFIGS["vera"]()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.vera_A"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(loralab.UserError, match="projection"):
        loralab.load(build("bert"), tmp_path)


# ---- what is hostile, nested or without a place in PEFT's format -----------------------------------------------------


@pytest.mark.parametrize("pattern", [r"(.|.)*!", r"(.?){60}(.){60}!", r"((.*)*)*!", r"(\w|\w\w)*!", r"(?:(?:.|\.)+)+!"])
def test_a_pattern_that_never_ends_is_refused_in_time(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_format, "PATTERN_SECONDS", 0.5)
    saved(tmp_path, "lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {pattern: 2}}))
    start = time.monotonic()
    # some of them the engine can match in time; that it ends is what counts
    with contextlib.suppress(loralab.UserError):
        loralab.load(lively("bert"), tmp_path)
    assert time.monotonic() - start < 20


def test_the_limit_of_time_is_for_all_patterns_together(monkeypatch):
    patterns = {f"(.|..|...)*{i}!": 2 for i in range(1000)}
    with pytest.raises(loralab.UserError, match="take longer than"):
        peft_format._first_match(patterns, ["bert.encoder." * 20], time.monotonic() + 0.005)


@pytest.mark.parametrize("who", ["loralab", "PEFT"])
def test_heads_below_the_top_level_are_read_back(who, tmp_path):
    kind = {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}
    if who == "PEFT":
        theirs = peft.get_peft_model(lively("bert"), peft.LoraConfig(r=2, **kind)).eval()
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                if "modules_to_save" in key or "lora_B" in key:
                    p.add_(0.1)
        theirs.save_pretrained(tmp_path)
        expected = theirs(**rows()).logits
    else:
        model = lively("bert")
        adapters = loralab.attach(model, "lora", rank=2, targets=["query"], head=["bert.pooler", "classifier"])
        shake(adapters, "default")
        with torch.no_grad():
            for key, t in adapters.state().items():
                if key.startswith(("bert.pooler", "classifier")):
                    t.add_(0.1)
        expected = model.eval()(**rows()).logits
        adapters.export(tmp_path)
        theirs = quiet(peft.PeftModel.from_pretrained, lively("bert"), tmp_path).eval()
        torch.testing.assert_close(theirs(**rows()).logits, expected, rtol=1e-5, atol=1e-6)
    ours = lively("bert")
    adapters = loralab.load(ours, tmp_path)
    assert sorted(adapters.spec().heads) == ["bert.pooler", "classifier"]
    torch.testing.assert_close(ours.eval()(**rows()).logits, expected, rtol=1e-5, atol=1e-6)


DEEP = [  # modules_to_save, and how many modules they are
    (["LayerNorm", "classifier"], 6),
    (["attention.output.LayerNorm"], 2),
    (["embeddings.word_embeddings", "pooler.dense"], 2),
    (["layer.1.output", "classifier"], 2),
]


@pytest.mark.parametrize(("names", "count"), DEEP)
def test_modules_to_save_of_any_depth_go_both_ways(names, count, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["query", "key"], modules_to_save=names)
    theirs = quiet(peft.get_peft_model, lively("bert"), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.empty(p.shape).normal_(0, 0.2, generator=generator))
    theirs.save_pretrained(tmp_path / "peft")
    expected = theirs(**rows()).logits
    ours = lively("bert")
    adapters = loralab.load(ours, tmp_path / "peft")
    assert len(adapters.spec().heads) == count
    torch.testing.assert_close(ours(**rows()).logits, expected, rtol=0, atol=1e-5)
    assert adapters.counts()["trainable"] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    torch.testing.assert_close(adapters.merge()(**rows()).logits, expected, rtol=0, atol=1e-5)
    adapters.export(tmp_path / "ours")
    again = quiet(peft.PeftModel.from_pretrained, lively("bert"), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**rows()).logits, expected, rtol=0, atol=1e-5)
    adapters.add("b", "lora", rank=3, head=True)
    shake(adapters, "b")
    with adapters.use([adapters.names[0], "b"], ids=[0, 1, 0, 1, 0]):
        mixed = ours(**rows()).logits
    torch.testing.assert_close(mixed[::2], expected[::2], rtol=0, atol=1e-5)


def test_modules_to_save_inside_one_another_are_refused(tmp_path):
    names = ["layer.0.attention.output", "LayerNorm"]
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=names)
    quiet(peft.get_peft_model, lively("bert"), config).save_pretrained(tmp_path)
    with pytest.raises(loralab.UserError, match="output.LayerNorm and .*layer.0.attention.output around it"):
        loralab.load(lively("bert"), tmp_path)


def test_an_embedding_as_a_head_learns_and_comes_back(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, **sizes)

    def causal():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    model, ids = causal(), torch.randint(3, 40, (2, 5))
    adapters = loralab.attach(model, "lora", rank=2, targets=["q_proj"], head=["model.embed_tokens"])
    model(ids, labels=ids).loss.backward()
    assert adapters.state()["model.embed_tokens.weight"].grad.abs().sum() > 0
    shake(adapters, "default")
    with torch.no_grad():
        adapters.state()["model.embed_tokens.weight"].add_(0.1)
    expected = model(ids).logits
    adapters.save(tmp_path / "own")
    adapters.export(tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    for folder in ("own", "peft"):
        again = causal()
        loralab.load(again, tmp_path / folder)
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("folder", ["plain", "lora-v1.0", "qwen2.5 run", "keys", "v1.0.", "größe"])
def test_a_folder_of_any_name_loads_by_itself(folder, tmp_path):
    saved(tmp_path / folder, "lora")
    names = loralab.load(lively("bert"), tmp_path / folder).names
    assert names == [adapter_name(folder)]
    assert loralab.load(lively("bert"), tmp_path / folder, name="mine").names == ["mine"]


def test_labels_and_class_go_with_an_export(tmp_path):
    adapters = loralab.attach(lively("bert"), "lora", rank=2, head=True, labels=["no", "yes", "so"])
    adapters.export(tmp_path)
    file = peft_format.read(tmp_path)
    assert file.labels == ["no", "yes", "so"]
    assert (file.base["class"], file.base["task_type"]) == ("BertForSequenceClassification", "SEQ_CLS")
    assert loralab.load(lively("bert"), tmp_path).spec().labels == ("no", "yes", "so")


@pytest.mark.parametrize(
    ("method", "given", "notes"),
    [
        ("lora", {}, []),
        ("lora", {"rank": 20}, ["vLLM needs --max-lora-rank 20"]),
        ("dora", {}, ["vLLM refuses DoRA"]),
        ("lora", {"head": True}, ["vLLM refuses a head"]),
        ("dora", {"head": True, "rank": 20}, ["vLLM refuses DoRA", "vLLM refuses a head"]),
    ],
)
def test_what_vllm_refuses_is_said(method, given, notes, tmp_path):
    loralab.attach(lively("bert"), method, **{"rank": 4, **given}).export(tmp_path)
    found = peft_write.vllm_notes(tmp_path)
    assert len(found) == len(notes)
    assert all(note.startswith(start) for note, start in zip(found, notes, strict=True))


def test_a_key_with_and_without_prefix_is_refused(tmp_path):
    saved(tmp_path, "lora")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(tensors))
    save_file(
        tensors | {key.removeprefix(peft_format.PREFIX): tensors[key] + 1}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(loralab.UserError, match="given twice"):
        loralab.load(lively("bert"), tmp_path)


def test_a_path_that_is_the_end_of_another_keeps_its_own_rank(tmp_path):
    def nested():
        torch.manual_seed(0)
        inner = torch.nn.ModuleDict({"lin": torch.nn.Linear(7, 9), "more": torch.nn.Linear(9, 7)})
        return torch.nn.ModuleDict({"lin": torch.nn.Linear(7, 9), "block": inner})

    for ranks in ({"lin": 2, "block.lin": 4, "block.more": 3}, {"lin": 4, "block.lin": 2, "block.more": 4}):
        model = nested()
        map_ = loralab.RankMap(ranks)
        adapters = loralab.attach(model, "lora", rank=4, alpha=5, targets=list(ranks), ranks=map_)
        shake(adapters, "default")
        adapters.export(tmp_path / str(ranks["lin"]), base_name="b")
        theirs = peft.PeftModel.from_pretrained(nested(), tmp_path / str(ranks["lin"]))
        again = nested()
        loralab.load(again, tmp_path / str(ranks["lin"]))
        x = torch.randn(3, 7)
        for path in ("lin", "block.lin"):
            right = model.get_submodule(path)(x)
            torch.testing.assert_close(theirs.base_model.model.get_submodule(path)(x), right, rtol=0, atol=1e-6)
            torch.testing.assert_close(again.get_submodule(path)(x), right, rtol=0, atol=1e-6)


def test_pickled_tensors_are_refused_with_the_command_that_converts(tmp_path):
    saved(tmp_path, "lora")
    tensors = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(tensors), tmp_path / "adapter_model.bin")
    tensors.unlink()
    with pytest.raises(loralab.UserError, match="could run code") as caught:
        loralab.load(lively("bert"), tmp_path)
    words = shlex.split(str(caught.value).partition("if you trust it: ")[2])
    subprocess.run([sys.executable, *words[1:]], check=True)
    assert len(loralab.load(lively("bert"), tmp_path).layers) == 6


def test_a_folder_of_named_adapters_says_their_names(tmp_path):
    theirs = quiet(peft.get_peft_model, lively("bert"), CONFIGS["lora"]())
    theirs.add_adapter("second", CONFIGS["lora"]())
    theirs.save_pretrained(tmp_path, selected_adapters=["second"])
    with pytest.raises(loralab.UserError, match="holds second: name one"):
        loralab.load(lively("bert"), tmp_path)
    assert loralab.load(lively("bert"), tmp_path / "second").names == ["second"]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_auto_peft_model_reads_an_export(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / "base")
    adapters = loralab.attach(model, "dora", rank=3, alpha=5, targets="attention", head=True)
    shake(adapters, "default")
    with torch.no_grad():
        adapters.state()[f"{next(iter(adapters.heads))}.weight"].add_(0.5)
    adapters.export(tmp_path / "peft", base_name=str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(**rows()).logits, model(**rows()).logits, rtol=0, atol=1e-5)


def test_the_page_for_users_of_peft_has_every_field_of_lora_config():
    page = (REPO / "docs/from-peft.md").read_text().partition("## The fields")[2]
    missing = [field.name for field in dataclasses.fields(peft.LoraConfig) if f"`{field.name}`" not in page]
    assert not missing


# ---- methods that only PEFT has --------------------------------------------------------------------------------------

HEADS = {"target_modules": TARGETS, "modules_to_save": ["pooler", "classifier"]}
OTHERS = {  # what PEFT converts to a LoRA
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, **HEADS),
    "randlora": lambda: peft.RandLoraConfig(r=5, randlora_alpha=7, **HEADS),
    "hra": lambda: peft.HRAConfig(r=2, **HEADS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=40, scaling=150.0, **HEADS),
}


@pytest.mark.parametrize("method", ["lokr", "randlora", "fourierft"])
@pytest.mark.parametrize("adapted", [False, True])
def test_pefts_other_methods_load_through_peft_as_a_lora(method, adapted, tmp_path):
    torch.manual_seed(5)
    theirs = quiet(peft.get_peft_model, lively("bert"), OTHERS[method]()).eval()
    move_and_save(theirs, tmp_path)
    expected = theirs(**rows()).logits
    ours = lively("bert")
    assert (expected - ours(**rows()).logits).abs().max() > 0.1
    if adapted:
        shake(loralab.attach(ours, "dora", name="before", rank=3, targets=["query", "key"]), "before")
    with pytest.raises(loralab.UserError, match=r"is not read here, only .*through_peft=True"):
        loralab.load(ours, tmp_path)
    adapters = loralab.load(ours, tmp_path, name="new", through_peft=True)
    assert sorted(adapters.spec().heads) == ["bert.pooler", "classifier"]
    right = ours(**rows()).logits  # but for what float32 cuts off, see the file
    torch.testing.assert_close(right, expected, rtol=0, atol=2e-3)
    adapters.save(tmp_path / "own")
    again = lively("bert")
    loralab.load(again, tmp_path / "own")
    assert torch.equal(again(**rows()).logits, ours(**rows()).logits)


def test_what_peft_does_not_convert_says_why_and_leaves_the_model(tmp_path):
    quiet(peft.get_peft_model, lively("bert"), OTHERS["hra"]()).save_pretrained(tmp_path / "no sum")
    for folder in ("no target", "no tensor", "no file"):
        quiet(peft.get_peft_model, lively("bert"), OTHERS["lokr"]()).save_pretrained(tmp_path / folder)
    config = json.loads((tmp_path / "no target/adapter_config.json").read_text())
    (tmp_path / "no target/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nothing"]}))
    tensors = load_file(tmp_path / "no tensor/adapter_model.safetensors")
    key = next(key for key in tensors if "lokr" in key)
    save_file({k: t for k, t in tensors.items() if k != key}, tmp_path / "no tensor/adapter_model.safetensors")
    (tmp_path / "no file/adapter_model.safetensors").unlink()
    for folder, told in (
        ("no sum", "PEFT does not convert it to a LoRA here: Some module types on this model do not support"),
        ("no target", "PEFT does not convert it to a LoRA here: No modules were targeted"),
        ("no tensor", "missing adapter keys"),
        ("no folder", "adapter_config.json"),
        ("no file", "adapter_model.safetensors"),
    ):
        model = lively("bert")
        with pytest.raises(loralab.UserError, match=told) as caught:
            loralab.load(model, tmp_path / folder, through_peft=True)
        assert "\n" not in str(caught.value)
        assert not hasattr(model, "_loralab")
        assert all(p.requires_grad for p in model.parameters())
