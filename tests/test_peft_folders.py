"""PEFT's folders of whatever settings: both ways, the same function in float64, or one line that says why not."""

import json
import warnings

import pytest
import torch
import transformers
from archs import shake
from safetensors.torch import load_file, save_file

import loralab
from loralab.algebra import combine

peft = pytest.importorskip("peft")
from peft import AdaLoraConfig, LoraConfig, MissConfig, OFTConfig  # noqa: E402
from test_peft import move_and_save, quiet  # noqa: E402

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
KINDS = {  # name -> class, its config
    "llama": ("LlamaForCausalLM", GROUPED),
    "tied llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "bert": ("BertForSequenceClassification", {**SIZES, "num_labels": 3}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_heads": 4},
    ),
}
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
QV = ["q_proj", "v_proj"]


def made(kind):
    name, config = KINDS[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.15 * torch.randn_like(p) if p.ndim > 1 else p + 0.1 * torch.randn_like(p))
    model.config._experts_implementation = "eager"  # grouped products know no float64
    return model


@torch.no_grad()
def answer(model, kind):
    more = {"decoder_input_ids": IDS[:, :4]} if kind == "t5" else {}
    return model.double()(input_ids=IDS, **more).logits


def lora(**given):
    return lambda: LoraConfig(r=3, lora_alpha=5, **given)


def adalora(**given):
    return lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5, total_step=9, tinit=1, tfinal=2, **given)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
OWN_RANKS = {"experts.down_proj": 2, "v_proj": 5}
FOLDERS = {  # name -> model, PEFT's config
    # biases of all layers, of the adapted ones, of none that there is; beside a head and modules to save
    "biases": ("bert", lora(target_modules=["query"], bias="all", task_type="SEQ_CLS")),
    "biases, a gain": (
        "bert",
        lora(target_modules=["query", "dense"], bias="all", use_dora=True, modules_to_save=["pooler", "LayerNorm"]),
    ),
    "own biases": ("gpt2", lora(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)),
    "no biases": ("llama", lora(target_modules=QV, bias="all")),
    "biases of oft": ("bert", lambda: OFTConfig(r=0, oft_block_size=6, target_modules=["query"], bias="all")),
    # single tokens: in the order given, of the input, of both, of all that are tied
    "tokens": ("llama", lora(target_modules=QV, trainable_token_indices=[60, 3, 8])),
    "tokens of both": (
        "llama",
        lora(target_modules=QV, trainable_token_indices={"embed_tokens": [3, 60], "lm_head": [9]}),
    ),
    "tied tokens": ("gpt2", lora(target_modules=["c_attn"], trainable_token_indices=[60, 4], fan_in_fan_out=True)),
    "tokens tied fourfold": ("t5", lora(target_modules=["q"], trainable_token_indices={"shared": [60, 4]})),
    # PEFT saves the base's table with an adapter on it
    "tables": ("llama", lora(target_modules=[*QV, "embed_tokens", "lm_head"])),
    "tied tables": ("tied llama", lora(target_modules=[*QV, "embed_tokens", "lm_head"])),
    "an output layer": ("tied llama", lora(target_modules=[*QV, "lm_head"])),
    # the names of older checkpoints, which PEFT makes parameters with ranks of their own
    "old names of experts": ("mixtral", lora(target_modules=[*QV, "w1", "w2", "w3"], use_rslora=True)),
    "ranks of parameters": ("mixtral", lora(target_modules=QV, target_parameters=EXPERTS, rank_pattern=OWN_RANKS)),
    "alphas of parameters": (
        "mixtral",
        lora(target_modules=QV, target_parameters=EXPERTS, alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 9}),
    ),
    "ranks of a weight": (
        "llama",
        lora(target_modules=["v_proj"], target_parameters=["q_proj.weight"], rank_pattern={"q_proj.weight": 2}),
    ),
    "adalora": ("llama", adalora(target_modules=QV)),
    "adalora with a head": ("bert", adalora(target_modules=["query", "dense"], task_type="SEQ_CLS")),
}
NOT_WRITTEN = {"biases of oft": "oft of PEFT changes no bias"}


