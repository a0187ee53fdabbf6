"""GGUF files: an adapter as llama.cpp adds it, and a merged model, both read back by transformers from a file."""

import json
import warnings

import numpy as np
import pytest
import torch
from archs import shake
from test_cli import cli, refused  # noqa: F401 (fixtures)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
)

import loralab
from loralab import LayerRank, RankMap, UserError, gguf_format
from loralab.gguf_format import Layout
from loralab.merging import TieNote
from loralab.model_names import find
from loralab.models import gguf_file, pretrained

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'loralab[gguf]'")

WIDTH, WIDE, HEADS, KEYS, BLOCKS = 32, 64, 4, 2, 2
WORDS = ["[PAD]", "[UNK]", "[EOS]", *"abcdefghijklmnopqrstuvwxyz", "ab"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
BLOCK = {  # GGUF's name -> (out, in), how it is kept
    "attn_q": ((WIDTH, WIDTH), "Q8_0"), "attn_k": ((KEYS * 8, WIDTH), "Q4_1"), "attn_v": ((KEYS * 8, WIDTH), "F32"),
    "attn_output": ((WIDTH, WIDTH), "Q8_0"), "ffn_gate": ((WIDE, WIDTH), "F16"), "ffn_up": ((WIDE, WIDTH), "F32"),
    "ffn_down": ((WIDTH, WIDE), "Q8_0"), "attn_norm": ((WIDTH,), "F32"), "ffn_norm": ((WIDTH,), "F32"),
}  # fmt: skip


def write(path, change=lambda name, values: values, kind=None):
    """A Llama of two blocks whose keys are shared by pairs of heads, as a file; `change` has the last word."""
    random = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(WORDS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    tensors = {"token_embd": ((len(WORDS), WIDTH), "F16"), "output_norm": ((WIDTH,), "F32")}
    tensors |= {f"blk.{i}.{name}": row for i in range(BLOCKS) for name, row in BLOCK.items()}
    for name, (shape, own) in tensors.items():
        values = random.normal(0 if len(shape) > 1 else 1, 0.3, shape).astype(np.float32)
        at = gguf.GGMLQuantizationType[own]
        values = gguf.dequantize(gguf.quantize(values, at), at)  # what the file can hold
        at = at if kind is None else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(change(f"{name}.weight", values), at), raw_dtype=at)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder, name="tiny.gguf"):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "tiny.gguf")
    return tmp_path / "base"


def attached(base, method="lora", **given):
    model = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters = loralab.attach(model, method, name="a", **{"targets": TARGETS, **given})
    shake(adapters, "a")
    return model, adapters