def off(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_peft_is_the_same_function_both_ways(name, tmp_path):
    kind, config = FOLDERS[name]
    theirs = quiet(peft.get_peft_model, made(kind), config()).eval()
    quiet(move_and_save, theirs, tmp_path / "peft")
    expected = answer(theirs, kind)
    assert off(expected, answer(made(kind), kind)) > 0.05
    ours = made(kind)
    adapters = quiet(loralab.load, ours, tmp_path / "peft")
    merged = quiet(adapters.merge)
    adapters.save(tmp_path / "own")
    if name in NOT_WRITTEN:
        with pytest.raises(loralab.UserError, match=NOT_WRITTEN[name]):
            adapters.export(tmp_path / "back")
    else:
        adapters.export(tmp_path / "back")
        back = quiet(peft.PeftModel.from_pretrained, made(kind), tmp_path / "back").eval()
        assert off(answer(back, kind), expected) < 1e-5  # files are float32
    for folder in tmp_path.iterdir():
        again = made(kind)
        quiet(loralab.load, again, folder)
        assert off(answer(again, kind), expected) < 1e-5
    assert off(answer(ours, kind), expected) < 1e-6
    assert off(answer(merged, kind), expected) < 1e-5


MOVED = {  # starts that move PEFT's base, and one that is another function than its name says
    "pissa_niter": ("llama", lora(target_modules=QV, init_lora_weights="pissa_niter_4")),
    "pissa_niter, transposed": (
        "gpt2",
        lora(target_modules=["c_attn"], init_lora_weights="pissa_niter_8", fan_in_fan_out=True),
    ),
    "olora": ("llama", lora(target_modules=QV, init_lora_weights="olora")),
    "bat": ("llama", lambda: MissConfig(r=4, target_modules=QV, init_weights="bat")),
}


@pytest.mark.parametrize("name", MOVED)
def test_through_peft_has_what_peft_does_to_the_base(name, tmp_path):
    kind, config = MOVED[name]
    torch.manual_seed(5)
    theirs = quiet(peft.get_peft_model, made(kind), config()).eval()
    quiet(move_and_save, theirs, tmp_path)
    theirs = quiet(peft.PeftModel.from_pretrained, made(kind), tmp_path).eval()  # some starts are drawn anew
    ours = made(kind)
    adapters = quiet(loralab.load, ours, tmp_path, through_peft=True)
    assert off(answer(ours, kind), answer(theirs, kind)) < 1e-4
    with adapters.use(None):
        assert torch.equal(answer(ours, kind), answer(made(kind), kind))


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("tables", "model.embed_tokens.base_layer.weight", "puts its own model.embed_tokens.weight in the base"),
        ("tables", "lm_head.base_layer.weight", "which is not that of this model"),
    ],
)
def test_a_table_that_this_base_does_not_have_is_refused_under_an_adapter(name, tensor, told, tmp_path):
    kind, config = FOLDERS[name]
    quiet(move_and_save, quiet(peft.get_peft_model, made(kind), config()), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"base_model.model.{tensor}"] = tensors[f"base_model.model.{tensor}"] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = made(kind)
    with pytest.raises(loralab.UserError, match=told) as caught:
        loralab.load(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_loralab")


def test_a_resized_vocabulary_comes_along_and_its_size_is_asked_for(tmp_path):
    theirs = made("llama")
    theirs.resize_token_embeddings(70)
    theirs = quiet(peft.get_peft_model, theirs, lora(target_modules=QV)()).eval()
    quiet(theirs.save_pretrained, tmp_path, save_embedding_layers=True)
    expected = answer(theirs, "llama")
    with pytest.raises(loralab.UserError, match=r"\(70, 24\) in the base, and here it is \(61, 24\): resize the model"):
        loralab.load(made("llama"), tmp_path)
    ours = made("llama")
    ours.resize_token_embeddings(70)
    with torch.no_grad():
        ours.get_input_embeddings().weight[61:] += 1
    adapters = loralab.load(ours, tmp_path)
    assert set(adapters.spec().heads) == {"model.embed_tokens", "lm_head"}
    assert off(answer(ours, "llama"), expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("tokens", {"trainable_token_indices": [3, 8]}, "has 2 tokens .* expected one row for each"),
        ("tokens", {"trainable_token_indices": [3, 3, 8]}, "no token twice"),
        ("tokens", {"trainable_token_indices": [3, 8, 61]}, "tokens up to 61 .* resize the model first"),
        ("tokens", {"trainable_token_indices": {"nothing": [3, 8, 60]}}, "has 0 tokens for model.embed_tokens"),
        ("adalora", {"lora_alpha": "five"}, "lora_alpha='five'"),
        ("adalora", {"peft_type": "LORA", "r": 4}, "lora_E|unexpected|missing"),
    ],
)
def test_a_folder_that_says_something_else_than_its_tensors_is_refused(name, changed, told, tmp_path):
    kind, config = FOLDERS[name]
    quiet(move_and_save, quiet(peft.get_peft_model, made(kind), config()), tmp_path)
    place = tmp_path / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changed))
    with pytest.raises(loralab.UserError, match=told) as caught:
        loralab.load(made(kind), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_layer_that_adalora_left_no_rank_is_not_adapted(tmp_path):
    theirs = quiet(peft.get_peft_model, made("llama"), adalora(target_modules=QV)()).eval()
    base = "model.layers.{}.self_attn.{}"
    masks = {f"{base.format(0, 'q_proj')}.lora_E.default": [False] * 4,
             f"{base.format(1, 'v_proj')}.lora_E.default": [True, False, True, False]}  # fmt: skip
    theirs.peft_config["default"].rank_pattern = masks
    move_and_save(theirs, tmp_path)
    again = quiet(peft.PeftModel.from_pretrained, made("llama"), tmp_path).eval()
    ours = made("llama")
    adapters = loralab.load(ours, tmp_path)
    assert {p.partition("layers.")[2]: len(adapters.state()[f"{p}.A"]) for p in adapters.spec().paths} == {
        "0.self_attn.v_proj": 4, "1.self_attn.q_proj": 4, "1.self_attn.v_proj": 2,
    }  # fmt: skip
    assert off(answer(ours, "llama"), answer(again, "llama")) < 1e-6


@pytest.mark.parametrize("name", ["biases", "tokens", "ranks of parameters"])
def test_what_only_a_base_tells_is_not_combined_without_it(name, tmp_path):
    kind, config = FOLDERS[name]
    quiet(move_and_save, quiet(peft.get_peft_model, made(kind), config()), tmp_path)
    with pytest.raises(loralab.UserError, match="only its base tells: load it and save it again"):
        combine([loralab.adapters.read(tmp_path)], [2.0])


def noted(make):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in told if w.category.__module__.startswith("loralab")]


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [("qlora", {}, "a base kept in nf4-dq"), ("loftq", {}, "a base kept in nf4"), ("lora", {}, None)],
)
def test_an_export_says_what_its_base_was_kept_in(method, given, told, tmp_path):
    adapters = loralab.attach(made("llama"), method, rank=3, targets=QV, **given)
    notes = noted(lambda: adapters.export(tmp_path))
    assert [told in note for note in notes] == ([] if told is None else [True])


@pytest.mark.parametrize("layers", ["mlp", "self_attn"])
def test_an_export_says_which_layers_peft_takes_for_experts(layers, tmp_path):
    """Its names of the experts of older checkpoints are those of a model's dense layers, which it then leaves out."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1}

    def model():
        torch.manual_seed(0)
        config = transformers.Glm4MoeConfig(**GROUPED, **sizes, n_group=2, topk_group=1, head_dim=6)
        config._experts_implementation = "eager"
        return transformers.Glm4MoeForCausalLM(config).eval()

    ours = model()
    targets = [path for path, m in ours.named_modules() if f"0.{layers}." in path and isinstance(m, torch.nn.Linear)]
    adapters = loralab.attach(ours, "lora", rank=3, targets=targets)
    shake(adapters, "default")
    notes = noted(lambda: adapters.export(tmp_path))
    theirs = quiet(peft.PeftModel.from_pretrained, model(), tmp_path).eval()
    same = off(answer(theirs, "llama"), answer(ours, "llama")) < 1e-6
    assert same == (layers == "self_attn")
    assert ["PEFT takes" in note for note in notes] == ([] if same else [True])