def logits(model):
    ids = torch.randint(3, len(WORDS), (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def uneven():
    """Ranks and alphas that differ by layer, and one that is left out."""
    layers = {f"model.layers.{i}.{path}": 3 for i in range(2) for path in ("self_attn.k_proj", "self_attn.v_proj")}
    down = {"model.layers.0.mlp.down_proj": LayerRank(5, alpha=2.0), "model.layers.1.mlp.down_proj": 0}
    return RankMap({**layers, **down, **{f"model.layers.{i}.self_attn.q_proj": 2 for i in range(2)}})


# ---- an adapter ------------------------------------------------------------------------------------------------------


EXPORTED = [
    ("lora", {"rank": 3, "alpha": 5.0}),
    ("lora", {"rank": 3, "alpha": 5.0, "ranks": uneven}),
    ("rslora", {"rank": 4, "alpha": 3.0}),
    ("vera", {"rank": 7}),
    ("pissa", {"rank": 2, "alpha": 3.0}),
    ("dylora", {"rank": 4, "alpha": 6.0}),
]


@pytest.mark.parametrize(("method", "given"), EXPORTED)
def test_an_adapter_that_llama_cpp_adds_is_the_adapter(method, given, base, tmp_path):
    """llama.cpp adds alpha / r B A to the tensor of the base, with r the columns of that B."""
    model, adapters = attached(base, method, **{key: v() if callable(v) else v for key, v in given.items()})
    right, before = logits(model), logits(load(base))
    assert adapters.export(tmp_path / "out", layout="gguf", base_name="some/base") == tmp_path / "out"
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    told = {key: field.contents() for key, field in reader.fields.items()}
    assert told["general.architecture"] == "llama"
    assert (told["general.type"], told["adapter.type"]) == ("adapter", "lora")
    assert (told["general.base_model.0.name"], told["loralab.base_sha256"]) == ("some/base", adapters.base_sha256)
    pairs = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(pairs) == 2 * len(adapters.layers)

    def added(name, values):
        if f"{name}.lora_a" not in pairs:
            return values
        A, B = pairs.pop(f"{name}.lora_a"), pairs.pop(f"{name}.lora_b")
        return values + told["adapter.lora.alpha"] / B.shape[1] * B @ A

    write(tmp_path / "both.gguf", added, "F32")
    assert not pairs
    torch.testing.assert_close(logits(load(tmp_path, "both.gguf")), right, rtol=0, atol=1e-4)
    assert (right - before).abs().max() > 0.1


def permuted(heads, dim):
    """Row of the model -> row of the file: the halves of each head, which rotate together, lie beside each other."""
    return [h * dim + 2 * i + half for h in range(heads) for half in range(2) for i in range(dim // 2)]


def by_thirds(heads, dim):
    """Row of the model, which has q, k and v of a head together -> row of the file, which has all q first."""
    return [part * heads * dim + h * dim + i for h in range(heads) for part in range(3) for i in range(dim)]


LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = [
    (LlamaConfig(**LLAMA, num_hidden_layers=3), "model.layers.2.self_attn.q_proj", "blk.2.attn_q", permuted(4, 6)),
    (LlamaConfig(**LLAMA, num_hidden_layers=3), "model.layers.1.self_attn.k_proj", "blk.1.attn_k", permuted(2, 6)),
    (LlamaConfig(**LLAMA, num_hidden_layers=3), "layers.0.mlp.gate_proj", "blk.0.ffn_gate", range(40)),
    (MistralConfig(**LLAMA, num_hidden_layers=1), "model.layers.0.self_attn.k_proj", "blk.0.attn_k", permuted(2, 6)),
    (Qwen2Config(**LLAMA, num_hidden_layers=1), "model.layers.0.self_attn.q_proj", "blk.0.attn_q", range(24)),
    (GPT2Config(n_embd=24, n_layer=1, n_head=4), "transformer.h.0.attn.c_attn", "blk.0.attn_qkv", range(72)),
    (BloomConfig(hidden_size=24, n_layer=1, n_head=4), "transformer.h.0.self_attention.query_key_value",
     "blk.0.attn_qkv", by_thirds(4, 6)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "path", "name", "rows"), ROWS)
def test_rows_lie_where_llama_cpp_reads_them(config, path, name, rows):
    layout = Layout(config)
    assert layout.tensor(f"{path}.weight") == f"{name}.weight"
    assert layout.rows(f"{name}.weight", len(rows), 24).tolist() == list(rows)


def test_a_path_that_only_ends_like_an_output_layer_is_none():
    layout = Layout(LlamaConfig(**LLAMA, num_hidden_layers=1))
    assert layout.tensor("lm_head.weight") == "output.weight"
    assert layout.tensor("model.layers.0.extra.lm_head.weight") is None


def untied(base):
    model = load(base)
    return loralab.attach(model, "lora", name="a", targets=["lm_head"], rank=2)


def on(model, method="lora", **given):
    return loralab.attach(model, method, name="a", rank=2, **given)


REFUSED = {
    "gain": (lambda base: attached(base, "dora", rank=2)[1], "has no gain \\(DoRA\\); merge it instead"),
    "head": (lambda base: attached(base, rank=2, head=["lm_head"])[1], "has no head \\(lm_head\\)"),
    "embedding": (lambda base: attached(base, rank=2, targets=["embed_tokens"])[1], "embed_tokens, which is no linear"),
    "tied": (untied, "lm_head, whose weight another layer has too"),
    "tokens": (lambda base: attached(base, rank=2, tokens=[3, 5])[1], "single tokens"),
    "dense": (lambda base: attached(base, "superlora")[1], "no low-rank product"),
    "model": (
        lambda base: on(BertModel(BertConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=1))),
        "model type 'bert' has no layout in GGUF that is known here: expected one of .*llama",
    ),
    "experts": (
        lambda base: on(
            MixtralForCausalLM(MixtralConfig(**LLAMA, num_hidden_layers=1, num_local_experts=2, vocab_size=9)),
            targets=["q_proj"],
        ),
        "model type 'mixtral'",
    ),
    "no config": (lambda base: on(torch.nn.Sequential(torch.nn.Linear(4, 5)), targets=["0"]), "model type 'None'"),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_llama_cpp_cannot_add_is_refused(key, base, tmp_path):
    make, why = REFUSED[key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters = make(base)
    with pytest.raises(UserError, match=why):
        adapters.export(tmp_path / "out", layout="gguf")
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="layout 'onnx' is unknown: choose one of peft, gguf"):
        attached(base, rank=2)[1].export(tmp_path / "out", layout="onnx")


# ---- a merged model --------------------------------------------------------------------------------------------------


def told(path):
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {tensor.name: (tensor.tensor_type, tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("dtype", "kind", "kept"),
    [("float32", "ALL_F32", "F32"), ("float16", "MOSTLY_F16", "F16"), ("bfloat16", "MOSTLY_BF16", "BF16")],
)
def test_a_merged_file_has_the_header_of_its_base_and_answers_as_the_merged_model(
    dtype, kind, kept, base, cli, tmp_path  # noqa: F811
):  # fmt: skip
    model, adapters = attached(base, "dora", rank=3, alpha=5.0)
    adapters.save(tmp_path / "adapter")
    code, _, err = cli("merge", tmp_path / "adapter", "--model", base, "--out", "merged", "--gguf", "--dtype", dtype)
    assert code == 0, err
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.gguf"]
    before, after = told(base / "tiny.gguf"), told(tmp_path / "merged" / "model.gguf")
    assert after[0] == {**before[0], "general.file_type": int(gguf.LlamaFileType[kind])}
    assert after[1].keys() == before[1].keys()
    for name, (tensor, data) in before[1].items():
        changed = any(word in name for word in ("attn_q.", "attn_k.", "attn_v.", "ffn_down."))
        assert (after[1][name][0].name == kept) if changed else (after[1][name][0] == tensor)
        assert changed or np.array_equal(after[1][name][1], data)
    plain, rounded = load(base), adapters.merge(dtype=dtype)
    for key, p in plain.named_parameters():  # what did not change is not rounded
        if any(word in key for word in TARGETS):
            p.data = rounded.get_parameter(key).float()
    again = load(tmp_path / "merged", "model.gguf")
    torch.testing.assert_close(logits(again), logits(plain), rtol=0, atol=1e-5)
    if dtype == "float32":
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)


def test_an_adapted_output_layer_becomes_a_tensor_of_its_own(base, cli, tmp_path):  # noqa: F811
    model, adapters = attached(base, rank=3, targets=["lm_head", "q_proj"])
    adapters.save(tmp_path / "adapter")
    with pytest.warns(TieNote):
        assert cli("merge", tmp_path / "adapter", "--model", base, "--out", "merged", "--gguf")[0] == 0
    assert "output.weight" in told(tmp_path / "merged" / "model.gguf")[1]
    assert "output.weight" not in told(base / "tiny.gguf")[1]
    again = load(tmp_path / "merged", "model.gguf")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)


def test_a_merged_gguf_base_is_a_standard_folder_with_its_tokenizer(base, cli, tmp_path):  # noqa: F811
    model, adapters = attached(base, rank=3, alpha=5.0)
    adapters.save(tmp_path / "adapter")
    assert cli("merge", tmp_path / "adapter", "--model", base, "--out", "merged")[0] == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)
    old, new = AutoTokenizer.from_pretrained(base, gguf_file="tiny.gguf"), AutoTokenizer.from_pretrained("merged")
    assert old("ab c")["input_ids"] == new("ab c")["input_ids"]
    assert new.chat_template == TEMPLATE
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    for file in (tmp_path / "merged").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name


def test_what_leaves_has_the_template_and_the_end_that_were_learned(base, cli, tmp_path):  # noqa: F811
    """The adapter answers prompts of its own template only, which no base has, and ends answers with its own token."""
    _, adapters = attached(base, rank=3, alpha=5.0)
    adapters.save(tmp_path / "adapter")
    own, words = "{{ 'a ' + messages[0]['content'] }}", AutoTokenizer.from_pretrained(base, gguf_file="tiny.gguf")
    known = {"objective": "causal", "task": "x", "options": {"template": own}, "end": words.convert_ids_to_tokens(1)}
    (tmp_path / "adapter/task.json").write_text(json.dumps(known))
    for out, more in (("merged", ()), ("file", ("--gguf",))):
        assert cli("merge", tmp_path / "adapter", "--model", base, "--out", out, *more)[0] == 0
    assert AutoTokenizer.from_pretrained("merged").chat_template == own
    ends = AutoModelForCausalLM.from_pretrained("merged").generation_config.eos_token_id
    assert 1 in ends
    before, after = told(base / "tiny.gguf")[0], told(tmp_path / "file/model.gguf")[0]
    assert after == {
        **before, "tokenizer.chat_template": own, "tokenizer.ggml.eot_token_id": 1,
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
    }  # fmt: skip
    for out, more in (("peft", ()), ("lora", ("--gguf",))):
        code, _, err = cli("export", tmp_path / "adapter", "--model", base, "--out", out, *more)
        assert (code, (tmp_path / out / "chat_template.jinja").read_text()) == (0, own)
        assert f"{out}/chat_template.jinja: give it to what runs the adapter" in err


def test_a_merge_into_gguf_needs_a_base_of_gguf(base, cli, refused, tiny, tmp_path):  # noqa: F811
    _, adapters = attached(base, rank=3)
    adapters.save(tmp_path / "adapter")
    cli("--version")  # forgets the bar of `load`
    wrong = refused("merge", tmp_path / "adapter", "--model", tiny, "--out", "merged", "--gguf")
    assert "is no GGUF file: leave it out" in wrong


# ---- the command line ------------------------------------------------------------------------------------------------


def test_export_as_gguf_names_the_base(base, cli, tmp_path):  # noqa: F811
    _, adapters = attached(base, rank=3)
    adapters.save(tmp_path / "adapter")
    code, out, _ = cli("export", tmp_path / "adapter", "--model", base, "--out", "out", "--gguf")
    assert code == 0
    assert "exported to out/adapter.gguf" in out
    assert f"base: base, sha256 of its tensors {adapters.base_sha256}" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter.gguf"]
    assert told(tmp_path / "out" / "adapter.gguf")[0]["general.base_model.0.name"] == "base"
    assert str(tmp_path).encode() not in (tmp_path / "out" / "adapter.gguf").read_bytes()
    assert cli("export", tmp_path / "adapter", "--model", base, "--out", "at", "--gguf", "--base", base)[0] == 0
    assert told(tmp_path / "at" / "adapter.gguf")[0]["general.base_model.0.name"] == str(base)
    assert gguf_format.ADAPTER == "adapter.gguf"


def attached_smollm2(folder, std):
    """SmolLM2 with a LoRA whose values spread by `std`, which is saved in the folder; skips without the model."""
    if find("smollm2") is None:
        pytest.skip("the model smollm2 is not on this machine: make models")
    model = pretrained("smollm2", "CAUSAL_LM").model.eval()
    adapters = loralab.attach(model, "lora", name="a", rank=4, alpha=6.0)
    shake(adapters, "a", std=std)
    adapters.save(folder)
    return model, adapters


@pytest.mark.slow
def test_smollm2_leaves_as_both_files(cli, tmp_path):  # noqa: F811
    model, adapters = attached_smollm2(tmp_path / "adapter", std=0.01)
    ids = torch.tensor([[504, 2044, 282, 4649, 314]])
    with torch.no_grad():
        right = model(ids).logits
        with adapters.use(None):
            plain = model(ids).logits
    assert cli("merge", tmp_path / "adapter", "--model", "smollm2", "--out", "merged", "--gguf")[0] == 0
    merged = pretrained("merged", "CAUSAL_LM").model.eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, right, rtol=0, atol=2e-3)
    assert (right - plain).abs().max() > 0.1
    code, out, _ = cli("export", tmp_path / "adapter", "--model", "smollm2", "--out", "out", "--gguf")
    assert (code, "base: HuggingFaceTB/SmolLM2-135M-Instruct" in out) == (0, True)
    fields, pairs = told(tmp_path / "out" / "adapter.gguf")
    base, full = told(gguf_file("smollm2"))[1], told(tmp_path / "merged" / "model.gguf")[1]
    names = [name.removesuffix(".lora_a") for name in pairs if name.endswith(".lora_a")]
    assert len(names) == len(adapters.layers) == 30 * 7
    for name in names:
        A, B = (gguf.dequantize(*pairs[f"{name}.{role}"][::-1]) for role in ("lora_a", "lora_b"))
        W, V = (gguf.dequantize(*tensors[name][::-1]) for tensors in (base, full))
        np.testing.assert_allclose(W + fields["adapter.lora.alpha"] / B.shape[1] * B @ A, V, rtol=0, atol=1e-5)
